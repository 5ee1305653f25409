"""The examples run as their reader would run them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import torch
from reference import assert_as_exact

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
    found = torch.tensor([row["embedding"] for row in rows])
    expected, exact = (
        SentenceEncoder.from_pretrained(minilm_dir, dtype=dtype, device="cpu").encode(texts, convert_to_tensor=True)
        for dtype in ("float32", "float64")
    )
    assert_as_exact(found, expected, exact)  # batches of another size sum in another order
