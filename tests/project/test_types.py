"""Types for users: each public name is a real class or function to mypy, and mistakes in a user's script are found."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import minibert

ROOT = Path(minibert.__file__).parents[1]
SCRIPT = Path(__file__).parents[1] / "data" / "user_script.py"

MISTAKES = """
import torch
from minibert import AutoModel, BertConfig, BertForMaskedLM, BertTokenizer, SentenceEncoder, optimize, pipeline

encoder = SentenceEncoder.from_pretrained("here")
encoder.encode(["a"], batch_size="8")  # found
encoder.encode(["a"], normalise=True)  # found
encoder.encode(["a"]).cpu()  # found
encoder.encode(["a"], convert_to_tensor=True).numpy()
SentenceEncoder.from_pretrained("here", normalise=True)  # found
BertForMaskedLM.from_pretrained("here", device=3.5)  # found
BertForMaskedLM.from_pretrained("here", output_loading_info=True).eval()  # found
BertForMaskedLM.from_pretrained("here").eval()
optimize("model")  # found
pipeline(3)  # found
pipeline("fill-mask")("text", top_k="3")  # found
BertConfig(hidden_size="32")  # found
AutoModel.from_pretrained("here", device=3.5)  # found
BertForMaskedLM.from_pretrained("here").no_such_method()  # found
BertTokenizer.from_pretrained("here")("text", paddding=True)  # found
minibert_has_no_such_name: BertForMaskedML  # found
"""


def mypy(path: Path, cache: Path) -> list[str]:
    """What mypy --strict says about a file, as where the package is installed: of the package itself nothing."""
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    command = [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--no-color-output", "--no-pretty",
               "--cache-dir", str(cache), str(path)]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode in (0, 1), result.stderr
    return [line for line in result.stdout.splitlines() if path.name in line]


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("mypy")


def test_what_type_checkers_see_is_what_there_is():
    tree = ast.parse((ROOT / "minibert" / "__init__.py").read_text())
    (block,) = [node for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    seen = {}
    for node in block.body:
        assert isinstance(node, ast.ImportFrom)
        for alias in node.names:
            assert alias.asname == alias.name, f"{alias.name}: only `as` itself makes it public to type checkers"
            seen[alias.name] = node.module
    assert seen == {**minibert._MODULE_OF, **dict.fromkeys(minibert._ROOMS, "minibert")}


def test_the_users_script_has_every_public_name():
    imports = [node for node in ast.walk(ast.parse(SCRIPT.read_text())) if isinstance(node, ast.ImportFrom)]
    used = {alias.name for node in imports if node.module == "minibert" for alias in node.names}
    assert used == {*minibert.__all__, *minibert._ROOMS}


def test_the_package_says_that_it_has_types():
    assert (ROOT / "minibert" / "py.typed").is_file()


@pytest.mark.slow
def test_public_names_are_known_to_mypy(tmp_path, cache):
    lines = [f"from minibert import {name}\nreveal_type({name})" for name in minibert.__all__]
    (tmp_path / "names.py").write_text("\n".join(lines) + "\n")
    said = mypy(tmp_path / "names.py", cache)
    assert len(said) == len(minibert.__all__)
    assert not [line for line in said if "Revealed type" not in line or '"Any"' in line]


@pytest.mark.slow
def test_a_users_script_is_clean(cache):
    assert mypy(SCRIPT, cache) == []


@pytest.mark.slow
def test_a_wrong_argument_is_found(tmp_path, cache):
    (tmp_path / "wrong.py").write_text(MISTAKES)
    found = {int(line.split(":")[1]) for line in mypy(tmp_path / "wrong.py", cache) if "error" in line}
    assert found == {number for number, line in enumerate(MISTAKES.splitlines(), 1) if "# found" in line}
