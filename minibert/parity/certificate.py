"""The certificate: an in-toto statement of what was compared, on which weights, texts and machine, and what came of it.

Readers of in-toto's `test-result` see subjects, PASSED or FAILED and the tests by name; all else is in `measurements`.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Sequence
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import torch

from minibert.parity.inputs import Case
from minibert.parity.sides import Side
from minibert.parity.steps import visible
from minibert.parity.verdict import Report, finite

SCHEMA_VERSION = 1
SUBJECTS = ("weights", "files", "texts")
FACTS = ("threads", "version", "switches", "hardware")  # that results may depend on
Digests = dict[str, str]  # SHA-256 by name
_PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "onnxruntime", "openvino", "onnx")
_VARIABLES = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE", "MKL_CBWR",
              "MKL_ENABLE_INSTRUCTIONS", "OMP_NUM_THREADS", "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE")  # fmt: skip


def sha256(data: bytes | str) -> str:
    """The digest of bytes, or of a text in UTF-8, in hexadecimal."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def combined(digests: Digests) -> str:
    """One digest of many by name, whatever their order."""
    return sha256("\n".join(f"{name} {digest}" for name, digest in sorted(digests.items())))


def outputs_digests(side: Side, cases: Sequence[Case]) -> Digests:
    """SHA-256 of all results of each case, rows of padding left out."""
    return {
        f"{side.name}, {case.name}": combined({
            name: sha256(visible(name, x, case).contiguous().flatten().view(torch.uint8).numpy().tobytes())
            for name, x in side.outputs(case).items()
        })
        for case in cases
    }  # fmt: skip


def machine() -> dict[str, dict[str, Any]]:
    """What results may depend on, in the groups of FACTS."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().split("\n\n")[0].splitlines() if cpus.exists() else []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    versions = {"python": platform.python_version()}
    for each in metadata.distributions():
        if each.name in _PACKAGES:
            versions.setdefault(each.name, each.version)
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
    name: str, reports: Sequence[Report], command: dict[str, Any], chosen: dict[str, str], **digests: Digests
) -> dict[str, Any]:
    """The certificate as JSON has it.

    Args:
        name: of the model. reports: of each comparison. command: options to repeat it. chosen: the kernels of each
            fast side, which won a race on this machine.
        digests: SHA-256 by name of "weights" (each stored tensor), "files", "texts" and "outputs" (each case of each
            side).
    """
    groups: dict[str, list[str]] = {"passedTests": [], "warnedTests": [], "failedTests": []}
    for each in reports:
        result = "failedTests" if not each.passed else "warnedTests" if each.verdict == "bug" else "passedTests"
        groups[result].append(f"{each.candidate} against {each.reference}: {each.require}")
    failed, warned = groups["failedTests"] or not reports, groups["warnedTests"]
    facts = machine()
    facts["switches"] |= chosen
    subjects = {"weights": combined(digests["weights"]), **digests["files"]}
    return finite({
        "_type": "https://in-toto.io/Statement/v1",
        "subject": [{"name": f"{name}/{file}", "digest": {"sha256": digest}} for file, digest in subjects.items()],
        "predicateType": "https://in-toto.io/attestation/test-result/v0.1",
        "predicate": {
            "result": "FAILED" if failed else "WARNED" if warned else "PASSED",
            "configuration": [{"name": "texts", "digest": {"sha256": combined(digests["texts"])}}],
            **groups,
            "measurements": {
                "schema_version": SCHEMA_VERSION, "model": name, "command": command, **digests, **facts,
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
        measured = found["predicate"]["measurements"]
        version = measured["schema_version"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{file} is no parity certificate: {error!r}") from None
    if version != SCHEMA_VERSION:
        raise ValueError(f"{file} has schema_version {version}, this minibert reads {SCHEMA_VERSION}")
    needed = ("command", "outputs", *SUBJECTS, *FACTS)
    if absent := [name for name in needed if not isinstance(measured.get(name), dict)]:
        raise ValueError(f"{file} is no parity certificate: it has no {', '.join(absent)}")
    return found


def differences(then: dict[str, Any], now: dict[str, Any]) -> dict[str, list[str]]:
    """What of two certificates' measurements differs, by group: names of tensors, texts and cases, values of facts."""
    found: dict[str, list[str]] = {}
    old, new = (each["predicate"]["measurements"] for each in (then, now))
    for group in (*SUBJECTS, "outputs", *FACTS):
        for name in {**old[group], **new[group]}:
            a, b = old[group].get(name), new[group].get(name)
            if isinstance(a, list) and isinstance(b, list) and a != b:
                a, b = sorted(set(a) - set(b)), sorted(set(b) - set(a))
            if a != b:
                found.setdefault(group, []).append(f"{name} was {a}, is {b}" if group in FACTS else name)
    return found


def verdict(found: dict[str, list[str]]) -> tuple[bool, str]:
    """Whether what was certified holds here, and what explains it if not."""
    if subjects := [key for key in SUBJECTS if key in found]:
        return False, f"not the same subject: {', '.join(subjects)} changed"
    if "outputs" not in found:
        return True, "the same to the last bit"
    causes = [key for key in FACTS if key in found]
    explained = f"{', '.join(causes)} may explain it" if causes else "nothing that is recorded explains it"
    return False, f"results differ: {explained}"
