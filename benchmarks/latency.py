"""How long one short text takes.

python benchmarks/latency.py --tokens 16 128
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from common import RESULTS, Contender, append, compare
from contenders import BUILDERS, TOLERANCE, bert_base, build


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[16])
    parser.add_argument("--only", nargs="+", choices=list(BUILDERS), default=list(BUILDERS), metavar="CONTENDER")
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--out", type=Path, default=RESULTS / "latency.csv")
    options = parser.parse_args()
    runs = build(sorted({"transformers", *options.only}, key=list(BUILDERS).index), bert_base())
    for tokens in options.tokens:
        ids = torch.randint(1000, 30000, (1, tokens), generator=torch.Generator().manual_seed(1))
        mask = torch.ones_like(ids)
        contenders = [
            Contender(name, lambda run=run, ids=ids, mask=mask: [run(ids, mask)], TOLERANCE[BUILDERS[name][0]])
            for name, run in runs.items()
        ]
        truth = [runs["transformers"](ids, mask)]
        append(compare("latency", f"1 x {tokens}", contenders, "transformers", options.rounds, truth), options.out)


if __name__ == "__main__":
    main()
