"""The certificate: an in-toto statement of what was compared, on which weights, texts and machine, and what came of it.

Readers of in-toto's `test-result` see subjects, PASSED or FAILED and the tests by name; all else is in `measurements`.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterable, Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import torch

from minibert.parity.comparison import Report, Side, plain
from minibert.parity.inputs import Case
from minibert.parity.steps import visible

SCHEMA_VERSION = 1
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "onnxruntime", "openvino", "onnx")
_VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "MKL_CBWR",
              "MKL_ENABLE_INSTRUCTIONS", "OMP_NUM_THREADS", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")  # fmt: skip


def sha256(data: bytes | str) -> str:
    """The digest of bytes, or of a text in UTF-8, in hexadecimal."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def combined(digests: Iterable[tuple[str, str]]) -> str:
    """One digest of many by name, whatever their order."""
    return sha256("\n".join(f"{name} {digest}" for name, digest in sorted(digests)))


def outputs_digest(side: Side, cases: Sequence[Case]) -> dict[str, str]:
    """SHA-256 of all results of each case, rows of padding left out."""
    found = {}
    for number, case in enumerate(cases):
        parts = [(name, visible(name, x, case).float().contiguous().numpy().tobytes())
                 for name, x in side.outputs(case, number).items() if name != "loss"]  # fmt: skip
        found[case.name] = combined((name, sha256(data)) for name, data in parts)
    return found


def machine() -> dict[str, dict[str, Any]]:
    """What results may depend on, in the groups that `--verify` names: hardware, threads, versions, switches."""
    fields = {}
    if (cpus := Path("/proc/cpuinfo")).exists():
        for line in cpus.read_text().split("\n\n")[0].splitlines():
            name, _, value = line.partition(":")
            fields[name.strip()] = value.strip()
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "hardware": {
            "machine": platform.machine(),
            "cpu": fields.get("model name") or platform.processor(),
            "family": f"{fields.get('cpu family', '')}/{fields.get('model', '')}",
            "flags": sorted((fields.get("flags") or fields.get("Features") or "").split()),
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "threads": {"threads": torch.get_num_threads()},
        "version": versions,
        "switches": {
            "mkldnn": torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled,
            "mkl": torch.backends.mkl.is_available(),
            "float32_matmul_precision": torch.get_float32_matmul_precision(),
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            **{name: os.environ[name] for name in _VARIABLES if name in os.environ},
        },
    }


def statement(
    name: str,
    reports: Sequence[Report],
    weights: dict[str, str],
    files: dict[str, str],
    texts: Sequence[str],
    outputs: dict[str, dict[str, str]],
    command: dict[str, Any],
) -> dict[str, Any]:
    """The certificate as JSON has it.

    Args:
        name: of the model. weights: SHA-256 of each stored tensor; files: of config and vocabulary.
        texts: that were compared on. outputs: of each side, the digest of each case. command: options to repeat it.
    """
    passed = [report for report in reports if report.passed]
    warned = [report for report in passed if report.verdict == "bug"]
    failed = [report for report in reports if not report.passed]
    tests = {"passedTests": passed, "warnedTests": warned, "failedTests": failed}
    digests = [sha256(text) for text in texts]
    return plain({
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [
            {"name": f"{name}/weights", "digest": {"sha256": combined(weights.items())}},
            *({"name": f"{name}/{file}", "digest": {"sha256": digest}} for file, digest in files.items()),
        ],
        "predicateType": "https://in-toto.io/attestation/test-result/v0.1",
        "predicate": {
            "result": "FAILED" if failed or not reports else "WARNED" if warned else "PASSED",
            "configuration": [{"name": "texts", "digest": {"sha256": sha256(" ".join(digests))}}],
            **{key: [f"{r.candidate} against {r.reference}: {r.require}" for r in group if group is not passed
                     or r not in warned] for key, group in tests.items()},
            "measurements": {
                "schema_version": SCHEMA_VERSION,
                "model": name,
                "command": command,
                "machine": machine(),
                "weights": weights,
                "texts": digests,
                "outputs": outputs,
                "comparisons": [report.to_dict() for report in reports],
            },
        },
    })  # fmt: skip


def schema() -> dict[str, Any]:
    """The JSON Schema of a certificate."""
    return json.loads(resources.files("minibert.parity").joinpath("certificate.schema.json").read_text("utf-8"))


def load(file: str) -> dict[str, Any]:
    """Read a certificate. Raises OSError, or ValueError if it is none or of a version that is not known."""
    try:
        found = json.loads(Path(file).read_text("utf-8"))
        version = found["predicate"]["measurements"]["schema_version"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is no parity certificate: {error!r}") from None
    if version != SCHEMA_VERSION:
        raise ValueError(f"{file} has schema_version {version}, this minibert reads {SCHEMA_VERSION}")
    return found


def differences(then: dict[str, Any], now: dict[str, Any]) -> dict[str, list[str]]:
    """What of two certificates' measurements differs: weights, texts, files, outputs, and each group of the machine."""
    found: dict[str, list[str]] = {}
    old, new = (each["predicate"]["measurements"] for each in (then, now))
    for name in sorted(old["weights"].keys() | new["weights"].keys()):
        if old["weights"].get(name) != new["weights"].get(name):
            found.setdefault("weights", []).append(name)
    for number in range(max(len(old["texts"]), len(new["texts"]))):
        if old["texts"][number : number + 1] != new["texts"][number : number + 1]:
            found.setdefault("texts", []).append(f"text {number + 1}")
    subjects = [{s["name"].rpartition("/")[2]: s["digest"]["sha256"] for s in each["subject"]} for each in (then, now)]
    for name in sorted(subjects[0].keys() | subjects[1].keys()):
        if name != "weights" and subjects[0].get(name) != subjects[1].get(name):
            found.setdefault("files", []).append(name)
    for side in sorted(old["outputs"].keys() | new["outputs"].keys()):
        a, b = (each["outputs"].get(side, {}) for each in (old, new))
        if changed := [case for case in {**a, **b} if a.get(case) != b.get(case)]:
            text = f"{side}: {len(changed)} of {len({**a, **b})} cases, {changed[0]} first"
            found.setdefault("outputs", []).append(text)
    for group, values in old["machine"].items():
        others = new["machine"].get(group, {})
        for key in sorted(values.keys() | others.keys()):
            a, b = values.get(key), others.get(key)
            if isinstance(a, list) and isinstance(b, list) and a != b:
                a, b = (sorted(set(one) - set(two)) for one, two in ((a, b), (b, a)))
            if a != b:
                found.setdefault(group, []).append(f"{key} was {a}, is {b}")
    return found


def verdict(found: dict[str, list[str]]) -> tuple[bool, str]:
    """Whether what was certified holds here, and what explains it if not."""
    subjects = [key for key in ("weights", "files", "texts") if key in found]
    if subjects:
        return False, f"not the same subject: {', '.join(subjects)} changed"
    if "outputs" not in found:
        return True, "the same to the last bit"
    causes = [key for key in ("threads", "version", "switches", "hardware") if key in found]
    explained = f"{', '.join(causes)} may explain it" if causes else "nothing that is recorded explains it"
    return False, f"results differ: {explained}"
