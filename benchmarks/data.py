"""How fast is text made into pretraining batches, and does memory stay flat?

    python benchmarks/data.py [--text FILE] [--scripts latin cyrillic thai chinese] [--megabytes 10 50 200]
                              [--workers 2] [--save]

In other scripts than its own the text has the same words in the same order, but other characters in their place:
Cyrillic letters; Thai ones, with a blank after every fourth word only; one or two Chinese ones a word, without blanks.
For each script and size: tokenizing that many megabytes of text (repeated where it is not enough), the peak memory of
the process and of its largest worker, and the batches of one process, pairs planned and masks drawn. Each size in a
process of its own. The `tokenizers` library on the same lines, for comparison, encodes in one process with all threads.
"""

from __future__ import annotations

import argparse
import csv
import functools
import json
import lzma
import re
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from itertools import product
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

from minibert.pretraining.corpus import build_corpus
from minibert.pretraining.vocabulary import train_vocab

TEXT = Path(__file__).parents[2] / "shared" / "corpus" / "validation.txt.xz"
BATCHES = 200
SAMPLE = 10_000_000  # bytes that the vocabulary is trained on
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SCRIPTS = ("latin", "cyrillic", "thai", "chinese")


def measure(text: Path, vocab: Path, workers: int) -> dict[str, float]:
    """Build a corpus and make batches, in this process and its workers.

    The workers import this file: like those of `minibert pretrain`, they must not wait for torch.
    """
    with tempfile.TemporaryDirectory() as directory:
        start = time.perf_counter()
        corpus = build_corpus(text, directory, vocab, num_workers=workers, progress=False)
        seconds = time.perf_counter() - start
        peaks = [own_peak(), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss]
        from minibert.pretraining.batches import BatchMaker
        from minibert.pretraining.order import plan_batches
        from minibert.pretraining.pairs import PairRules

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


def written_in(text: str, script: str) -> str:
    """The same words in other characters."""
    if script == "latin":
        return text
    if script == "chinese":
        words = re.sub(r"\w+", lambda match: _chinese(match[0].lower()), text)
        return re.sub(r"[ \t]+", "", words)
    first = {"cyrillic": 0x430, "thai": 0xE01}[script]
    letters = {letter: chr(first + i) for i, letter in enumerate(LETTERS)}
    text = text.lower().translate(str.maketrans(letters))
    return text if script == "cyrillic" else re.sub(r"(\S+) (\S+) (\S+) (\S+ )", r"\1\2\3\4", text)


@functools.cache
def _chinese(word: str) -> str:
    """Short words have one character, of 700, and others two, of 4000 each."""
    number = zlib.crc32(word.encode())
    return (
        chr(0x4E00 + number % 700)
        if len(word) < 5
        else chr(0x4E00 + number % 4000) + chr(0x4E00 + number // 4000 % 4000)
    )


def write_text(source: Path, path: Path, size: int, script: str) -> None:
    """`size` bytes of the source in a script, over and over."""
    with lzma.open(source) if source.suffix == ".xz" else source.open("rb") as file:
        text = file.read(size).decode("utf-8", errors="ignore")
    data = written_in(text, script).encode()[:size].rpartition(b"\n")[0]
    with path.open("wb") as file:
        for _ in range(size // len(data)):
            file.write(data + b"\n\n")
        file.write(data[: size % len(data)].rpartition(b"\n")[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 50, 200])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=["latin"])
    parser.add_argument("--measure", nargs=2, metavar=("TEXT", "VOCAB"), help=argparse.SUPPRESS)
    parser.add_argument("--save", action="store_true", help="write results/data.csv")
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*map(Path, arguments.measure), arguments.workers)))
        return
    from common import RESULTS, machine

    table = []
    with tempfile.TemporaryDirectory() as directory:
        for script, megabytes in product(arguments.scripts, arguments.megabytes):
            sample, vocab = Path(directory) / "sample.txt", Path(directory) / "vocab.txt"
            write_text(arguments.text, sample, SAMPLE, script)
            train_vocab(sample, vocab, vocab_size=8192, progress=False)
            text = Path(directory) / f"{megabytes}.txt"
            write_text(arguments.text, text, megabytes * 1_000_000, script)
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
            table.append(
                {
                    **machine(),
                    "text": arguments.text.name,
                    "script": script,
                    "megabytes": megabytes,
                    "workers": arguments.workers,
                    **result,
                }
            )
            print(
                f"{script}, {megabytes} MB: " + ", ".join(f"{name} {value:,}" for name, value in result.items()),
                flush=True,
            )
            text.unlink()
    if arguments.save:
        RESULTS.mkdir(exist_ok=True)
        with (RESULTS / "data.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(table[0]))
            writer.writeheader()
            writer.writerows(table)


if __name__ == "__main__":
    main()
