"""Everything people would run BERT's encoder with on a CPU instead, at its best honest settings, on the same weights.

A contender is a function from input_ids and attention_mask, (B, T) int64 arrays, to the last hidden state (B, T, D) in
float32. What peers export is kept in a cache, in a folder named by the weights and by the versions that made it.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np

Run = Callable[[np.ndarray, np.ndarray], np.ndarray]
Embed = Callable[[list[str]], np.ndarray]

CACHE = Path(tempfile.gettempdir()) / "minibert-benchmarks"
MAKERS = ("torch", "transformers", "onnx", "onnxscript", "onnxruntime", "openvino", "nncf")
BATCH = 32  # of peers on texts of natural lengths, sorted by length
# The contenders, ours first in each dtype, compiled; "minibert plain" is the model that one reads
CONTENDERS = {
    "float32": ("minibert", "minibert uncompiled", "minibert plain",
                "onnxruntime", "openvino", "transformers", "transformers compiled"),
    "bfloat16": ("minibert bfloat16", "minibert bfloat16 uncompiled", "openvino bfloat16", "transformers bfloat16"),
    "int8": ("minibert int8", "minibert int8 uncompiled", "onnxruntime int8", "openvino int8"),
}  # fmt: skip
REFERENCE = "transformers"  # in float32: what errors are measured against
# How far from the reference an answer may be: the root mean square of the difference, as a share of the states' own.
# float32 rounds at 6e-8 and sums over thousands of terms, bfloat16 at 4e-3; int8 is judged by its vectors' direction.
TOLERANCE = {"float32": 1e-5, "bfloat16": 0.03, "int8": 0.35}


def dtype_of(name: str) -> str:
    return next(dtype for dtype, names in CONTENDERS.items() if name in names)


def bert_base(directory: Path) -> Path:
    """A checkpoint of bert-base's shape with random weights, made once: time depends on the shape alone."""
    if not (directory / "model.safetensors").exists():
        import torch
        import transformers

        torch.manual_seed(0)
        transformers.BertModel(transformers.BertConfig()).save_pretrained(directory)
    return directory


def exported(directory: Path, texts: Sequence[str]) -> Path:
    """The folder of what peers made of a checkpoint: model.onnx, optimized.onnx, int8.onnx, nncf.xml.

    NNCF quantizes on `texts` (on random ids where the checkpoint has no tokenizer), 100 of them.
    """
    digest = hashlib.sha256((directory / "model.safetensors").read_bytes())
    for package in MAKERS:
        try:
            digest.update(f"{package} {version(package)}".encode())
        except PackageNotFoundError:
            digest.update(f"no {package}".encode())
    folder = CACHE / digest.hexdigest()[:16]
    if (folder / "nncf.xml").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    _export(directory, folder)
    import nncf
    import openvino

    if (directory / "tokenizer.json").exists():
        encode = tokenizer(directory)
        rows = [encode([text]) for text in texts[:100]]
    else:
        draw = np.random.default_rng(1)
        rows = [(ids, np.ones_like(ids)) for ids in (draw.integers(1000, 30000, (1, 64)) for _ in range(100))]
    data = nncf.Dataset([{"input_ids": ids, "attention_mask": mask} for ids, mask in rows])
    plain = openvino.Core().read_model(folder / "model.onnx")
    quantized = nncf.quantize(plain, data, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(rows))
    openvino.save_model(quantized, folder / "nncf.xml")
    return folder


def _export(directory: Path, folder: Path) -> None:
    import torch
    import transformers
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.transformers import optimizer

    model = transformers.BertModel.from_pretrained(directory, add_pooling_layer=False).eval()

    class States(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    ids = torch.randint(1000, 30000, (2, 16))
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=model.config.max_position_embeddings)}
    names = ["input_ids", "attention_mask"]
    torch.onnx.export(
        States(), (ids, torch.ones_like(ids)), str(folder / "model.onnx"), input_names=names, output_names=["states"],
        dynamic_shapes=dict.fromkeys(names, free), dynamo=True, verbose=False,
    )  # fmt: skip
    heads, hidden = model.config.num_attention_heads, model.config.hidden_size
    best = optimizer.optimize_model(str(folder / "model.onnx"), model_type="bert", num_heads=heads, hidden_size=hidden)
    best.save_model_to_file(str(folder / "optimized.onnx"))
    quantize_dynamic(folder / "optimized.onnx", folder / "int8.onnx", weight_type=QuantType.QInt8)


