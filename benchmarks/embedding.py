"""How fast are sentences embedded, text to vector? minibert against sentence-transformers, ONNX Runtime, fastembed.

    python -m benchmarks.embedding --model MINILM_DIRECTORY --corpus sentences.txt.xz
    python -m benchmarks.embedding --model MINILM_DIRECTORY --memory 10

`--memory` embeds a million short texts from a generator, for at most so many minutes, and writes down what the process
holds on the way.

All use the same weights and texts of natural lengths, and sort them by length: sentence-transformers by itself (by
characters), the ONNX contenders by the tokens counted beforehand. Tokenizing is part of the time. fastembed is left out
where it is not installed; its pinned huggingface_hub is older than ours: pip install --no-deps fastembed.
"""

from __future__ import annotations

import argparse
import lzma
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from benchmarks.common import RESULTS, Contender, alternate, append, check, machine, rows, show
from benchmarks.contenders import CACHE, onnx_file, onnxruntime_float32
from minibert import SentenceEncoder

TEXT = Path(__file__).parents[2] / "shared" / "corpus" / "validation.txt.xz"
BATCH = 32  # sentence-transformers' own default; 64 and 128 are slower here
BASELINE = "sentence-transformers"
EXACT = 1e-6  # for float32; half precision and int8 are reported with their cosine
Encode = Callable[[], Tensor]
Row = dict[str, Any]


def measure_memory(model: str, minutes: float, texts: int = 1_000_000, step: int = 25_000) -> list[Row]:
    """Resident memory after every `step` texts of three random words."""
    encoder, draw = SentenceEncoder.from_pretrained(model), random.Random(0)
    words = sorted(word for word in encoder.tokenizer.get_vocab() if word.isalpha() and len(word) > 3)
    table, done, start = [], 0, time.monotonic()
    for vectors in encoder.encode_stream(" ".join(draw.choices(words, k=3)) for _ in range(texts)):
        done += len(vectors)
        if done >= step * (len(table) + 1):
            resident = next(line for line in Path("/proc/self/status").read_text().splitlines() if "VmRSS" in line)
            seconds = time.monotonic() - start
            table.append({**machine(), "texts": done, "resident_mib": int(resident.split()[1]) // 1024,
                          "seconds": round(seconds)})  # fmt: skip
            print(f"{done:9,} texts  {table[-1]['resident_mib']:6,} MiB  {seconds:6.0f} s", flush=True)
            if seconds > 60 * minutes:
                break
    return table


def sentences(corpus: Path, count: int) -> list[str]:
    with lzma.open(corpus, "rt") as file:
        lines = [line.strip() for line in file if len(line.split()) > 3]
    return random.Random(0).sample(lines, count)


def minibert(model: Path, texts: list[str], dtype: str | None = None) -> Encode:
    encoder = SentenceEncoder.from_pretrained(model, dtype=dtype)
    return lambda: encoder.encode(texts, convert_to="torch")


def sentence_transformers(model: Path, texts: list[str], dtype: torch.dtype = torch.float32) -> Encode:
    from sentence_transformers import SentenceTransformer

    peer = SentenceTransformer(str(model), device="cpu", model_kwargs={"dtype": dtype})
    return lambda: peer.encode(texts, batch_size=BATCH, convert_to_tensor=True).float()


def onnxruntime(model: Path, texts: list[str]) -> Encode:
    """The exported graph, with mean pooling and normalisation in torch."""
    run = onnxruntime_float32(transformers.BertModel.from_pretrained(model, add_pooling_layer=False).eval())
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)

    def encode() -> Tensor:
        ids = tokenizer(texts, truncation=True, max_length=256)["input_ids"]
        order = sorted(range(len(ids)), key=lambda i: -len(ids[i]))
        found = [None] * len(ids)
        for start in range(0, len(order), BATCH):
            picked = order[start : start + BATCH]
            batch = tokenizer.pad({"input_ids": [ids[i] for i in picked]}, return_tensors="pt")
            mask = batch["attention_mask"]
            states = run(batch["input_ids"], mask) * mask[..., None]
            for i, vector in zip(picked, F.normalize(states.sum(1) / mask.sum(1, keepdim=True)), strict=True):
                found[i] = vector
        return torch.stack(found)

    return encode


def fastembed(model: Path, texts: list[str]) -> Encode:
    from fastembed import TextEmbedding
    from fastembed.common.model_description import ModelSource, PoolingType

    graph = onnx_file(transformers.BertModel.from_pretrained(model, add_pooling_layer=False).eval())
    folder = CACHE / "fastembed"
    shutil.copytree(model, folder, dirs_exist_ok=True)
    for part in graph.parent.glob(f"{graph.name}*"):  # the graph, and its weights beside it
        shutil.copy(part, folder)
    TextEmbedding.add_custom_model(
        "local", PoolingType.MEAN, True, ModelSource(hf="local/local"), dim=384, model_file=graph.name
    )
    peer = TextEmbedding("local", specific_model_path=str(folder), threads=torch.get_num_threads())
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    back = np.argsort(order)
    in_order = [texts[i] for i in order]
    return lambda: torch.from_numpy(np.stack(list(peer.embed(in_order, batch_size=BATCH)))[back])


def build(model: Path, texts: list[str]) -> list[Contender]:
    """Those that can be had here; the others are named and left out."""
    makers = {
        BASELINE: (EXACT, sentence_transformers),
        "minibert": (EXACT, minibert),
        "onnxruntime": (EXACT, onnxruntime),
        "fastembed": (EXACT, fastembed),
        "minibert bf16": (None, lambda *a: minibert(*a, "bfloat16")),
        "minibert int8": (None, lambda *a: minibert(*a, "int8")),
        "sentence-transformers bf16": (None, lambda *a: sentence_transformers(*a, torch.bfloat16)),
    }
    contenders = []
    for name, (tolerance, make) in makers.items():
        try:
            encode = make(model, texts)
            contenders.append(Contender(name, lambda encode=encode: [encode()], tolerance))
        except Exception as problem:  # a missing package, a CPU without bf16: say so and go on
            print(f"without {name}: {type(problem).__name__}: {str(problem).splitlines()[0][:160]}")
    return contenders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="a directory with all-MiniLM-L6-v2")
    parser.add_argument("--corpus", type=Path, default=TEXT, help="a text, xz, one sentence a line")
    parser.add_argument("--texts", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS / "embedding.csv")
    parser.add_argument("--memory", type=float, metavar="MINUTES", help="measure memory instead, for so long at most")
    options = parser.parse_args()
    if options.memory:
        append(measure_memory(options.model, options.memory), options.out.with_stem("embedding-memory"))
        return
    texts = sentences(options.corpus, options.texts)
    contenders = build(options.model, texts)
    truth = contenders[0].run()
    for contender in contenders:
        check(contender, truth)
    alternate(contenders, options.rounds)
    tokens = sum(map(len, transformers.AutoTokenizer.from_pretrained(options.model)(texts)["input_ids"]))
    table = rows("embedding", f"{len(texts)} sentences, {tokens} tokens", contenders, BASELINE)
    for row, contender in zip(table, contenders, strict=True):
        row["texts_per_second"] = round(len(texts) / contender.median, 1)
        row["least_cosine"] = round(float(F.cosine_similarity(contender.run()[0], truth[0]).min()), 6)
    show(table)
    for row in table:
        print(f"  {row['contender']:32} {row['texts_per_second']:8} texts/s   cosine at least {row['least_cosine']}")
    append(table, options.out)


if __name__ == "__main__":
    main()
