"""The implementations that can be compared: minibert's two paths, transformers, ONNX Runtime, OpenVINO, a file."""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minibert.parity.comparison import Side
from minibert.parity.inputs import Case

PEERS = ("transformers", "transformers-eager", "onnxruntime", "openvino")
PATHS = ("plain", "fast")


def fresh(model: nn.Module) -> nn.Module:
    """Each parameter in memory of its own, row after row: bits depend on where a loader leaves the weights."""
    for parameter in model.parameters():
        parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
    return model


def ours(kind: type, source: Any, path: str, dtype: str, **options: Any) -> Side:
    """Minibert's own loader and one of its paths; "int8" is one of the fast path alone."""
    from minibert.fast import optimize

    own = "float32" if dtype == "int8" else dtype
    model = fresh(kind.from_pretrained(source, dtype=own, **options))
    name = f"minibert {path} {dtype}"
    if path == "plain":
        if dtype == "int8":
            raise ValueError("--dtype int8 is computed by --path fast alone")
        return Side(name, model, model.dtype)
    fast = optimize(model, None if dtype == own else dtype)
    return Side(name, fast, torch.bfloat16 if dtype == "int8" else model.dtype)


def theirs(spec: str, kind: type, directory: Path, dtype: str, cases: list[Case], **options: Any) -> Side:
    """A peer on the same checkpoint, by its own loader. Raises ImportError if it is not installed."""
    dtype = "float32" if dtype == "int8" or spec in ("onnxruntime", "openvino") else dtype
    try:
        import transformers
    except ImportError:
        raise ImportError(f"--against {spec}: needs transformers, pip install 'minibert-torch[parity]'; or give a file "
                          "that was written with --save") from None  # fmt: skip
    attention = "eager" if spec == "transformers-eager" else "sdpa"
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    model, info = getattr(transformers, kind.__name__).from_pretrained(
        directory, dtype=getattr(torch, dtype), attn_implementation=attention, output_loading_info=True,
        local_files_only=True, **options,
    )  # fmt: skip
    if info["missing_keys"]:
        raise ValueError(f"transformers finds weights missing: {', '.join(sorted(info['missing_keys']))}")
    model = fresh(model.eval())
    if spec.startswith("transformers"):
        return Side(f"{spec} {transformers.__version__} {dtype}", model, model.dtype)
    run = _onnxruntime if spec == "onnxruntime" else _openvino
    try:
        return run(_exported(model, cases[0]))
    except ImportError as error:
        raise ImportError(f"--against {spec}: {error}; pip install 'minibert-torch[parity]'") from None


class _Export(nn.Module):
    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor) -> tuple[Tensor, ...]:
        output = self.model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        return tuple(output[name] for name in output)


def _exported(model: nn.Module, case: Case) -> tuple[bytes, list[str]]:
    """Transformers' model as ONNX with free batch and length, and the names of its outputs."""
    ids = torch.ones(2, *case.inputs["input_ids"].shape[1:-1], 16, dtype=torch.long)
    mask = ids.clone()
    mask[1, ..., 9:] = 0
    longest = model.config.max_position_embeddings
    free = {0: torch.export.Dim("batch"), ids.ndim - 1: torch.export.Dim("length", max=longest)}
    with torch.no_grad(), warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder:
        warnings.simplefilter("ignore")
        names = list(model(ids, attention_mask=mask))
        arguments = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        file = Path(folder) / "model.onnx"
        torch.onnx.export(_Export(model), tuple(arguments.values()), file, input_names=list(arguments), dynamo=True,
                          output_names=names, verbose=False, dynamic_shapes=dict.fromkeys(arguments, free),
                          external_data=False)  # fmt: skip
        return file.read_bytes(), names


def _arrays(arguments: dict[str, Tensor]) -> dict[str, Any]:
    ids = arguments["input_ids"]
    given = {"attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids), **arguments}
    return {name: tensor.numpy() for name, tensor in given.items()}


def _onnxruntime(exported: tuple[bytes, list[str]]) -> Side:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(exported[0], options, providers=["CPUExecutionProvider"])

    def run(**arguments: Tensor) -> dict[str, Tensor]:
        return dict(zip(exported[1], map(torch.from_numpy, session.run(None, _arrays(arguments))), strict=True))

    return Side(f"onnxruntime {onnxruntime.__version__} float32", run)


def _openvino(exported: tuple[bytes, list[str]]) -> Side:
    import openvino

    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "INFERENCE_PRECISION_HINT": "f32"}
    core = openvino.Core()
    compiled = core.compile_model(core.read_model(exported[0]), "CPU", settings)

    def run(**arguments: Tensor) -> dict[str, Tensor]:
        results = compiled(_arrays(arguments))
        return {name: torch.from_numpy(results[i].copy()) for i, name in enumerate(exported[1])}

    return Side(f"openvino {openvino.__version__.split('-')[0]} float32", run)


def golden(file: str) -> tuple[Side, list[Case]]:
    """Results from a file, and the inputs they are for: safetensors as `--save` writes them, or lines of JSON with
    "tokens" and "logits", as other tools' golden logits are.

    Raises OSError if it cannot be read, ValueError if it holds nothing of the kind.
    """
    if Path(file).suffix in (".jsonl", ".json"):
        tensors = _lines(file)
    else:
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            tensors = load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file} is no safetensors file: {error}") from None
    cases = []
    for number in sorted({int(name.split(".")[0]) for name in tensors if name.split(".")[0].isdigit()}):
        parts = {name.partition(".")[2]: x for name, x in tensors.items() if name.startswith(f"{number}.")}
        inputs = {name: x for name, x in parts.items() if not x.is_floating_point() and x.dtype != torch.bool}
        if "input_ids" not in inputs or len(inputs) == len(parts):
            raise ValueError(f"{file}: {number}.input_ids or the results for it are missing")
        cases.append(Case(f"{Path(file).name} {number}", inputs))
    if not cases:
        raise ValueError(f"{file} holds no golden results: they are named 0.input_ids, 0.logits, ...")
    floats = {x.dtype for x in tensors.values() if x.is_floating_point()}
    dtype = max(floats, key=lambda each: torch.finfo(each).eps)
    return Side(f"{Path(file).name} {str(dtype).removeprefix('torch.')}", None, dtype, tensors), cases


def _lines(file: str) -> dict[str, Tensor]:
    tensors = {}
    for number, line in enumerate(line for line in Path(file).read_text().splitlines() if line.strip()):
        try:
            entry = json.loads(line)
            ids, logits = torch.tensor(entry["tokens"]), torch.tensor(entry["logits"], dtype=torch.float32)
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file}, line {number + 1}: needs numbers in tokens and logits ({error})") from None
        tensors[f"{number}.input_ids"] = ids.view(1, -1)
        tensors[f"{number}.logits"] = logits[None] if logits.ndim == 2 else logits.view(1, *logits.shape)
    return tensors


def save(file: str, side: Side, cases: list[Case], facts: dict[str, str]) -> None:
    """Inputs and results of every case as `golden` reads them, with `facts` as the file's metadata."""
    from safetensors.torch import save_file

    tensors = {}
    for number, case in enumerate(cases):
        parts = {**case.inputs, **side.outputs(case)}
        tensors |= {f"{number}.{name}": x.contiguous().clone() for name, x in parts.items()}
    save_file(tensors, file, {"format": "pt", **facts})
