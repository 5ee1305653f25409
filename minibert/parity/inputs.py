"""What two implementations are asked: texts and pairs of many kinds, and ids of every length under every mask."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# A tab stands between the two texts of a pair; [MASK] is where a word is asked for
TEXTS = (
    "A",
    "No!",
    "The cat sat on the [MASK].",
    "She opened the door and [MASK] into the garden.",
    "Paris is the [MASK] of France, and Rome is the capital of [MASK].",
    "In 1969, on 20 July, two people walked 0.5 km on the Moon.",
    "naïve café, coöperate, Ångström, señor",
    "Der Fluß ist 東京 近く, Привет, नमस्ते.",
    "https://example.org/a?b=c&d=%20 user@example.org #tag",
    "unbelievableness antidisestablishmentarianism supercalifragilisticexpialidocious",
    "  spaces \u00a0 and\u200b invisible characters\t here  ".replace("\t", " "),
    "It rained all night.\tThe streets were wet in the [MASK].",
    "It rained all night.\tA prime number has two divisors.",
    "Who wrote the letter?\tThe letter was written by Ada, who had lived in London for years before she moved north.",
    "Yes.\tNo.",
    " ".join(["The committee met again in spring and put off what it had put off before."] * 12),
)
LENGTHS = (1, 2, 9, 31)  # and the longest: some faults need two tokens, some more than eight


@dataclass(frozen=True, eq=False)
class Case:
    """One call: arguments by name, with a name to report, and where words are asked for, (B, T), None: everywhere."""

    name: str
    inputs: dict[str, Tensor]
    asked: Tensor | None = None
    is_text: bool = False

    @property
    def real(self) -> Tensor | None:
        """Which tokens are no padding, (B, T); None for all. What is computed for padding means nothing.

        Choices are rows, as the encoder sees them: (B * C, T).
        """
        ids, mask = (self.inputs.get(name) for name in ("input_ids", "attention_mask"))
        if mask is not None and ids is not None and ids.ndim == 3:
            mask = mask.flatten(0, 1)
        return None if mask is None or mask.ndim != 2 or mask.is_floating_point() else mask.bool()

    @property
    def tokens(self) -> int:
        return next(iter(self.inputs.values())).shape[-1]


def as_cases(inputs: Any, config: Any = None, head: str = "") -> list[Case]:
    """One mapping of arguments, a tensor of ids, several of either, or None for ids of every length and mask.

    Raises TypeError for anything else, ValueError for an empty list.
    """
    if inputs is None:
        if config is None:
            raise ValueError("inputs must be given: the model has no config that says which ids there are")
        return list(synthetic(config, head))
    several = [inputs] if isinstance(inputs, Tensor | Mapping) else list(inputs)
    if not several:
        raise ValueError("inputs is empty: there is nothing to compare on")
    cases = []
    for number, each in enumerate(several):
        arguments = {"input_ids": each} if isinstance(each, Tensor) else each
        if not isinstance(arguments, Mapping) or not all(isinstance(x, Tensor) for x in arguments.values()):
            raise TypeError(f"inputs[{number}] must be a mapping of tensors or the tensor input_ids, "
                            f"got {type(each).__name__}")  # fmt: skip
        cases.append(Case(str(number), dict(arguments)))
    return cases


def masks(B: int, T: int) -> Iterator[tuple[str, Tensor | None]]:
    """Padding of every kind that a length allows; the first row is always whole."""
    yield "none", None
    if T < 2:
        return
    lengths = torch.tensor([T, *((T * (B - row)) // (B + 1) for row in range(1, B))]).clamp(min=1)
    right = (torch.arange(T)[None] < lengths[:, None]).long()
    yield "right", right
    yield "left", right.flip(1)
    if T > 2:
        holes = torch.ones(B, T, dtype=torch.long)
        for row in range(1, B):
            holes[row, 1 + row % 2 :: 1 + row] = 0
        yield "holes", holes


def synthetic(config: Any, head: str = "") -> Iterator[Case]:
    """Random ids of every length, under every mask, in both segments; at the longest, whole and padded only."""
    random, longest = torch.Generator().manual_seed(0), config.max_position_embeddings
    for T in sorted({*(T for T in LENGTHS if T < longest), longest}):
        B = 1 if T == 1 else 2 if T == longest else 3
        shape = (B, 2, T) if head == "BertForMultipleChoice" else (B, T)
        ids = torch.randint(1, config.vocab_size, shape, generator=random)
        if T > 1:  # the last word, and the padding token where it is no padding
            ids[-1, ..., 0], ids[0, ..., -1] = config.vocab_size - 1, 0
        segments = torch.randint(config.type_vocab_size, shape, generator=random)
        for name, mask in masks(B, T):
            if T == longest and name not in ("none", "right"):
                continue
            inputs = {"input_ids": ids, "token_type_ids": segments}
            if mask is not None:
                inputs["attention_mask"] = mask if len(shape) == 2 else mask[:, None].repeat(1, 2, 1)
            yield Case(f"{T} tokens, mask {name}", inputs)
    yield Case(f"{T} tokens, ids alone, one row", {"input_ids": ids[:1]})


def encoded(texts: Sequence[str], tokenizer: Any, config: Any) -> Iterator[Case]:
    """Each text or pair alone, then all together, padded at the right."""
    pairs = [text.split("\t", 1) for text in texts]
    options = {"truncation": True, "max_length": config.max_position_embeddings, "return_tensors": "pt"}
    for number, pair in enumerate(pairs, 1):
        yield _case(f"text {number}", tokenizer(*pair, **options), tokenizer)
    singles, doubles = ([pair for pair in pairs if len(pair) == n] for n in (1, 2))
    for name, group in (("all texts", singles), ("all pairs", doubles)):
        if len(group) > 1:
            yield _case(name, tokenizer(*map(list, zip(*group, strict=True)), padding=True, **options), tokenizer)


def _case(name: str, encoding: Any, tokenizer: Any) -> Case:
    inputs = {key: encoding[key] for key in ("input_ids", "token_type_ids", "attention_mask")}
    asked = inputs["input_ids"] == tokenizer.mask_token_id
    return Case(name, inputs, asked if bool(asked.any()) else None, is_text=True)


def read_texts(file: str | Path | None) -> list[str]:
    """One text a line, a tab between the texts of a pair; the built-in ones for None. ValueError without any."""
    if file is None:
        return list(TEXTS)
    texts = [line for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    if not texts:
        raise ValueError(f"--texts {file}: no text in it")
    return texts


def labels_for(head: str, case: Case, config: Any) -> dict[str, Tensor]:
    """Labels that give this head a loss; none for an encoder, and none of padding."""
    if not head.startswith("BertFor"):
        return {}
    random = torch.Generator().manual_seed(1)
    B, T = len(next(iter(case.inputs.values()))), case.tokens

    def draw(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=random)

    words = torch.where(torch.rand(B, T, generator=random) < 0.5, draw(config.vocab_size, B, T), -100)
    words[0, 0], tags = 0, draw(config.num_labels, B, T)  # the padding token is a word like any other
    if case.real is not None and case.real.shape == words.shape:
        words, tags = (torch.where(case.real, each, -100) for each in (words, tags))
    labels = draw(config.num_labels, B)
    if config.num_labels == 1 or config.problem_type in ("regression", "multi_label_classification"):
        labels = draw(2, B, config.num_labels).float().squeeze(1)
    return {
        "BertForPreTraining": {"labels": words, "next_sentence_label": draw(2, B)},
        "BertForMaskedLM": {"labels": words},
        "BertForNextSentencePrediction": {"labels": draw(2, B)},
        "BertForSequenceClassification": {"labels": labels},
        "BertForTokenClassification": {"labels": tags},
        "BertForQuestionAnswering": {"start_positions": draw(T, B), "end_positions": draw(T, B)},
        "BertForMultipleChoice": {"labels": draw(2, B)},
    }.get(head, {})
