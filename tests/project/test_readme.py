"""README.md and the guide cannot drift: their Python runs, their commands run, their files exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from minibert import cli
from minibert.weights import hub

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# Commands that are shown and not run here: they train, or read files of the reader's own
NOT_RUN = ("minibert pretrain", "minibert finetune", "minibert convert", "minibert embed", "minibert parity")


def local(text: str) -> str:
    """The same text with the bundled model in place of the Hub's names, which are not here."""
    return re.sub(r"bert-base-(un)?cased", Path(hub.default_model()).name, text)


# Their Python is lines of the model, and of a test of the reader's own
SHOWN_ONLY = ("tour.md", "parity.md")


@pytest.mark.parametrize(
    "page", [page for page in PAGES if page.name not in SHOWN_ONLY], ids=lambda page: str(page.relative_to(ROOT))
)
def test_python(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where some save what they make
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    exec(compile(local("\n".join(blocks)), str(page), "exec"), {"__name__": "readme"})


def test_the_readme_answers_first():
    assert README.index("```python") < README.index("## Import it") < README.index("## Study it")


COMMANDS = [(page, command) for page in PAGES for command in re.findall(r"^    (minibert .*)$", page.read_text(), re.M)]


@pytest.mark.parametrize("command", dict.fromkeys(command for _, command in COMMANDS))
def test_commands(command, capsys, tmp_path, monkeypatch):
    arguments = shlex.split(local(command), comments=True)[1:]
    if command.startswith(NOT_RUN):
        cli.build_parser().parse_args(arguments)
        return
    monkeypatch.chdir(tmp_path)  # where some write what they are asked for
    if "--help" in arguments:
        with pytest.raises(SystemExit, match="0"):
            cli.main(arguments)
    else:
        assert cli.main(arguments) == 0
    assert capsys.readouterr().out


def test_make_targets():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"^    make ([a-z]+)", README, re.MULTILINE)
    assert {"demo", "test"} <= set(named) <= set(targets)


def test_the_house_is_described():
    text = README.split("## Study it")[1].split("\n## ")[0]
    named = {name.rstrip("/") for name in re.findall(r"`([a-z_]+(?:\.py|/))`", text)}
    rooms = {path.name for path in (ROOT / "minibert").iterdir() if path.suffix == ".py" or path.is_dir()}
    assert named == rooms - {"__init__.py", "__main__.py", "__pycache__", "models"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links(page):
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target
