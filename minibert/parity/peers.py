"""The implementations that can be compared: minibert's two paths, transformers, ONNX Runtime, OpenVINO, a file."""

from __future__ import annotations

import json
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minibert.parity.inputs import Case
from minibert.parity.sides import Side, coarsest, numbered
from minibert.weights.convert import aligned

_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds")  # all else is a result
PEERS = ("transformers", "transformers-eager", "onnxruntime", "openvino")


def ours(kind: type, source: Any, path: str, dtype: str, **options: Any) -> Side:
    """Minibert's own loader and one of its paths; "int8" is one of the fast path alone."""
    from minibert.fast import optimize

    own = "float32" if dtype == "int8" else dtype
    model, name = aligned(kind.from_pretrained(source, dtype=own, **options)), f"minibert {path} {dtype}"
    if path == "plain":
        return Side(name, model, model.dtype)
    fast = optimize(model, None if dtype == own else dtype)
    return Side(name, fast, torch.bfloat16 if dtype == "int8" else model.dtype)


def theirs(spec: str, kind: type, directory: Path, dtype: str, case: Case, **options: Any) -> Side:
    """A peer on the same checkpoint, by its own loader. Raises ImportError if it is not installed."""
    try:
        transformers, runtime = import_module("transformers"), import_module(spec.removesuffix("-eager"))
        dtype = "float32" if dtype == "int8" or spec in ("onnxruntime", "openvino") else dtype
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        model, info = getattr(transformers, kind.__name__).from_pretrained(
            directory, dtype=getattr(torch, dtype), output_loading_info=True, local_files_only=True,
            attn_implementation="eager" if spec == "transformers-eager" else "sdpa", **options,
        )  # fmt: skip
        if info["missing_keys"]:
            raise ValueError(f"transformers finds weights missing: {', '.join(sorted(info['missing_keys']))}")
        run: Any = aligned(model.eval())
        if runtime is not transformers:
            run = _Graph(spec, runtime, run, case)
    except ImportError as error:
        raise ImportError(f"--against {spec}: {error}; pip install 'minibert-torch[parity]', or give a file that was "
                          "written with --save") from None  # fmt: skip
    return Side(f"{spec} {runtime.__version__.split('-')[0]} {dtype}", run, model.dtype)


class _Graph:
    """Transformers' model as ONNX with free batch and length, run by ONNX Runtime or OpenVINO."""

    def __init__(self, spec: str, runtime: Any, model: nn.Module, case: Case):
        ids = torch.ones(2, *case.inputs["input_ids"].shape[1:-1], 16, dtype=torch.long)
        mask = ids.clone()
        mask[1, ..., 9:] = 0
        arguments = {"input_ids": ids, "attention_mask": mask, "token_type_ids": torch.zeros_like(ids)}
        longest = torch.export.Dim("length", max=model.config.max_position_embeddings)
        free = {0: torch.export.Dim("batch"), ids.ndim - 1: longest}
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.names = list(model(**arguments))
            program = torch.onnx.export(
                model, kwargs=arguments, input_names=list(arguments), output_names=self.names, dynamo=True,
                verbose=False, dynamic_shapes=dict.fromkeys(arguments, free),
            )  # fmt: skip
        graph, threads = program.model_proto.SerializeToString(), torch.get_num_threads()
        if spec == "onnxruntime":
            options = runtime.SessionOptions()
            options.intra_op_num_threads = threads
            session = runtime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
            self.predict = lambda arrays: session.run(None, arrays)
        else:
            settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
            compiled = runtime.Core().compile_model(runtime.Core().read_model(graph), "CPU", settings)
            self.predict = lambda arrays: [array.copy() for array in compiled(arrays).to_tuple()]

    def __call__(self, **arguments: Tensor) -> dict[str, Tensor]:
        ids = arguments["input_ids"]
        given = {"attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids), **arguments}
        results = self.predict({name: tensor.numpy() for name, tensor in given.items()})
        return dict(zip(self.names, map(torch.from_numpy, results), strict=True))


def golden(file: str) -> tuple[Side, list[Case]]:
    """Results from a file, and the inputs they are for: safetensors as `--save` writes them, or lines of JSON with
    "tokens" and "logits", as other tools' golden logits are.

    What is named like an argument of BERT is an input, every other tensor of floating-point numbers a result. Raises
    OSError if the file cannot be read, ValueError if it holds nothing of the kind.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = Path(file)
    try:
        tensors = _lines(path) if path.suffix in (".jsonl", ".json") else load_file(file)
    except (SafetensorError, ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} holds no golden results: {error}") from None
    results, cases = {}, []
    for number, (_, parts) in enumerate(sorted(numbered(tensors).items())):
        inputs = {name: x for name, x in parts.items() if name in _INPUTS}
        results[number] = {name: x for name, x in parts.items() if name not in _INPUTS and x.is_floating_point()}
        if "input_ids" not in inputs or not results[number]:
            raise ValueError(f"{file} holds no golden results: 0.input_ids, 0.logits, ... or what is for {number}")
        cases.append(Case(f"{path.name} {number}", inputs))
    if not cases:
        raise ValueError(f"{file} holds no golden results: it is empty")
    dtype = coarsest(x.dtype for x in tensors.values())
    return Side(f"{path.name} {str(dtype).removeprefix('torch.')}", results, dtype), cases


def _lines(file: Path) -> dict[str, Tensor]:
    tensors = {}
    for number, line in enumerate(filter(str.strip, file.read_text("utf-8").splitlines())):
        entry = json.loads(line)
        tensors[f"{number}.input_ids"] = torch.tensor([entry["tokens"]])
        tensors[f"{number}.logits"] = torch.tensor([entry["logits"]], dtype=torch.float32)
    return tensors


def save(file: str, side: Side, cases: list[Case], facts: dict[str, str]) -> None:
    """Inputs and results of every case as `golden` reads them, with `facts` as the file's metadata."""
    from safetensors.torch import save_file

    from minibert.weights import files

    tensors = {}
    for number, case in enumerate(cases):
        parts = {**case.inputs, **side.outputs(case)}
        tensors |= {f"{number}.{name}": x.contiguous().clone() for name, x in parts.items()}
    with files.replacing(file) as partial:
        save_file(tensors, partial, {"format": "pt", **facts})
