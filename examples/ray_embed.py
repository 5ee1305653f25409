"""Embed a data set on a cluster with Ray Data; each actor loads the encoder once.

    pip install minibert-torch[ray]
    python examples/ray_embed.py texts.txt embeddings/ --model sentence-transformers/all-MiniLM-L6-v2 --actors 4

Input: text files, one text a line, on any storage that Ray reads. Output: Parquet files with the columns "text" and
"embedding". Without a cluster Ray starts one on this machine.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import ray

from minibert import SentenceEncoder


class Embed:
    """What an actor runs: a batch of rows in, the same rows with their embeddings out."""

    def __init__(self, model: str, device: str | None = None):
        self.encoder = SentenceEncoder.from_pretrained(model, device=device)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        return batch | {"embedding": self.encoder.encode(batch["text"], show_progress_bar=False)}


def embed(texts: ray.data.Dataset, model: str, actors: int, cpus: float, gpus: float = 0) -> ray.data.Dataset:
    """texts has a column "text". cpus and gpus are those of one actor; torch uses as many threads as it has cpus."""
    return texts.map_batches(
        Embed,
        fn_constructor_kwargs={"model": model, "device": "cuda" if gpus else "cpu"},
        batch_size=512,
        compute=ray.data.ActorPoolStrategy(size=actors),
        num_cpus=cpus,
        num_gpus=gpus,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("input", help="text files, one text a line")
    parser.add_argument("output", help="a directory for Parquet files")
    parser.add_argument("--model", required=True, help="a directory that every machine has, or a name on the Hub")
    parser.add_argument("--actors", type=int, default=1)
    parser.add_argument("--cpus", type=float, default=1, help="of each actor")
    parser.add_argument("--gpus", type=float, default=0, help="of each actor")
    arguments = parser.parse_args()
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    texts = ray.data.read_text(arguments.input, drop_empty_lines=False)
    embed(texts, arguments.model, arguments.actors, arguments.cpus, arguments.gpus).write_parquet(arguments.output)


if __name__ == "__main__":
    main()
