"""The encoder beside its peers: one short text, full batches, a query from text to vector, sentences in bulk.

    python benchmarks/inference.py --size minilm --model MINILM_DIRECTORY --corpus TEXT.txt.xz
    python benchmarks/inference.py --size base --dtypes float32

Every contender runs in a process of its own, since threads of one that wait for work slow the next down (31 ms instead
of 15 were seen), all in turn, round after round. A process first computes answers, whose error is in the table beside
the time, then times each work; its figure is the median of its calls, what is reported is the median of the rounds'
figures and their range. Rows go to results/inference.csv; `report.py` makes tables of them.
"""

from __future__ import annotations

import argparse
import json
import lzma
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from contenders import CACHE, CONTENDERS, REFERENCE, TOLERANCE, bert_base, dtype_of, embedder, exported, runner

SHAPES = {"minilm": [(1, 16), (1, 64), (1, 128), (32, 32)], "base": [(1, 16), (1, 64), (1, 128), (8, 128)]}
WORKS = ("shapes", "query", "bulk")
QUERY = "how do I reset the password of my account"
BULK, JUDGED = 512, 256  # sentences embedded in bulk, and sentences whose vectors are compared
QUALITIES = ("error", "cosine_mean", "cosine_least")
Found = dict[str, Any]


def sentences(corpus: Path, count: int) -> list[str]:
    """Lines of a text at even distances, neither headings nor walls of text."""
    with lzma.open(corpus, "rt", encoding="utf-8") as stream:
        lines = [line.strip() for line in stream]
    lines = [line for line in lines if 20 < len(line) < 600]
    return lines[:: max(1, len(lines) // count)][:count]


def median_seconds(work: Any, seconds: float) -> float:
    """The median of at least 3 calls for so many seconds, after 2 that are not counted; none for 0 seconds."""
    if not seconds:
        return 0.0
    for _ in range(2):
        work()
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < 3 or (time.perf_counter() - began < seconds and len(times) < 300):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def work_alone(options: argparse.Namespace) -> Found:
    """In a contender's own process: answers (into a file) and times."""
    answers: dict[str, np.ndarray] = {}
    times: dict[str, float] = {}
    folder = Path(options.exports)
    os.environ["MINIBERT_COMPILE"] = "0" if options.worker.endswith("uncompiled") else "1"
    if "shapes" in options.what:
        run = runner(options.worker, options.model, folder, options.threads)
        for B, T in SHAPES[options.size]:
            ids = np.random.default_rng(B * 1000 + T).integers(1000, 30000, (B, T)).astype(np.int64)
            mask = np.ones_like(ids)
            answers[f"{B}x{T}"] = run(ids, mask)
            times[f"{B}x{T}"] = median_seconds(lambda ids=ids, mask=mask: run(ids, mask), options.seconds)
    if options.corpus is not None and {"query", "bulk"} & set(options.what):
        embed = embedder(options.worker, options.model, folder, options.threads)
        texts = sentences(options.corpus, BULK + JUDGED)
        answers["vectors"] = embed(texts[BULK:])
        if "query" in options.what:
            times["query"] = median_seconds(lambda: embed([QUERY]), options.seconds)
        if "bulk" in options.what:
            times["bulk"] = median_seconds(lambda: embed(texts[:BULK]), 2 * options.seconds)
    np.savez(options.answers, **answers)
    return times


def ask(
    name: str, options: argparse.Namespace, exports: Path, seconds: float
) -> tuple[dict[str, float], dict[str, np.ndarray]] | None:
    """Run a contender's process. Returns its times and answers; None, with the reason printed, if it fails."""
    answers = CACHE / f"answers-{os.getpid()}.npz"
    command = [sys.executable, "-W", "ignore", __file__, "--worker", name, "--answers", str(answers), "--exports"]
    command += [str(exports), "--size", options.size, "--threads", str(options.threads), "--model", str(options.model)]
    command += ["--seconds", str(seconds), "--what", *options.what]
    command += ["--corpus", str(options.corpus)] if options.corpus is not None else []
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        print(f"without {name}: {(done.stderr.strip().splitlines() or ['no word'])[-1][:200]}")
        return None
    with np.load(answers) as stored:
        found = dict(stored)
    answers.unlink()
    return json.loads(done.stdout.strip().splitlines()[-1]), found


def errors(answers: dict[str, np.ndarray], exact: dict[str, np.ndarray]) -> dict[str, float]:
    """Relative root mean square error of the states (the worst shape's), cosine of the vectors (mean, smallest)."""
    found = {}
    shapes = [name for name in answers if name != "vectors"]
    if shapes:
        relative = [np.sqrt(np.mean((answers[n] - exact[n]) ** 2) / np.mean(exact[n] ** 2)) for n in shapes]
        found["error"] = float(max(relative))
    if "vectors" in answers:
        ours, theirs = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (answers["vectors"], exact["vectors"]))
        cosine = (ours.astype(np.float64) * theirs).sum(1)
        found["cosine_mean"], found["cosine_least"] = float(cosine.mean()), float(cosine.min())
    return found


def contest(dtype: str, options: argparse.Namespace, exports: Path, exact: dict[str, np.ndarray]) -> list[Found]:
    """All contenders of a dtype in turn, round after round; rows of the table."""
    from common import machine

    names = [name for name in CONTENDERS[dtype] if options.only is None or name in options.only]
    times: dict[str, dict[str, list[float]]] = {name: {} for name in names}
    quality: dict[str, dict[str, float]] = {}
    for number in range(options.rounds):
        for name in [name for name in names if name in times]:
            print(f"round {number + 1} of {options.rounds}: {name}", file=sys.stderr, flush=True)
            result = ask(name, options, exports, options.seconds)
            if result is None:
                del times[name]
                continue
            quality[name] = errors(result[1], exact)
            if quality[name].get("error", 0.0) > TOLERANCE[dtype] and name.startswith("minibert"):
                raise AssertionError(f"{name}: error {quality[name]['error']:.1e}, allowed {TOLERANCE[dtype]:.0e}")
            for work, seconds in result[0].items():
                times[name].setdefault(work, []).append(seconds)
    rows = []
    for work in next(iter(times.values()), {}):
        medians = {name: statistics.median(found[work]) for name, found in times.items()}
        peers = [seconds for name, seconds in medians.items() if not name.startswith("minibert")]
        for name, seconds in medians.items():
            all_rounds = [value * 1e3 for value in times[name][work]]
            rows.append({
                **machine(), "threads": options.threads, "size": options.size, "dtype": dtype, "work": work,
                "contender": name, "median_ms": round(seconds * 1e3, 3), "least_ms": round(min(all_rounds), 3),
                "most_ms": round(max(all_rounds), 3), "rounds": len(all_rounds),
                "best_peer_over_this": round(min(peers) / seconds, 3) if peers else "",
                **{key: f"{quality[name].get(key, float('nan')):.6g}" for key in QUALITIES},
            })  # fmt: skip
    return rows


def show(rows: list[Found]) -> None:
    """Milliseconds by contender and work, and how the first (ours) stands to the best peer."""
    works = list(dict.fromkeys(row["work"] for row in rows))
    print(f"\n{rows[0]['size']}, {rows[0]['dtype']}: median ms (least to most); {rows[0]['device']}")
    for name in dict.fromkeys(row["contender"] for row in rows):
        own = {row["work"]: row for row in rows if row["contender"] == name}
        cells = [f"{w} {own[w]['median_ms']:.2f} ({own[w]['least_ms']:.2f}-{own[w]['most_ms']:.2f})" for w in works]
        first = own[works[0]]
        print(f"  {name:22} {'  '.join(cells)}   error {first['error']}, cosine {first['cosine_mean']}", flush=True)
    ours = {row["work"]: row["best_peer_over_this"] for row in rows if row["contender"] == CONTENDERS[row["dtype"]][0]}
    print("  best peer / ours       " + "  ".join(f"{work} {ratio}" for work, ratio in ours.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=list(SHAPES), default="minilm")
    parser.add_argument("--model", type=Path, help="a directory with a MiniLM; --size base makes one of its own")
    parser.add_argument("--corpus", type=Path, help="a text, xz, a sentence a line: for query and bulk, and for NNCF")
    parser.add_argument("--what", nargs="+", choices=WORKS, default=list(WORKS))
    parser.add_argument("--dtypes", nargs="+", choices=list(CONTENDERS), default=list(CONTENDERS))
    parser.add_argument("--only", nargs="+", metavar="CONTENDER", help="of: " + ", ".join(sum(CONTENDERS.values(), ())))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--seconds", type=float, default=1.5, help="a work is timed for, in each process")
    parser.add_argument("--out", type=Path, help="default: results/inference.csv")
    for hidden in ("--worker", "--answers", "--exports"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        warnings.filterwarnings("ignore")
        print(json.dumps(work_alone(options)))
        return
    from common import RESULTS, append

    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if options.size == "base":
        options.model, options.what = bert_base(CACHE / "bert-base"), ["shapes"]
    elif options.model is None:
        parser.error("--size minilm needs --model")
    exports = exported(options.model, [] if options.corpus is None else sentences(options.corpus, 100))
    assert dtype_of(REFERENCE) == "float32"
    reference = ask(REFERENCE, options, exports, seconds=0.0)
    if reference is None:
        raise SystemExit(f"{REFERENCE} is the reference, and does not run")
    for dtype in options.dtypes:
        rows = contest(dtype, options, exports, reference[1])
        if not rows:
            continue  # none of --only is of this dtype
        show(rows)
        append(rows, options.out or RESULTS / "inference.csv")


if __name__ == "__main__":
    main()
