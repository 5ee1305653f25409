"""Every step of a forward pass, seen from outside: hooks on the modules, and a torch mode for what lies between them.

The line of code of each step is read off the running frames, so it is where the number came from, in minibert, in
transformers' twin or in whatever was put in place of a module.
"""

from __future__ import annotations

import difflib
import json
import linecache
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count, islice
from threading import get_ident
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minibert.model import attention_probabilities
from minibert.study.steps import Kind, kind_of, spell
from minibert.terminal import table

_TORCH = os.path.dirname(torch.__file__)
_A_STEP = re.compile(r"(bert\.)?encoder\.layer\.0\.attention\.self\.query")  # by which a BERT is known
# Functions between the modules that make a step, and the modules they do it in
_ADDITIONS = ("add", "__add__", "add_", "__iadd__")
_ATTENTION = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")  # the fused kernel's arguments
_LOSSES = ("cross_entropy", "mse_loss", "binary_cross_entropy_with_logits")


@dataclass(frozen=True)
class Source:
    """A line of code: `file` is the module's name as a path, `code` the exact expression."""

    file: str
    line: int
    code: str
    function: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(eq=False)
class Step:
    """One step: what it is, how much, where it stands, and the very tensor.

    flops counts matrix products, two a multiplication and addition; None where a foreign module hides them. bytes is
    the size of the result. params counts what the step itself holds, a tied parameter where it is first met. beside
    says that the model computes it inside a fused kernel, and that the tensor is from `attention_probabilities`.
    """

    name: str
    module: str
    equation: str
    letters: str
    numbers: str
    flops: int | None
    bytes: int
    params: int
    source: Source
    paper: str
    google: str
    beside: bool
    tensor: Tensor = field(repr=False)


@dataclass(eq=False)
class Trace:
    """The steps of one forward pass in order; `trace[name]` is a step's tensor, `trace.step(name)` the step.

    `output` is what the model returned, `sizes` the letters' values. `print(trace)` shows all steps.
    """

    model: str
    steps: list[Step]
    output: Any
    sizes: dict[str, int]

    def __post_init__(self) -> None:
        self._by_name = {step.name: step for step in self.steps}

    def step(self, name: str) -> Step:
        """The step of this name. Raises KeyError, which offers similar names."""
        if name not in self._by_name:
            near = difflib.get_close_matches(name, self._by_name, n=3, cutoff=0.4)
            raise KeyError(f"{name!r}: no such step; near it: {', '.join(near) or 'none'}")
        return self._by_name[name]

    def __getitem__(self, name: str) -> Tensor:
        return self.step(name).tensor

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __iter__(self) -> Iterator[Step]:
        return iter(self.steps)

    def __len__(self) -> int:
        return len(self.steps)

    def ending(self, *ends: str) -> list[Step]:
        """The steps whose names end so, the second run of a module included."""
        return [step for step in self.steps if step.name.partition("#")[0].endswith(ends)]

    @property
    def attentions(self) -> tuple[Tensor, ...]:
        """The attention weights of each layer, (B, H, T, T)."""
        return tuple(step.tensor for step in self.ending(".self.weights"))

    @property
    def states(self) -> tuple[Tensor, ...]:
        """What goes into the first layer and comes out of each, (B, T, D)."""
        ends = self.ending("embeddings.LayerNorm", ".output.LayerNorm")
        return tuple(step.tensor for step in ends if ".attention.output." not in step.name)

    @property
    def flops(self) -> int:
        """Of all steps whose number is known."""
        return sum(step.flops or 0 for step in self.steps)

    @property
    def params(self) -> int:
        return sum(step.params for step in self.steps)

    def save(self, file: str | os.PathLike[str]) -> None:
        """All tensors, exact, as safetensors; equations, shapes in letters and lines of code are its metadata."""
        from safetensors.torch import save_file

        from minibert.weights import files

        facts = {s.name: json.dumps([s.equation, s.letters, s.flops, str(s.source), s.source.code]) for s in self.steps}
        tensors = {s.name: s.tensor.detach().cpu().contiguous().clone() for s in self.steps}
        with files.replacing(file) as partial:
            save_file(tensors, partial, {"format": "pt", "model": self.model, **facts})

    def __str__(self) -> str:
        rows = [("step", "line", "letters", "numbers", "MFLOP", "params", "mean", "max |x|")]
        for s in self.steps:
            x = s.tensor.detach().float()
            flops = "?" if s.flops is None else f"{s.flops / 1e6:.2f}" if s.flops else ""
            params = f"{s.params:,}" if s.params else ""
            numbers = (f"{x.mean():.3f}", f"{x.abs().max():.3g}")
            rows.append((s.name, str(s.source), s.letters, s.numbers, flops, params, *numbers))
        sizes = " ".join(f"{letter}={size}" for letter, size in self.sizes.items())
        total = f"{len(self.steps)} steps, {self.flops / 1e6:,.2f} MFLOP in matrix products, {self.params:,} parameters"
        return "\n".join([f"{self.model}: {sizes}", *table(rows, right=(4, 5, 6, 7)), total])


