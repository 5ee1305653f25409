"""README.md cannot drift: its Python runs, its commands run, its files exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from minibert import cli
from minibert.weights import hub

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
# Commands that are shown and not run here: they train, or read files of the reader's own
NOT_RUN = ("minibert pretrain", "minibert finetune", "minibert convert", "minibert embed")


def local(text: str) -> str:
    """The same text with the bundled model in place of the Hub's names, which are not here."""
    return re.sub(r"bert-base-(un)?cased", Path(hub.default_model()).name, text)


def test_python():
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 3
    exec(compile(local("\n".join(blocks)), "README.md", "exec"), {"__name__": "readme"})


@pytest.mark.parametrize("command", re.findall(r"^    (minibert .*)$", README, re.MULTILINE))
def test_commands(command, capsys):
    arguments = shlex.split(local(command), comments=True)[1:]
    if command.startswith(NOT_RUN):
        cli.build_parser().parse_args(arguments)
        return
    if "--help" in arguments:
        with pytest.raises(SystemExit, match="0"):
            cli.main(arguments)
    else:
        assert cli.main(arguments) == 0
    assert capsys.readouterr().out


def test_make_targets():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"make ([a-z]+)", README)
    assert {"demo", "test"} <= set(named) <= set(targets)


def test_files_named_are_there():
    table = README.split("## Read it")[1].split("\n## ")[0]
    rows = [row for row in table.splitlines() if row.startswith("| `")]
    named = {name.rstrip("/") for row in rows for name in re.findall(r"`([a-z_/]+(?:\.py|/))`", row.split("|")[1])}
    rooms = {path.name for path in (ROOT / "minibert").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert named == rooms - {"__init__.py", "__main__.py", "__pycache__", "models"}


def test_links():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
