"""Texts a second: full batches, and texts of natural lengths. Time depends on the machine, ratios less so.

    python benchmarks/throughput.py --shape full --only minibert transformers openvino
    python benchmarks/throughput.py --shape sentences paragraphs --corpus FILE.txt.xz --vocabulary DIRECTORY

Natural lengths are 64 sentences, and 64 paragraphs of three sentences, from a text with a sentence a line. Peers run in
padded batches of 32, "sorted" ones with texts sorted by length first. minibert takes them as they come.
"""

from __future__ import annotations

import argparse
import lzma
from pathlib import Path

import torch
from common import RESULTS, Contender, append, compare
from contenders import BUILDERS, TOLERANCE, Run, bert_base, build
from torch import Tensor

import minibert

Batch = tuple[Tensor, Tensor]  # input_ids and attention_mask
TEXTS, BATCH = 64, 32
SORTED = ("onnxruntime", "openvino", "ctranslate2", "transformers", "transformers compiled")


def full_batch(B: int = 8, T: int = 128) -> list[Tensor]:
    ids = torch.randint(1000, 30000, (B, T), generator=torch.Generator().manual_seed(1))
    return list(ids)


def natural(corpus: Path, vocabulary: Path, sentences: int) -> list[Tensor]:
    """TEXTS texts of so many sentences each, taken at even distances from the corpus."""
    with lzma.open(corpus, "rt", encoding="utf-8") as stream:
        lines = [line.strip() for line in stream]
    starts = [i for i in range(0, len(lines) - sentences) if all(lines[i : i + sentences])]
    chosen = [starts[len(starts) * number // TEXTS] for number in range(TEXTS)]
    texts = [" ".join(lines[start : start + sentences]) for start in chosen]
    tokenizer = minibert.BertTokenizer.from_pretrained(vocabulary)
    return [torch.tensor(ids) for ids in tokenizer(texts, truncation=True, max_length=512)["input_ids"]]


def padded(texts: list[Tensor], batch: int) -> list[Batch]:
    batches = []
    for start in range(0, len(texts), batch):
        rows = texts[start : start + batch]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        lengths = torch.tensor([len(row) for row in rows])
        batches.append((ids, (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()))
    return batches


def runner(run: Run, texts: list[Tensor], batch: int, by_length: bool = False) -> list[Tensor]:
    """The states of each text's own tokens, in the order of the texts."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i])) if by_length else range(len(texts))
    states: dict[int, Tensor] = {}
    places = iter(order)
    for ids, mask in padded([texts[i] for i in order], batch):
        for row, length in zip(run(ids, mask), mask.sum(1).tolist(), strict=True):
            states[next(places)] = row[:length]
    return [states[i] for i in range(len(texts))]


def contest(runs: dict[str, Run], texts: list[Tensor], batch: int, is_full: bool, only_sorted: bool) -> list[Contender]:
    contenders = []
    for name, run in runs.items():
        tolerance = TOLERANCE[BUILDERS[name][0]]
        if not only_sorted or name not in SORTED or name == "transformers":
            contenders.append(Contender(name, lambda run=run: runner(run, texts, batch), tolerance))
        if not is_full and name.removesuffix(" bf16").removesuffix(" int8") in SORTED:
            sorted_run = lambda run=run: runner(run, texts, batch, by_length=True)  # noqa: E731
            contenders.append(Contender(f"{name}, sorted", sorted_run, tolerance))
    return contenders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", choices=("full", "sentences", "paragraphs"), default=["full"])
    parser.add_argument("--only", nargs="+", choices=list(BUILDERS), default=list(BUILDERS), metavar="CONTENDER")
    parser.add_argument("--corpus", type=Path, help="a text, xz, one sentence a line")
    parser.add_argument("--vocabulary", type=Path, help="a directory with an English vocab.txt")
    parser.add_argument("--only-sorted", action="store_true", help="leave peers' unsorted batches out")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, default=RESULTS / "throughput.csv")
    options = parser.parse_args()
    reference = bert_base()
    runs = build(sorted({"transformers", *options.only}, key=list(BUILDERS).index), reference)
    for shape in options.shape:
        if shape == "full":
            texts, batch = full_batch(), 8
        else:
            if options.corpus is None or options.vocabulary is None:
                parser.error(f"--shape {shape} needs --corpus and --vocabulary")
            texts, batch = natural(options.corpus, options.vocabulary, 1 if shape == "sentences" else 3), BATCH
        real = sum(map(len, texts))
        factor = sum(mask.numel() for _, mask in padded(texts, batch)) / real
        contenders = contest(runs, texts, batch, shape == "full", options.only_sorted)
        truth = runner(runs["transformers"], texts, batch)
        label = f"{shape}: {len(texts)} texts, {real} tokens, longest {max(map(len, texts))}, padding x{factor:.2f}"
        append(compare("throughput", label, contenders, "transformers", options.rounds, truth), options.out)


if __name__ == "__main__":
    main()
