"""The tour says what the program does."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NUMBER = re.compile(r"-?\d+\.\d\d\b")


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("tour", ROOT / "tools" / "tour.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tour_is_not_stale(tool):
    """The same text; numbers may differ by the last digit that is printed, where another CPU rounds the other way."""
    written, made = tool.FILE.read_text(encoding="utf-8"), tool.tour()
    assert NUMBER.sub("#", written) == NUMBER.sub("#", made), "run: python tools/tour.py"
    for before, now in zip(NUMBER.findall(written), NUMBER.findall(made), strict=True):
        assert abs(float(before) - float(now)) < 0.0101, "run: python tools/tour.py"


def test_the_script_trains(tool, capsys):
    assert tool.SCRIPT in tool.FILE.read_text(encoding="utf-8")
    assert len(tool.SCRIPT.splitlines()) <= 30
    exec(compile(tool.SCRIPT, "script", "exec"), {})
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert losses[-1] < losses[0] / 2
