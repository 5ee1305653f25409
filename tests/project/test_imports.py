"""The house keeps its arrows: each module imports only what is below it, and the package itself imports nothing."""

from __future__ import annotations

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "minibert"

# A module or folder of the package -> what it may import of the package
ARROWS: dict[str, set[str]] = {
    "__init__": set(),
    "__main__": {"cli"},
    "checks": set(),
    "terminal": {"weights"},
    "activations": set(),
    "outputs": set(),
    "weights": set(),
    "compat": {"weights"},
    "config": {"activations", "compat"},
    "inputs": {"config"},
    "base": {"compat", "config", "outputs", "weights"},
    "model": {"activations", "base", "config", "inputs", "outputs"},
    "heads": {"activations", "base", "config", "inputs", "model", "outputs"},
    "text": {"weights"},
    "fast": {"model", "heads", "outputs", "inputs", "base", "config", "activations", "weights"},
    "pipelines": {"base", "model", "heads", "text", "fast", "weights"},
    "demo": {"heads", "weights", "pipelines", "text"},
    "embedding": {"compat", "config", "fast", "model", "pipelines", "terminal", "text", "weights"},
    "training": {"heads", "model", "config", "weights"},
    "pretraining": {"training", "heads", "text", "model", "config", "fast", "weights", "terminal"},
    "finetuning": {"terminal", "training", "pipelines", "embedding", "heads", "text", "model", "config", "weights"},
    "study": {"model", "heads", "inputs", "outputs", "config", "text", "weights", "terminal"},
    "parity": {"study", "model", "heads", "inputs", "outputs", "config", "text", "weights", "fast", "base", "terminal"},
}
READ_FIRST = ("config.py", "model.py", "heads.py")


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """Rooms of the package that a file imports, at its top or inside a function; not those it names in types alone."""
    rooms = set()
    tree = ast.parse(path.read_text())
    types = [node for node in ast.walk(tree) if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"]
    for_types = {id(inner) for node in types for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            names = [f"{base}.{alias.name}" for alias in node.names] if base == "minibert" else [base]
        else:
            continue
        for name in names:
            assert not name.startswith("."), f"{path}: import by the full name, not {name}"
            if name.startswith("minibert."):
                rooms.add(name.split(".")[1])
    return rooms - {room(path), "__version__"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_arrows(path):
    if room(path) in ("cli", "commands"):
        return  # may import all
    assert room(path) in ARROWS, f"{path.name} has no place in the house: give it one here and in README.md"
    assert imported_rooms(path) - {"checks"} <= ARROWS[room(path)]  # which every room may use: it uses none


def test_no_module_reaches_itself():
    def below(name: str) -> set[str]:
        return ARROWS.get(name, set()).union(*(below(other) for other in ARROWS.get(name, set())))

    for name in ARROWS:
        assert name not in below(name)


def imported_files(path: Path) -> set[Path]:
    """Files of the package that a file imports: at its top, inside a function, and for types alone."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "minibert":
            folder = PACKAGE.parent / Path(*node.module.split("."))
            for name in [alias.name for alias in node.names]:
                files = (folder / f"{name}.py", folder / name / "__init__.py", folder.with_suffix(".py"))
                found.add(next((file for file in files if file.is_file()), folder / "__init__.py"))
    return found - {path, PACKAGE / "__init__.py"}  # which hands names on, and loads what it is asked for


def test_no_file_reaches_itself():
    files = {path: imported_files(path) for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"}
    assert sum(map(len, files.values())) > len(files)
    list(graphlib.TopologicalSorter(files).static_order())  # raises CycleError, with the files


def test_sizes():
    files = list(PACKAGE.rglob("*.py"))
    for path in files:
        lines = path.read_text().splitlines()
        assert len(lines) <= 500, path
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path}: {node.name}"
    assert not [path for path in files if path.name == "utils.py"]
    assert sum(len((PACKAGE / name).read_text().splitlines()) for name in READ_FIRST) < 800


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_importing_the_package_pulls_in_nothing_heavy():
    loaded = run("import sys, minibert; print(*sys.modules)").split()
    assert not {"torch", "numpy", "transformers", "triton", "huggingface_hub", "tokenizers"} & set(loaded)


def test_the_model_needs_torch_only():
    loaded = run("import sys, minibert; minibert.BertForPreTraining; print(*sys.modules)").split()
    assert not {"transformers", "triton", "huggingface_hub", "matplotlib"} & set(loaded)


def test_public_names_resolve():
    code = "import minibert; [getattr(minibert, name) for name in minibert.__all__]; print(len(minibert.__all__))"
    assert int(run(code)) > 10
    with pytest.raises(AttributeError, match=r"no 'BertModle'; it has .*BertModel"):
        import minibert

        minibert.BertModle


def test_the_models_import_hardly_more_than_torch():
    """Seconds cannot be asserted on shared machines; what is imported can: their own files and a little of Python's."""
    code = """
import sys, torch
before = set(sys.modules)
import minibert
minibert.BertForPreTraining
print(*sorted(set(sys.modules) - before))
"""
    loaded = run(code).split()
    assert "minibert.heads" in loaded
    foreign = [name for name in loaded if name.split(".")[0] not in {*sys.stdlib_module_names, "minibert"}]
    assert foreign == []
    rooms = {name.split(".")[1] for name in loaded if name.startswith("minibert.")}
    assert not rooms & {"text", "fast", "pipelines", "embedding", "training", "pretraining", "finetuning"}
    assert len(loaded) < 60
