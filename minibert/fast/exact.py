"""What the fast path may compute in a model's place: a model it knows to the last module, and that has not changed.

The fast path reads weights and calls no module. A hook, an adapter in a layer's place, a subclass with a `forward` of
its own would be passed over without a word. So what is not known exactly is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import repeat
from math import gcd
from operator import attrgetter, contains, is_
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from minibert import heads, model
from minibert.activations import Activation

_RESIDUAL = {"dense": nn.Linear, "LayerNorm": nn.LayerNorm, "dropout": nn.Dropout}
_CLASSIFIER = {"bert": model.BertModel, "dropout": nn.Dropout, "classifier": nn.Linear}

# Each class and the modules that it is made of
PARTS: dict[type, dict[str, type]] = {
    nn.Linear: {},
    nn.LayerNorm: {},
    nn.Embedding: {},
    nn.Dropout: {},
    nn.Tanh: {},
    Activation: {},
    model.BertEmbeddings: {
        "word_embeddings": nn.Embedding,
        "position_embeddings": nn.Embedding,
        "token_type_embeddings": nn.Embedding,
        "LayerNorm": nn.LayerNorm,
        "dropout": nn.Dropout,
    },
    model.BertSelfAttention: {"query": nn.Linear, "key": nn.Linear, "value": nn.Linear, "dropout": nn.Dropout},
    model.BertResidualOutput: _RESIDUAL,
    model.BertAttention: {"self": model.BertSelfAttention, "output": model.BertResidualOutput},
    model.BertIntermediate: {"dense": nn.Linear, "intermediate_act_fn": Activation},
    model.BertLayer: {
        "attention": model.BertAttention,
        "intermediate": model.BertIntermediate,
        "output": model.BertResidualOutput,
    },
    model.BertEncoder: {"layer": nn.ModuleList},
    model.BertPooler: {"dense": nn.Linear, "activation": nn.Tanh},
    model.BertModel: {"embeddings": model.BertEmbeddings, "encoder": model.BertEncoder, "pooler": model.BertPooler},
    heads.BertPredictionHeadTransform: {
        "dense": nn.Linear,
        "transform_act_fn": Activation,
        "LayerNorm": nn.LayerNorm,
    },
    heads.BertLMPredictionHead: {"transform": heads.BertPredictionHeadTransform, "decoder": nn.Linear},
    heads.BertOnlyMLMHead: {"predictions": heads.BertLMPredictionHead},
    heads.BertOnlyNSPHead: {"seq_relationship": nn.Linear},
    heads.BertPreTrainingHeads: {"predictions": heads.BertLMPredictionHead, "seq_relationship": nn.Linear},
    heads.BertForMaskedLM: {"bert": model.BertModel, "cls": heads.BertOnlyMLMHead},
    heads.BertForNextSentencePrediction: {"bert": model.BertModel, "cls": heads.BertOnlyNSPHead},
    heads.BertForPreTraining: {"bert": model.BertModel, "cls": heads.BertPreTrainingHeads},
    heads.BertForSequenceClassification: _CLASSIFIER,
    heads.BertForTokenClassification: _CLASSIFIER,
    heads.BertForMultipleChoice: _CLASSIFIER,
    heads.BertForQuestionAnswering: {"bert": model.BertModel, "qa_outputs": nn.Linear},
}
# The parameters of a class's own
PARAMETERS: dict[type, tuple[str, ...]] = {
    nn.Linear: ("weight", "bias"),
    nn.LayerNorm: ("weight", "bias"),
    nn.Embedding: ("weight",),
    heads.BertLMPredictionHead: ("bias",),
}
# What else the forward of a class reads of a module
SETTINGS: dict[type, tuple[str, ...]] = {
    nn.LayerNorm: ("eps",),
    nn.Embedding: ("max_norm",),
    Activation: ("name",),
    model.BertSelfAttention: ("attention_head_size",),
}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_GLOBAL_HOOKS = [getattr(nn.modules.module, f"_global{name}") for name in _HOOKS]


def _count_step(optimizer: torch.optim.Optimizer, *unused: Any) -> None:
    """Count what an optimizer changed as torch counts other changes in place, which its fused kernels leave out."""
    if not torch.compiler.is_compiling():  # a compiled step counts
        groups = optimizer.param_groups
        torch.autograd.graph.increment_version([x for group in groups for x in group["params"] if x.grad is not None])


register_optimizer_step_post_hook(_count_step)


def check_exact(plain: nn.Module) -> None:
    """Raises TypeError, naming the module, unless `plain` is a model of minibert with nothing put in, on or around."""
    for name, fault in _faults(plain):
        where = f"{type(plain).__name__}.{name}" if name else type(plain).__name__
        raise TypeError(f"optimize: {where} {fault}, which the fast path would pass over")


def _faults(plain: nn.Module) -> Iterator[tuple[str, str]]:
    """(module's or parameter's name, what is unknown about it)"""
    if type(plain) not in PARTS or not isinstance(plain, model.BertPreTrainedModel):
        yield "", "is not one of minibert's models but a class of its own"
    for hooks in _GLOBAL_HOOKS:
        if hooks:
            yield "", "would run under a hook on all modules (torch.nn.modules.module.register_module_forward_hook)"
    seam = model.attention
    if (seam.__module__, seam.__qualname__) != (model.__name__, "attention"):
        yield "", f"would compute with another attention ({seam.__module__}.{seam.__qualname__})"
    for name, module in plain.named_modules(remove_duplicate=False):
        yield from ((name, fault) for fault in _module_faults(module))
        if type(module) is nn.Dropout and module.p and module.training and not plain.training:
            yield name, "drops out, in train mode inside a model in eval mode"
    held = dict(plain.named_parameters())
    dtype, device = next(iter(held.values())).dtype, next(iter(held.values())).device
    for name, parameter in held.items():
        if type(parameter) is not nn.Parameter:
            yield name, f"is a {type(parameter).__name__}, not a plain parameter"
        if (parameter.dtype, parameter.device) != (dtype, device):
            yield name, f"is {parameter.dtype} on {parameter.device}, where other parameters are {dtype} on {device}"


def _module_faults(module: nn.Module) -> Iterator[str]:
    kind = type(module)
    if kind is nn.ModuleList:
        expected = dict.fromkeys(module._modules, model.BertLayer)
    elif kind in PARTS:
        expected = PARTS[kind]
    else:
        yield f"is a {kind.__module__}.{kind.__qualname__}"
        return
    if any(getattr(module, hooks) for hooks in _HOOKS):
        yield "has a forward hook"
    if "forward" in vars(module):
        yield "has a forward of its own"
    forward = kind.forward
    if kind is not nn.ModuleList and forward.__module__ != kind.__module__ and forward.__module__ != heads.__name__:
        yield f"is of a class whose forward was replaced by {forward.__module__}.{forward.__qualname__}"
    for name, child in module._modules.items():
        if name not in expected:
            yield f"has a part {name!r} that is not BERT's"
        elif type(child) is not expected[name]:
            yield f"has a {type(child).__module__}.{type(child).__qualname__} as {name!r}"
    absent = [name for name in expected if name not in module._modules and name != "pooler"]
    if absent:
        yield f"has no {absent[0]!r}"
    own = PARAMETERS.get(kind, ())
    for name, parameter in (*module._parameters.items(), *module._buffers.items()):
        if name not in own:
            yield f"has a parameter or buffer {name!r} that is not BERT's"
        elif parameter is None:
            yield f"has no {name!r}"
    if kind is nn.Embedding and module.max_norm is not None:
        yield "limits the norm of its rows (max_norm)"


class Held:
    """What a model held when it was optimized: `change` tells whether it still does.

    It is asked before every call, when a short text's whole pass takes some milliseconds and has swept the caches: so
    it reads what lies in dicts and tensors directly, in loops that are not Python's.
    """

    def __init__(self, plain: nn.Module):
        modules = list(plain.modules())
        self.modules, self.kinds, self.seam = modules, list(map(type, modules)), model.attention
        self.classes = {kind: kind.forward for kind in {type(m) for m in modules} if kind is not nn.ModuleList}
        self.attributes = [vars(module) for module in modules]
        self.settings = _Entries([(vars(m), name) for m in modules for name in SETTINGS.get(type(m), ())])
        self.hooks = [getattr(module, name) for module in modules for name in _HOOKS] + _GLOBAL_HOOKS
        self.tables = [table for module in modules for table in (module._modules, module._parameters)]
        self.items = _Entries([(table, name) for table in self.tables for name in table])
        self.things = self.items.values()
        self.tensors = [thing for thing in self.things if isinstance(thing, Tensor)]
        self.counted = [tensor for tensor in self.tensors if not tensor.is_inference()]  # those keep no count
        self.state = self._state()
        # Where torch counts nothing, as of `.data` and numpy (PEFT merges adapters so), some numbers tell
        self.samples = _Samples(self.tensors)
        self.sampled = self.samples.read()

    def _state(self) -> tuple[list, ...]:
        tensors = self.tensors
        return (
            list(map(attrgetter("_version"), self.counted)),
            list(map(attrgetter("dtype"), tensors)),
            list(map(Tensor.data_ptr, tensors)),
            self.settings.values(),
        )

    def change(self) -> str:
        """What has changed, or "". Of edits through `.data`, in place, those are seen that change most of a tensor."""
        if sum(map(len, self.tables)) != len(self.things) or not all(map(is_, self.items.values(), self.things)):
            return "a parameter or module was replaced"
        if self._state() != self.state:
            return "parameters were changed"
        if not torch.compiler.is_compiling() and self.samples.read() != self.sampled:
            return "parameters were changed"
        if list(map(type, self.modules)) != self.kinds or model.attention is not self.seam:
            return "a class was replaced"
        if any(self.hooks):
            return "a hook was registered"
        if any(map(contains, self.attributes, repeat("forward"))):
            return "a forward was replaced"
        if not all(map(is_, map(attrgetter("forward"), self.classes), self.classes.values())):
            return "a class's forward was replaced"
        return ""


class _Entries:
    """Entries of dicts, read at once."""

    def __init__(self, entries: list[tuple[dict[str, Any], str]]):
        self.tables, self.names = [table for table, _ in entries], [name for _, name in entries]

    def values(self) -> list[Any]:
        """What each holds now, None where it is gone."""
        return list(map(dict.get, self.tables, self.names))


class _Samples:
    """Some four numbers of each plain tensor in the CPU's memory, read at once: an array for each took twice as long.

    They are read out of one array over all memory from the first to the last, in units so large that steps are few.
    """

    def __init__(self, tensors: list[Tensor]):
        tensors = [x for x in tensors if type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu" and x.numel() > 0
                   and x.layout == torch.strided and x.is_contiguous() and x.is_floating_point()]  # fmt: skip
        # These keep the memory
        self.held = [x.detach().view(-1).view(torch.uint8).numpy() for x in tensors] or [np.zeros(8, np.uint8)]
        starts = [array.ctypes.data for array in self.held]
        first = min(starts)
        unit = gcd(8, *(x.element_size() for x in tensors), *starts)  # fits addresses, or numpy would copy it all
        places = [np.zeros(1, np.int64)]  # in bytes
        for x, start in zip(tensors, starts, strict=False):
            numbers = np.arange(0, x.numel(), max(1, x.numel() // 4))[:, None] * x.element_size()
            places.append((start - first + numbers + np.arange(0, x.element_size(), unit)).ravel())
        self.places = np.concatenate(places) // unit
        size, lowest = (int(self.places.max()) + 1) * unit, self.held[starts.index(first)]
        self.memory = np.lib.stride_tricks.as_strided(lowest, (size,), writeable=False).view(f"u{unit}")

    def read(self) -> bytes:
        """Their bits, since NaN differs from itself."""
        return self.memory.take(self.places).tobytes()


__all__ = ["Held", "check_exact"]
