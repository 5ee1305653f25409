"""What a process holds while a million short texts become vectors, one batch after another. Speed: inference.py.

python benchmarks/embedding.py --model MINILM_DIRECTORY --minutes 10
"""

from __future__ import annotations

import argparse
import random
import time
from pathlib import Path
from typing import Any

from common import RESULTS, append, machine

from minibert import SentenceEncoder

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a directory with all-MiniLM-L6-v2")
    parser.add_argument("--minutes", type=float, default=10.0, help="at most")
    parser.add_argument("--out", type=Path, default=RESULTS / "embedding-memory.csv")
    options = parser.parse_args()
    append(measure_memory(options.model, options.minutes), options.out)


if __name__ == "__main__":
    main()