def trace(
    model: nn.Module,
    inputs: Mapping[str, Any] | Tensor,
    grad: bool = False,
    given: Mapping[str, Tensor] | None = None,
    copies: bool = False,
) -> Trace:
    """Run `model` once and record every step; the output is, without `given`, that of a plain call to the bit.

    Args:
        model: any minibert model, transformers' BERT, or whatever has its names of modules; in training mode, dropout
            is applied and its results are steps.
        inputs: what the model is called with: a mapping of arguments, as the tokenizer gives, or input_ids.
        grad: record the graph too, and keep gradients: after `loss.backward()`, `trace[name].grad` is there.
        given: results of steps by name that the model is to go on with in place of its own, which are recorded: with
            all steps of another model, each step shows what it does itself to equal inputs. One of another shape is
            not used.
        copies: the model goes on with a copy of each result, so that one that changes tensors in place leaves those
            that are recorded, and those that are given, as they were made.

    Raises:
        TypeError: model has not BERT's modules by their names, or inputs is neither a mapping nor a tensor.
        ValueError: the model is compiled or optimized, so its steps cannot be seen; or the model refuses the inputs.
        RuntimeError: the model changes tensors in place after they are made, and there are no `copies`.
    """
    check_model(model)
    if not isinstance(inputs, Mapping | Tensor):
        raise TypeError(f"inputs must be a mapping of arguments or the tensor input_ids, got {type(inputs).__name__}")
    arguments = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    recorder = _Recorder(model, grad, given or {}, copies)
    with ExitStack() as stack:
        for module in recorder.names:
            stack.callback(module.register_forward_pre_hook(recorder.enter).remove)
            stack.callback(module.register_forward_hook(recorder.leave, always_call=True).remove)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(grad))
        with recorder:
            output = model(**arguments)
    return recorder.finish(output)


def check_model(model: nn.Module) -> None:
    """Raise TypeError or ValueError, as `trace` does, unless the steps of this model can be seen."""
    kind = type(model).__name__
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a BERT of minibert or transformers, got {kind}")
    for name, module in model.named_modules():
        compiled = getattr(module, "_compiled_call_impl", None) or hasattr(module.forward, "_torchdynamo_orig_callable")
        if compiled or isinstance(module, torch.jit.ScriptModule) or type(module).__name__ == "OptimizedModule":
            what = f"{kind} is" if not name else f"{name} in this {kind} is"
            raise ValueError(f"model: {what} compiled, its steps cannot be seen; trace the plain model")
    bases = type(model).__mro__
    if any(base.__name__ == "OptimizedModel" for base in bases):
        raise ValueError(f"model: {kind} is optimized, its steps are fused; trace the plain model, `.model`")
    if not any(_A_STEP.fullmatch(name) for name, _ in model.named_modules()):
        raise TypeError(f"model must be a BERT, with the names of its modules, got {kind}; is there one inside it?")
    if getattr(getattr(model, "config", None), "is_decoder", False):
        raise ValueError("model: is_decoder=True is not BERT's encoder")


