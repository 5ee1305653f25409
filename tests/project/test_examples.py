"""The examples run as their reader would run them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import pytest

from minibert import SentenceEncoder

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.slow
def test_ray_embed(minilm_dir, tmp_path, monkeypatch):
    texts = [f"This is text number {i}." for i in range(700)]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    command = [sys.executable, EXAMPLES / "ray_embed.py", tmp_path / "texts.txt", tmp_path / "out"]
    subprocess.run([*command, "--model", minilm_dir, "--actors", "1"], check=True, timeout=240)
    rows = [
        row for part in sorted((tmp_path / "out").glob("*.parquet")) for row in parquet.read_table(part).to_pylist()
    ]
    assert [row["text"] for row in rows] == texts
    expected = SentenceEncoder.from_pretrained(minilm_dir).encode(texts)
    assert np.abs(np.array([row["embedding"] for row in rows]) - expected).max() < 1e-6
