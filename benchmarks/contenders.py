"""Everything people would run BERT's encoder with instead, at its best honest settings, on the same weights.

Each is a function from input_ids and attention_mask, (B, T) tensors, to the last hidden state (B, T, D). Exported
models are kept in a cache directory: exporting takes half a minute.
"""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import minibert

Run = Callable[[Tensor, Tensor], Tensor]

CACHE = Path(tempfile.gettempdir()) / "minibert-benchmarks"
# Allowed distance from transformers in float32; None: reported, not bounded
TOLERANCE = {"float32": 1e-5, "bf16": None, "int8": None}


def bert_base(seed: int = 0) -> transformers.BertModel:
    """bert-base in shape, with random weights: the time depends on the shape alone."""
    torch.manual_seed(seed)
    model = transformers.BertModel(transformers.BertConfig(), add_pooling_layer=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.02)
    return model


def ours(reference: transformers.BertModel) -> minibert.BertModel:
    """minibert's model on the reference's weights."""
    model = minibert.BertModel(
        minibert.BertConfig.from_dict(reference.config.to_dict()), add_pooling_layer=False
    ).eval()
    model.load_state_dict(reference.state_dict())
    return model


def no_grad(model: Callable[..., Any]) -> Run:
    """A torch model as a contender."""

    @torch.no_grad()
    def run(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return model(input_ids, attention_mask=attention_mask)[0]

    return run


def with_attention(reference: transformers.BertModel, kind: str) -> transformers.BertModel:
    """The same model with another attention of transformers."""
    config = transformers.BertConfig(**reference.config.to_dict())
    config._attn_implementation = kind
    model = transformers.BertModel(config, add_pooling_layer=False).eval()
    model.load_state_dict(reference.state_dict())
    return model


class _Export(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(input_ids, attention_mask, return_dict=False)[0]


def onnx_file(reference: transformers.BertModel) -> Path:
    """transformers' model as ONNX, with free batch and length."""
    shape = f"{reference.config.num_hidden_layers}x{reference.config.hidden_size}"
    weight = reference.embeddings.word_embeddings.weight
    file = CACHE / f"bert-{shape}-{float(weight.double().sum()):.6f}.onnx"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        ids = torch.randint(0, reference.config.vocab_size, (2, 16))
        mask = torch.ones_like(ids)
        mask[1, 9:] = 0
        free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=512)}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(_Export(reference), (ids, mask), file, input_names=["input_ids", "attention_mask"],
                              output_names=["out"], dynamo=True, verbose=False,
                              dynamic_shapes={"input_ids": free, "attention_mask": free})  # fmt: skip
    return file


def onnxruntime_float32(reference: transformers.BertModel) -> Run:
    """All of ONNX Runtime's own graph optimizations, which beat its separate BERT optimizer on this graph."""
    return _session(onnx_file(reference))


def onnxruntime_int8(reference: transformers.BertModel) -> Run:
    """Dynamic quantization, weights per channel."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    file = onnx_file(reference)
    quantized = file.with_suffix(".int8.onnx")
    if not quantized.exists():
        quantize_dynamic(file, quantized, weight_type=QuantType.QInt8, per_channel=True)
    return _session(quantized)


def _session(file: Path) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])

    def run(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        inputs = {"input_ids": input_ids.numpy(), "attention_mask": attention_mask.numpy()}
        return torch.from_numpy(session.run(None, inputs)[0])

    return run


def openvino(reference: transformers.BertModel, precision: str) -> Run:
    """precision: f32 or bf16."""
    import openvino

    settings = {
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": precision,
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.Core().compile_model(str(onnx_file(reference)), "CPU", settings)

    def run(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return torch.from_numpy(compiled([input_ids.numpy(), attention_mask.numpy()])[0].copy())

    return run


def ctranslate2_float32(reference: transformers.BertModel) -> Run:
    """CTranslate2's encoder; it takes lengths, so padding must be on the right."""
    import ctranslate2
    import numpy

    folder = CACHE / "ctranslate2"
    if not folder.exists():
        source = CACHE / "transformers"
        reference.save_pretrained(source)
        transformers.BertTokenizer(vocab={str(i): i for i in range(reference.config.vocab_size)}).save_pretrained(
            source
        )
        ctranslate2.converters.TransformersConverter(str(source)).convert(str(folder))
    encoder = ctranslate2.Encoder(str(folder), compute_type="float32", intra_threads=torch.get_num_threads())

    def run(input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        ids = ctranslate2.StorageView.from_array(input_ids.numpy().astype(numpy.int32))
        lengths = ctranslate2.StorageView.from_array(attention_mask.sum(1).numpy().astype(numpy.int32))
        return torch.from_numpy(numpy.array(encoder.forward_batch(ids, lengths).last_hidden_state))

    return run


BUILDERS: dict[str, tuple[str, Callable[[transformers.BertModel], Run]]] = {
    "minibert": ("float32", lambda reference: no_grad(minibert.optimize(ours(reference)))),
    "minibert bf16": ("bf16", lambda reference: no_grad(minibert.optimize(ours(reference), "bfloat16"))),
    "minibert int8": ("int8", lambda reference: no_grad(minibert.optimize(ours(reference), "int8"))),
    "minibert, plain model": ("float32", lambda reference: no_grad(ours(reference))),
    "transformers": ("float32", no_grad),
    "transformers eager": ("float32", lambda reference: no_grad(with_attention(reference, "eager"))),
    "transformers compiled": ("float32", lambda reference: no_grad(torch.compile(reference, dynamic=True))),
    "transformers bf16": ("bf16", lambda reference: no_grad(with_attention(reference, "sdpa").bfloat16())),
    "onnxruntime": ("float32", onnxruntime_float32),
    "onnxruntime int8": ("int8", onnxruntime_int8),
    "openvino": ("float32", lambda reference: openvino(reference, "f32")),
    "openvino bf16": ("bf16", lambda reference: openvino(reference, "bf16")),
    "ctranslate2": ("float32", ctranslate2_float32),
}


def build(names: list[str], reference: transformers.BertModel) -> dict[str, Run]:
    """The named contenders; those that cannot be had here are named and left out."""
    runs = {}
    for name in names:
        try:
            runs[name] = BUILDERS[name][1](reference)
        except Exception as problem:  # a missing package, a model it cannot load: say so and go on
            print(f"without {name}: {type(problem).__name__}: {str(problem).splitlines()[0][:160]}")
    return runs
