"""Each shape comment of model.py and heads.py is what passes on that line, and each docstring what a class does."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import minibert
from minibert import BertConfig, heads, model

FILES = {Path(heads.__file__), Path(model.__file__)}
SHAPE = re.compile(r"\(([^()]*)\)")
B, T, C = 3, 7, 2
SIZES = {"B": B, "T": T, "C": C, "D": 32, "H": 4, "K": 8, "F": 48, "V": 60, "num_labels": 5}


class Lines(TorchFunctionMode):
    """The shapes of all tensors that pass on each line of these files, in order: what goes into an operation, what
    comes out, for every line that is running at the time."""

    def __init__(self):
        super().__init__()
        self.seen: dict[tuple[str, int], list[tuple[int, ...]]] = {}
        self.classes: dict[type, list[tuple[list[tuple[int, ...]], list[tuple[int, ...]]]]] = {}

    def note(self, *values):
        shapes = [tuple(value.shape) for value in tensors(values)]
        frame = sys._getframe(1)
        while frame is not None:
            if Path(frame.f_code.co_filename) in FILES:
                self.seen.setdefault((frame.f_code.co_filename, frame.f_lineno), []).extend(shapes)
            frame = frame.f_back

    def __torch_function__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        self.note(args, output)
        return output

    def module(self, module, args, output):
        self.note(args, output)
        shapes = [[tuple(x.shape) for x in tensors((value,))] for value in (args, output)]
        self.classes.setdefault(type(module), []).append(tuple(shapes))


def tensors(values) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += tensors(value)
    return found


@pytest.fixture(scope="module")
def ran() -> Lines:
    lines = Lines()
    config = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
              "intermediate_size": 48, "max_position_embeddings": 16}  # fmt: skip
    labels = {"BertForQuestionAnswering": 2, "BertForMultipleChoice": 2}
    ids = torch.randint(1, 60, (B, T))
    with lines, torch.no_grad():
        for name in minibert.__all__:
            if name == "BertModel" or name.startswith("BertFor"):
                bert = getattr(minibert, name)(BertConfig(**config, num_labels=labels.get(name, 5))).eval()
                for module in bert.modules():
                    module.register_forward_hook(lines.module)
                if name == "BertForMultipleChoice":  # only its own lines: inside the encoder, B is another number
                    lines.seen, kept = {}, lines.seen
                    bert(input_ids=ids[:, None].expand(B, C, T))
                    lines.seen = {line: shapes for line, shapes in lines.seen.items() if line not in kept} | kept
                else:
                    bert(input_ids=ids)
    return lines


def comments() -> list[tuple[Path, int, str]]:
    found = []
    for path in sorted(FILES):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            code, _, comment = line.rpartition("# ")
            if code.strip() and comment.startswith("("):
                found.append((path, number, comment))
    return found


def fits(shape: tuple[int, ...], spelled: str) -> bool:
    """Does a shape agree with its letters? `...` stands for any sizes."""
    letters = [letter.strip() for letter in spelled.split(",") if letter.strip()]
    before, after = letters, []
    if "..." in letters:
        at = letters.index("...")
        before, after = letters[:at], letters[at + 1 :]
    elif len(letters) != len(shape):
        return False
    pairs = [*zip(before, shape, strict=False), *zip(reversed(after), reversed(shape), strict=False)]
    return len(shape) >= len(before) + len(after) and all(eval(letter, {}, SIZES) == size for letter, size in pairs)


@pytest.mark.parametrize(("path", "number", "comment"), comments(), ids=lambda x: getattr(x, "name", str(x)))
def test_comment_is_true(path, number, comment, ran):
    shapes = ran.seen.get((str(path), number))
    assert shapes, "no tensor passes on this line"
    spelled = SHAPE.findall(comment)
    for each in spelled:
        assert any(fits(shape, each) for shape in shapes), f"({each}) does not pass here: {sorted(set(shapes))}"
    if "->" in comment:
        assert fits(shapes[-1], spelled[-1]), f"{shapes[-1]} comes out, not ({spelled[-1]})"


def test_there_are_comments():
    assert len(comments()) >= 15
    assert not fits((B, T, 48), "B, T, D")
    assert fits((B, T, 60), "..., V")


def documented() -> list[tuple[type, str, str]]:
    found = []
    for module in (model, heads):
        for cls in vars(module).values():
            if inspect.isclass(cls) and issubclass(cls, nn.Module) and cls.__module__ == module.__name__:
                pair = re.search(r"(\([^()]*\)) -> (\([^()]*\))\.$", (cls.__doc__ or "").strip())
                if pair:
                    found.append((cls, pair[1].strip("()"), pair[2].strip("()")))
    return found


@pytest.mark.parametrize(("cls", "enters", "leaves"), documented(), ids=lambda x: getattr(x, "__name__", None))
def test_docstring_is_true(cls, enters, leaves, ran):
    calls = [call for call in ran.classes[cls] if all(size[0] != B * C for size in call[0] + call[1])]
    assert calls
    for given, returned in calls:
        assert any(fits(shape, enters) for shape in given), (given, enters)
        assert all(fits(shape, leaves) for shape in returned), (returned, leaves)


def test_there_are_docstrings():
    assert len(documented()) >= 10
