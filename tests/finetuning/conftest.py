"""A model to start from, and one fine-tuned on the weather; each made once."""

from __future__ import annotations

import finetune_case as case
import pytest


@pytest.fixture(scope="session")
def start(tmp_path_factory):
    return case.make_start(tmp_path_factory.mktemp("start"))


@pytest.fixture(scope="session")
def trained(start, tmp_path_factory):
    """train.csv, dev.csv, and the run of three epochs on them; read only."""
    out = tmp_path_factory.mktemp("trained")
    train, dev = case.weather(out / "train.csv", 200, 0), case.weather(out / "dev.csv", 60, 1)
    assert case.run(start, out / "run", train, dev) == 0
    return out
