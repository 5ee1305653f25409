"""How much of the machine's matrix-product speed the whole forward pass keeps.

    python benchmarks/roofline.py

The roof is the best speed that oneDNN reaches, on prepacked weights, in the four products of one bert-base layer: what
could be had if embeddings, attention, norms and activations cost nothing and weights never left the cache.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from time import perf_counter

import torch
from common import RESULTS, append, machine
from contenders import CACHE, bert_base

import minibert
from minibert.fast.onednn import PrepackedLinear
from minibert.fast.quantize import Int8Linear

B, T = 8, 128
SHAPES = ((768, 2304), (768, 768), (768, 3072), (3072, 768))  # (in, out): q, k, v; projection; up; down
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.float32}


def product(dtype: str, rows: int, inputs: int, outputs: int):
    """One product without anything around it; in bytes, with the rounding of its input."""
    weight, bias = torch.randn(outputs, inputs), torch.zeros(outputs)
    if dtype != "int8":
        layer, x = PrepackedLinear(weight.to(DTYPES[dtype]), bias.to(DTYPES[dtype])), torch.randn(rows, inputs)
        x = x.to(DTYPES[dtype])
        return lambda: layer(x)
    layer, x = Int8Linear(weight, bias), torch.randint(-127, 128, (rows, inputs)).float()
    return lambda: layer.multiply(x)


def flops(rows: int, length: int, layers: int = 12, D: int = 768, F: int = 3072) -> int:
    """Multiplications and additions of the encoder's matrix products, attention's included."""
    return layers * (2 * rows * (4 * D * D + 2 * D * F) + 4 * rows * length * D)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS / "roofline.csv")
    options = parser.parse_args()
    model = minibert.BertModel.from_pretrained(bert_base(CACHE / "bert-base"), add_pooling_layer=False)
    ids = torch.randint(1000, 30000, (B, T))
    table = []
    for dtype in options.dtypes:
        fast = minibert.optimize(model, dtype)
        work = {f"{i}->{o}": (product(dtype, B * T, i, o), 2 * B * T * i * o) for i, o in SHAPES}
        work["forward"] = (lambda fast=fast: fast(ids), flops(B * T, T))
        seconds = dict.fromkeys(work, float("inf"))
        for _ in range(options.rounds):
            for name, (run, _count) in work.items():
                start = perf_counter()
                run()
                seconds[name] = min(seconds[name], perf_counter() - start)
        speed = {name: count / seconds[name] / 1e9 for name, (_run, count) in work.items()}
        roof = max(value for name, value in speed.items() if name != "forward")
        table += [
            {
                **machine(),
                "dtype": dtype,
                "shape": f"{B} x {T}",
                "what": name,
                "gflops": round(value, 1),
                "share": round(value / roof, 3),
            }
            for name, value in speed.items()
        ]
        print(dtype, {name: f"{value:.0f} GFLOP/s, {value / roof:.1%} of the roof" for name, value in speed.items()})
    append(table, options.out)


if __name__ == "__main__":
    main()
