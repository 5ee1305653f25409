"""How fast is text made into pretraining batches, and does memory stay flat?

    python benchmarks/data.py [--text FILE] [--megabytes 10 50 200] [--workers 2] [--save]

For each size: tokenizing that many megabytes of text (repeated where it is not enough), the peak memory of the process
and of its largest worker, and the batches of one process, pairs planned and masks drawn. Each size in a process of its
own. The `tokenizers` library on the same lines, for comparison, encodes in one process with all threads.
"""

from __future__ import annotations

import argparse
import csv
import json
import lzma
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import RESULTS, machine
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from minibert.pretraining.batches import BatchMaker
from minibert.pretraining.corpus import build_corpus
from minibert.pretraining.order import plan_batches
from minibert.pretraining.pairs import PairRules
from minibert.pretraining.vocabulary import train_vocab

TEXT = Path(__file__).parents[2] / "shared" / "corpus" / "validation.txt.xz"
BATCHES = 200


def measure(text: Path, vocab: Path, workers: int) -> dict[str, float]:
    """Build a corpus and make batches, in this process and its workers."""
    with tempfile.TemporaryDirectory() as directory:
        start = time.perf_counter()
        corpus = build_corpus(text, directory, vocab, num_workers=workers, progress=False)
        seconds = time.perf_counter() - start
        peaks = [own_peak(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]
        plans, maker = plan_batches(corpus, PairRules(), 32), BatchMaker(corpus, PairRules())
        maker[next(plans)]  # the first one waits for the pairs of its block
        start = time.perf_counter()
        tokens = sum(maker[next(plans)].tokens for _ in range(BATCHES))
        return {
            "tokens": corpus.report.tokens,
            "build_tokens_per_second": round(corpus.report.tokens / seconds),
            "peak_mib": peaks[0] // 1024,
            "worker_peak_mib": peaks[1] // 1024,
            "batch_tokens_per_second": round(tokens / (time.perf_counter() - start)),
        }


def own_peak() -> int:
    """KiB. Not ru_maxrss, which a process inherits from the one that started it."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def library_speed(text: Path, vocab: Path, lines: int = 100_000) -> int:
    """Tokens a second of `tokenizers` itself."""
    tokenizer = Tokenizer(models.WordPiece.from_file(str(vocab), unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    with text.open(encoding="utf-8") as file:
        sentences = [line.strip() for line, _ in zip(file, range(lines), strict=False)]
    start = time.perf_counter()
    tokens = sum(len(e.ids) for e in tokenizer.encode_batch_fast(sentences, add_special_tokens=False))
    return round(tokens / (time.perf_counter() - start))


def write_text(source: Path, path: Path, size: int) -> None:
    """`size` bytes of the source, over and over."""
    with lzma.open(source) if source.suffix == ".xz" else source.open("rb") as file:
        data = file.read(size)
    with path.open("wb") as file:
        for _ in range(size // len(data)):
            file.write(data + b"\n\n")
        file.write(data[: size % len(data)].rpartition(b"\n")[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 50, 200])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--measure", nargs=2, metavar=("TEXT", "VOCAB"), help=argparse.SUPPRESS)
    parser.add_argument("--save", action="store_true", help="write results/data.csv")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*map(Path, arguments.measure), arguments.workers)))
        return
    table = []
    with tempfile.TemporaryDirectory() as directory:
        vocab = train_vocab(arguments.text, Path(directory) / "vocab.txt", vocab_size=8192, progress=False)
        for megabytes in arguments.megabytes:
            text = Path(directory) / f"{megabytes}.txt"
            write_text(arguments.text, text, megabytes * 1_000_000)
            command = [
                sys.executable,
                __file__,
                "--workers",
                str(arguments.workers),
                "--measure",
                str(text),
                str(vocab),
            ]
            result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            result["library_tokens_per_second"] = library_speed(text, vocab)
            table.append({**machine(), "megabytes": megabytes, "workers": arguments.workers, **result})
            print(f"{megabytes} MB: " + ", ".join(f"{name} {value:,}" for name, value in result.items()))
            text.unlink()
    if arguments.save:
        RESULTS.mkdir(exist_ok=True)
        with (RESULTS / "data.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)


if __name__ == "__main__":
    main()