def tokenizer(directory: Path) -> Callable[[list[str]], tuple[np.ndarray, np.ndarray]]:
    """Texts to padded ids and mask by the `tokenizers` library alone: what a lean peer would do."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(directory / "tokenizer.json"))
    backend.enable_truncation(256)
    backend.enable_padding()

    def encode(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
        rows = backend.encode_batch(texts)
        return np.array([row.ids for row in rows]), np.array([row.attention_mask for row in rows])

    return encode


def runner(name: str, directory: Path, folder: Path, threads: int) -> Run:
    """The contender `name` on the checkpoint in `directory`, with its exports in `folder`."""
    peer, dtype = name.split()[0], dtype_of(name)
    if peer == "onnxruntime":
        return _onnxruntime(folder / ("int8.onnx" if dtype == "int8" else "optimized.onnx"), threads)
    if peer == "openvino":
        return _openvino(folder / ("nncf.xml" if dtype == "int8" else "model.onnx"), dtype, threads)
    import torch

    torch.set_num_threads(threads)
    if peer == "transformers":
        import transformers

        kind = getattr(torch, dtype)
        model = transformers.BertModel.from_pretrained(directory, add_pooling_layer=False, dtype=kind).eval()
        call = torch.compile(model, dynamic=True) if name.endswith("compiled") else model
    else:
        call = minibert_model(name, directory)

    def run(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            out = call(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask)).last_hidden_state
            return out.float().numpy()

    return run


def minibert_model(name: str, directory: Path):
    """minibert's model on the fast path, or plain."""
    import minibert

    model = minibert.BertModel.from_pretrained(directory, add_pooling_layer=False)
    if name == "minibert plain":
        return model
    dtype = dtype_of(name)
    return minibert.optimize(model, None if dtype == "float32" else dtype)


def _onnxruntime(file: Path, threads: int) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda ids, mask: session.run(None, {"input_ids": ids, "attention_mask": mask})[0]


def _openvino(file: Path, dtype: str, threads: int) -> Run:
    import openvino

    hints = {
        "INFERENCE_PRECISION_HINT": "bf16" if dtype == "bfloat16" else "f32",
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(str(file), "CPU", hints).create_infer_request()
    return lambda ids, mask: request.infer({"input_ids": ids, "attention_mask": mask})[0].copy()


def embedder(name: str, directory: Path, folder: Path, threads: int) -> Embed:
    """From texts to sentence vectors: minibert and sentence-transformers by themselves, others by a lean loop."""
    if name.startswith("minibert") and name != "minibert plain":
        import torch

        from minibert import SentenceEncoder

        torch.set_num_threads(threads)
        dtype = dtype_of(name)
        options = {} if dtype == "float32" else {"dtype": dtype}
        encoder = SentenceEncoder.from_pretrained(directory, **options)
        return lambda texts: encoder.encode(texts, show_progress_bar=False)
    if name == "transformers":
        import torch
        from sentence_transformers import SentenceTransformer

        torch.set_num_threads(threads)
        peer = SentenceTransformer(str(directory), device="cpu")
        return lambda texts: peer.encode(texts, batch_size=BATCH, show_progress_bar=False)
    run, encode = runner(name, directory, folder, threads), tokenizer(directory)

    def embed(texts: list[str]) -> np.ndarray:
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        out: dict[int, np.ndarray] = {}
        for start in range(0, len(order), BATCH):
            part = order[start : start + BATCH]
            ids, mask = encode([texts[i] for i in part])
            weights = mask[:, :, None].astype(np.float32)
            vectors = (run(ids, mask) * weights).sum(1) / weights.sum(1)
            out.update(zip(part, vectors, strict=True))
        return np.stack([out[i] for i in range(len(texts))])

    return embed
