"""What lower precision costs in answers: fill-mask agreement and sentence embeddings, against float32.

    python benchmarks/quality.py --reactions DIRECTORY --encoder DIRECTORY --corpus FILE.txt.xz

--reactions is a masked-language model of chemical reactions (rxnfp's bert_pretrained), asked about amide couplings that
are written here; --encoder is a sentence encoder and --corpus English, a sentence a line. In each text one token in
seven is masked; agreement is the share of masked tokens whose best guess is the float32 model's.
"""

from __future__ import annotations

import argparse
import lzma
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import RESULTS, append, machine
from torch import Tensor

import minibert

DTYPES = ("bfloat16", "int8")
ACIDS = (
    "CC(=O)",
    "CCC(=O)",
    "c1ccccc1C(=O)",
    "Cc1ccc(cc1)C(=O)",
    "COc1ccc(cc1)C(=O)",
    "Fc1ccc(cc1)C(=O)",
    "O=C(OC(C)(C)C)NCC(=O)",
    "c1ccncc1C(=O)",
    "CC(C)CC(=O)",
    "Clc1ccccc1C(=O)",
    "c1ccsc1C(=O)",
    "N#Cc1ccc(cc1)C(=O)",
)
AMINES = (
    "NCC",
    "Nc1ccccc1",
    "NCc1ccccc1",
    "N1CCOCC1",
    "N1CCCCC1",
    "NC(C)(C)C",
    "Nc1ccc(OC)cc1",
    "NCCO",
    "N1CCN(C)CC1",
    "Nc1ccc(Cl)cc1",
    "NCC(=O)OCC",
    "Nc1ccncc1",
)
_SMILES = r"\[[^\]]+\]|Br|Cl|[NOSPFICbcnosp]|\(|\)|\.|=|#|-|\+|>>|\d"  # one token each


def reactions(vocabulary: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Amide couplings, acid.amine>>amide, as input_ids and attention_mask."""
    rows = []
    for acid in ACIDS:
        for amine in AMINES:
            tokens = re.findall(_SMILES, f"{acid}O.{amine}>>{acid}{amine}")
            rows.append([vocabulary[token] for token in ("[CLS]", *tokens, "[SEP]")])
    lengths = torch.tensor([len(row) for row in rows])
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True)
    return ids, (torch.arange(ids.shape[1])[None] < lengths[:, None]).long()


def masked(ids: Tensor, mask: Tensor, vocabulary: dict[str, int]) -> tuple[Tensor, Tensor]:
    """ids with one real token in seven masked, and where."""
    special = torch.tensor([vocabulary[token] for token in ("[CLS]", "[SEP]")])
    drawn = torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) < 1 / 7
    places = mask.bool() & ~torch.isin(ids, special) & drawn
    return torch.where(places, vocabulary["[MASK]"], ids), places


def agreement(exact: Tensor, other: Tensor) -> float:
    """Share of equal best guesses; logits (M, V)."""
    return float((exact.argmax(-1) == other.argmax(-1)).double().mean())


def mean_pooled(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    states = model(ids, attention_mask=mask).last_hidden_state
    return F.normalize((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True), dim=-1)


@torch.no_grad()
def fill_mask(directory: Path) -> list[dict[str, Any]]:
    model = minibert.BertForMaskedLM.from_pretrained(directory)
    words = (directory / "vocab.txt").read_text(encoding="utf-8").split("\n")
    vocabulary = {word: number for number, word in enumerate(words)}
    ids, mask = reactions(vocabulary)
    ids, places = masked(ids, mask, vocabulary)
    exact, rows = model(ids, mask).logits[places], []
    for dtype in ("float32", *DTYPES):
        other = minibert.optimize(model, dtype)(ids, mask, positions=places).logits
        rows.append({"measure": "fill-mask top-1 agreement", "dtype": dtype, "value": agreement(exact, other),
                     "of": f"{int(places.sum())} masks in {len(ids)} reactions"})  # fmt: skip
    return rows


@torch.no_grad()
def embeddings(directory: Path, texts: list[str]) -> list[dict[str, Any]]:
    model, tokenizer = (kind.from_pretrained(directory) for kind in (minibert.BertModel, minibert.BertTokenizer))
    batch = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    exact, rows = mean_pooled(model, ids, mask), []
    for dtype in DTYPES:
        cosine = (exact * mean_pooled(minibert.optimize(model, dtype), ids, mask)).sum(-1)
        for name, value in (("mean", cosine.mean()), ("smallest", cosine.min())):
            rows.append({"measure": f"{name} cosine of embeddings", "dtype": dtype, "value": float(value),
                         "of": f"{len(texts)} sentences"})  # fmt: skip
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reactions", type=Path)
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--corpus", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS / "quality.csv")
    options = parser.parse_args()
    rows = [] if options.reactions is None else fill_mask(options.reactions)
    if options.encoder is not None:
        with lzma.open(options.corpus, "rt", encoding="utf-8") as stream:
            lines = [line.strip() for line in stream if len(line) > 20]
        rows += embeddings(options.encoder, lines[:: len(lines) // 256][:256])
    if not rows:
        parser.error("give --reactions, or --encoder with --corpus")
    table = [{**machine(), **row, "value": round(row["value"], 6)} for row in rows]
    for row in table:
        print(f"{row['measure']}, {row['dtype']}: {row['value']} ({row['of']})")
    append(table, options.out)


if __name__ == "__main__":
    main()