class _Recorder(TorchFunctionMode):
    """Collects steps while the model runs: hooks say which module is running and what it returned, torch's function
    mode sees additions, attention and losses between them. Nothing is changed on the way.
    """

    def __init__(self, model: nn.Module, grad: bool, given: Mapping[str, Tensor], copies: bool):
        super().__init__()
        self.model, self.grad, self.given, self.copies = model, grad, given, copies
        self.names = {module: name for name, module in model.named_modules()}
        self.running, self.thread = [model], get_ident()
        self.made: dict[str, tuple[Step, Kind, torch.Size, int | None]] = {}
        self.counted: set[Tensor] = set()  # parameters that are some step's already
        self.product: tuple[torch.Size, int, Source] | None = None  # the last one that may be scores
        self.beside = False  # what runs now is no part of the model

    def enter(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if get_ident() == self.thread:  # hooks run for whoever calls the model meanwhile, in another thread
            self.running.append(module)

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Tensor | None:
        if get_ident() != self.thread:
            return None
        self.running.pop()
        name = self.names[module]
        idle = isinstance(module, nn.Dropout) and not (module.training and module.p)
        if isinstance(output, Tensor) and not idle and (not [*module.children()] or kind_of(name).equation):
            enters = next((x.shape for x in args if isinstance(x, Tensor)), output.shape)
            return self.add(name, enters, output, _flops(module, output), module)
        return None

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        where = self.names[self.running[-1]]
        in_place = isinstance(output, Tensor) and bool(args) and output is args[0]
        if in_place and output._base is not None and output.numel() < output._base.numel():
            return output  # a part of what will be a step
        if name in _ADDITIONS and isinstance(output, Tensor) and output.is_floating_point():
            if where.endswith("embeddings"):
                step = "sum" if f"{where}.words_and_segments" in self.made else "words_and_segments"
                return self.add(f"{where}.{step}", output.shape, output, in_place=in_place)
            if where.endswith("output"):
                return self.add(f"{where}.residual", output.shape, output, in_place=in_place)
        elif name == "scaled_dot_product_attention":
            return self._fused(where, output, {**dict(zip(_ATTENTION, args, strict=False)), **(kwargs or {})})
        elif name in ("matmul", "__matmul__", "softmax") and where.endswith("self"):
            return self._plain(where, name, args[0], output)
        elif name in _LOSSES:
            self.add(f"{where}.{name}".lstrip("."), args[0].shape, output)
        return output

    def _fused(self, where: str, output: Tensor, given: Mapping[str, Any]) -> Tensor:
        """The fused kernel: what it keeps to itself is computed beside it, from the same query and key."""
        if given.get("is_causal"):
            raise ValueError("model: its attention is causal, which BERT's is not")
        query, key = given["query"], given["key"]
        if query.ndim == 4:
            self.beside = True
            with torch.no_grad(), self:
                attention_probabilities(query, key, given.get("attn_mask"))
            self.beside = False
        enters = torch.Size((*query.shape[:-1], key.shape[-2]))
        return self.add(f"{where}.context", enters, output, 2 * query.numel() * key.shape[-2])

    def _plain(self, where: str, name: str, given: Tensor, output: Tensor) -> Tensor:
        """Attention by plain products, as transformers' eager is: scores, their softmax, then weights times values."""
        source = source_of(sys._getframe())
        if source.function == attention_probabilities.__name__ and not self.beside:
            return output  # maps that were asked for beside the fused kernel; they are steps already
        if name == "softmax":
            if self.product is not None:
                enters, flops, line = self.product
                self.add(f"{where}.scores", enters, given, flops, source=line)
            return self.add(f"{where}.weights", output.shape, output)
        flops = 2 * given.numel() * output.shape[-1]
        if next(reversed(self.made), "").startswith(f"{where}.weights"):
            return self.add(f"{where}.context", given.shape, output, flops)
        self.product = (given.shape, flops, source)
        return output

    def add(
        self,
        name: str,
        enters: torch.Size,
        tensor: Tensor,
        flops: int | None = 0,
        module: nn.Module | None = None,
        source: Source | None = None,
        in_place: bool = False,
    ) -> Tensor:
        """One more step, of a module or between modules; returns what the model is to go on with.

        in_place: the model may hold the tensor itself, and go on with that.
        """
        if name in self.made:
            name = next(new for n in count(2) if (new := f"{name}#{n}") not in self.made)
        if self.grad and tensor.requires_grad and not tensor.is_leaf:
            tensor.retain_grad()
        new = set(module.parameters(recurse=False)) - self.counted if module is not None else set()
        self.counted |= new
        own = tensor.clone() if in_place and self.copies else tensor
        activation = getattr(getattr(self.model, "config", None), "hidden_act", "gelu")
        kind = kind_of(name, activation if isinstance(activation, str) else "activation")
        step = Step(
            name=name,
            module=self.names[self.running[-1] if module is None else module],
            equation=kind.equation,
            letters="",
            numbers=f"{tuple(enters)} -> {tuple(tensor.shape)}",
            flops=flops,
            bytes=tensor.nbytes,
            params=sum(p.numel() for p in new),
            source=source or source_of(sys._getframe()),
            paper=kind.paper,
            google=kind.google,
            beside=self.beside,
            tensor=own,
        )
        self.made[name] = (step, kind, enters, None if own.is_inference() else own._version)
        if self.beside:
            return tensor
        given = self.given.get(name, tensor)
        goes_on = given if given.shape == tensor.shape else tensor
        if own is not tensor:
            return tensor.copy_(goes_on)
        return goes_on.clone() if self.copies else goes_on

    def finish(self, output: Any) -> Trace:
        """All steps, with their shapes in letters, of which the values are known now."""
        sizes = self._sizes()
        for step, kind, enters, version in self.made.values():
            if version is not None and step.tensor._version != version:
                raise RuntimeError("the model changes tensors in place after they are made: their values are lost")
            step.letters = f"{spell(enters, kind.enters, sizes)} -> {spell(step.tensor.shape, kind.leaves, sizes)}"
        return Trace(type(self.model).__name__, [step for step, *_ in self.made.values()], output, sizes)

    def _sizes(self) -> dict[str, int]:
        norms = (step.tensor.shape for name, (step, *_) in self.made.items() if name.endswith("embeddings.LayerNorm"))
        sizes = dict(zip("BTD", next(norms, (1, 1, 1)), strict=False))
        if (config := getattr(self.model, "config", None)) is None:
            return sizes
        D, H = config.hidden_size, config.num_attention_heads
        sizes |= {"D": D, "H": H, "K": D // H, "F": config.intermediate_size}
        return {**sizes, "V": config.vocab_size, "L": config.num_labels}


def _flops(module: nn.Module, output: Tensor) -> int | None:
    """Of the matrix product inside a module: nothing for one without, None where it is not known."""
    if isinstance(module, nn.Linear):
        return 2 * output.numel() * module.in_features
    known = isinstance(module, nn.Embedding | nn.LayerNorm) or not [*module.parameters()] or [*module.children()]
    return 0 if known else None


def source_of(frame: FrameType | None) -> Source:
    """The innermost running line outside torch and this file."""
    while frame is not None and (frame.f_code.co_filename.startswith(_TORCH) or frame.f_code.co_filename == __file__):
        frame = frame.f_back
    if frame is None:
        return Source("?", 0, "", "")
    file = f"{frame.f_globals.get('__name__', '?').replace('.', '/')}.py"
    code = linecache.getline(frame.f_code.co_filename, frame.f_lineno).strip()
    i = frame.f_lasti // 2
    line, end_line, start, end = next(islice(frame.f_code.co_positions(), i, i + 1))
    if None not in (line, end_line, start, end):
        text = [linecache.getline(frame.f_code.co_filename, n).encode() for n in range(line, end_line + 1)]
        text[-1] = text[-1][:end]
        text[0] = text[0][start:]
        code = " ".join(b" ".join(text).decode().split()) or code
    return Source(file, frame.f_lineno, code, frame.f_code.co_name)
