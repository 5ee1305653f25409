"""How long does a BERT take to be there, and how much memory? Each measurement is a process of its own.

    python benchmarks/loading.py [--rounds 7] [--save]

Against transformers, on a bert-base with random weights, written by transformers (its header leaves tensors at any
8-byte offset, so minibert copies them: results must not depend on that offset) and by minibert (aligned, so it leaves
them memory-mapped). transformers leaves both memory-mapped:
- from_pretrained, the classes being imported; and from_pretrained with the first forward pass, in which memory-mapped
  weights are really read;
- from the start of the process to the first answer of a fill-mask pipeline.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from common import RESULTS, Contender, append, rows, show

TEXT = "the [MASK] sat on the mat"
WORDS = {0: "[PAD]", 100: "[UNK]", 101: "[CLS]", 102: "[SEP]", 103: "[MASK]"}


def make_checkpoints(directory: Path) -> dict[str, Path]:
    """The same bert-base with random weights, written by each library, with a vocabulary."""
    import torch
    import transformers

    import minibert

    vocabulary = [WORDS.get(i, f"[unused{i}]") for i in range(30522)]
    vocabulary[1000:1005] = ["the", "cat", "sat", "on", "mat"]
    torch.manual_seed(0)
    reference = transformers.BertForMaskedLM(transformers.BertConfig())
    ours = minibert.BertForMaskedLM(minibert.BertConfig())
    ours.load_state_dict(reference.state_dict())
    paths = {}
    for name, model in (("transformers", reference), ("minibert", ours)):
        paths[name] = directory / f"written-by-{name}"
        model.save_pretrained(paths[name])
        (paths[name] / "vocab.txt").write_text("\n".join(vocabulary))
        (paths[name] / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
    return paths


def measure_loading(library: str, path: str) -> dict[str, Any]:
    """In a fresh process: seconds of loading and of loading with one forward pass, and the peak memory after each."""
    import torch

    if library == "minibert":
        from minibert import BertForMaskedLM
    else:
        from transformers import BertForMaskedLM

    ids = torch.arange(1000, 1128)[None]
    # A virtual machine gives free memory back to its host, and getting it again can take longer than all else here:
    # two processes that fill 1 GB and end leave memory at hand
    for _ in range(2):
        subprocess.run([sys.executable, "-c", "import numpy; numpy.ones(125_000_000)"], check=True)
    peaks, start = [peak_megabytes()], time.perf_counter()
    model = BertForMaskedLM.from_pretrained(path)
    loaded = time.perf_counter()
    peaks.append(peak_megabytes())
    with torch.inference_mode():
        logits = model(ids).logits
    first = time.perf_counter()
    peaks.append(peak_megabytes())
    answer = logits[0, ::16, ::1000].flatten().tolist()
    return {"loading": loaded - start, "with forward": first - start, "peaks": peaks, "answer": answer}


def peak_megabytes() -> float:
    """The most memory this process has had so far, memory-mapped pages that were read included (Linux)."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1000


def answer_once(library: str, path: str) -> None:
    """In a fresh process: what a script with a pipeline does."""
    if library == "minibert":
        from minibert import pipeline
    else:
        from transformers import pipeline
    print(json.dumps(pipeline("fill-mask", model=path)(TEXT)[0]["token_str"]))


def child(task: str, library: str, path: Path) -> tuple[Any, float]:
    """Run a task in a fresh process; its result, and the seconds from its start to its end."""
    start = time.perf_counter()
    command = [sys.executable, __file__, "--child", task, library, str(path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1]), time.perf_counter() - start


def benchmark_loading(path: Path, shape: str, rounds: int) -> list[dict[str, Any]]:
    """Rows of from_pretrained, alone and with the first forward pass."""
    libraries = ("transformers", "minibert")
    results: dict[str, list[dict[str, Any]]] = {library: [] for library in libraries}
    for number in range(rounds + 1):
        for library in libraries:
            result, _ = child("loading", library, path)
            if number:  # the first round fills the caches of files
                results[library].append(result)
    pairs = zip(results["minibert"][0]["answer"], results["transformers"][0]["answer"], strict=True)
    assert max(abs(ours - theirs) for ours, theirs in pairs) < 1e-4
    table = []
    for number, task in enumerate(("loading", "with forward"), 1):
        contenders = [Contender(name, print, seconds=[each[task] for each in results[name]]) for name in libraries]
        part = rows(f"from_pretrained {task}", shape, contenders, "transformers")
        for row in part:
            peaks = [each["peaks"] for each in results[row["contender"]]]
            row["peak_mb"] = round(median(peak[number] for peak in peaks))
            row["of_which_imports_mb"] = round(median(peak[0] for peak in peaks))
        table += part
        show(part)
        print("  peak memory: " + ", ".join(f"{row['contender']} {row['peak_mb']} MB" for row in part))
    return table


def benchmark_first_answer(path: Path, shape: str, rounds: int) -> list[dict[str, Any]]:
    """Rows of the time from the start of a process to the answer of its pipeline."""
    contenders = [Contender("transformers", print), Contender("minibert", print)]
    answers = set()
    for number in range(rounds + 1):
        for contender in contenders:
            answer, seconds = child("answer", contender.name, path)
            answers.add(answer)
            if number:
                contender.seconds.append(seconds)
    assert len(answers) == 1, answers
    table = rows("process start to first fill-mask answer", shape, contenders, "transformers")
    show(table)
    return [{**row, "peak_mb": "", "of_which_imports_mb": ""} for row in table]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--save", action="store_true", help="append the rows to results/loading.csv")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        task, library, path = arguments.child
        if task == "answer":
            return answer_once(library, path)
        return print(json.dumps(measure_loading(library, path)))
    with tempfile.TemporaryDirectory() as directory:
        table = []
        for writer, path in make_checkpoints(Path(directory)).items():
            table += benchmark_loading(path, f"bert-base fp32, written by {writer}", arguments.rounds)
        table += benchmark_first_answer(path, "bert-base fp32, written by minibert", arguments.rounds)
    if arguments.save:
        append(table, RESULTS / "loading.csv")


if __name__ == "__main__":
    main()
