"""The page in a real browser: all is drawn, all is reached from the URL's hash, nothing is asked of the network."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html import unescape
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch

import minibert
from minibert import BertConfig, BertTokenizer
from minibert.study.examine import examine
from minibert.study.page import render
from minibert.weights import hub

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --enable-logging=stderr --v=0"
).split()
LENGTHS = (5, 128, 512)

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed")]


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[int, Path]:
    """Pages of texts of so many tokens, by a small model of many heads, with markup among the words."""
    torch.manual_seed(0)
    tokenizer = BertTokenizer.from_pretrained(hub.default_model())
    model = minibert.BertForPreTraining(
        BertConfig(vocab_size=8192, hidden_size=48, num_hidden_layers=6, num_attention_heads=12, intermediate_size=64)
    ).eval()
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    found = {}
    patch = pytest.MonkeyPatch()
    patch.setattr("minibert.study.examine.BUDGET", 2e9)
    for length in LENGTHS:
        words = ["[MASK]", "<script>", "document.title", "=", "1", "</script>", "the", "door"]
        text = " ".join(words[i % 8] for i in range(length))
        while len(tokenizer(text)["input_ids"]) > length:
            text = text.rpartition(" ")[0]
        seen, facts = examine(model, tokenizer, text, compare="a [MASK]", reference=False)
        found[length] = tmp_path_factory.mktemp("page") / f"study-{length}.html"
        found[length].write_text(render(seen, facts), encoding="utf-8")
    patch.undo()
    return found


def browse(page: Path, folder: Path, hash_: str = "") -> tuple[str, str, list[str]]:
    """The page's tree after its script has run, what Chromium said, and all addresses that it asked for."""
    log = folder / "net.json"
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}",
               "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=30000", "--dump-dom",
               f"file://{page}{hash_}"]  # fmt: skip
    environment = {**os.environ, "HOME": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=environment, check=True)
    asked = re.findall(r'"url":"([^"]+)"', log.read_text(encoding="utf-8", errors="replace"))
    return done.stdout, done.stderr, asked


def selftest(dom: str) -> dict:
    found = re.search(r'<output id="selftest">(.*?)</output>', dom, re.DOTALL)
    assert found, "the script did not come to its end"
    return json.loads(unescape(found[1]))


@pytest.mark.parametrize("length", LENGTHS)
def test_opens_whole_and_alone(length, pages, tmp_path, record_property):
    dom, said, asked = browse(pages[length], tmp_path)
    result = selftest(dom)
    record_property("bytes", pages[length].stat().st_size)
    record_property("seconds", result["seconds"])
    assert pages[length].stat().st_size < 8_000_000
    assert result["bytes"] is True
    assert result["worst"] <= length**0.5 / 255  # rows of weights sum to 1, each rounded to a byte
    assert result["drawn"] == 4  # matrix, lines, q.k terms, lens
    assert "<title>document" not in dom
    assert not re.search(r"CONSOLE.*(Uncaught|Error|Refused|violates)", said), said
    outside = {a for a in asked if not a.startswith(("file:", "data:", "chrome", "devtools", "about:", "blob:"))}
    from_page = {a for a in outside if "google" not in a and "gvt1" not in a}  # the browser's own look-ups
    assert not from_page
    for name in ("tokens", "walk", "proof", "attention", "lens", "mattered", "compare", "names", "myths", "try"):
        assert f'id="{name}"' in dom


def test_state_is_in_the_hash(pages, tmp_path):
    dom, _, _ = browse(pages[128], tmp_path, "#layer=3&head=2&token=4&key=1")
    result = selftest(dom)
    assert {name: result[name] for name in ("layer", "head", "token", "key")} == {
        "layer": 3,
        "head": 2,
        "token": 4,
        "key": 1,
    }
    assert "Layer 4, head 3" in dom
    assert 'class="chip s0 on" href="#token=4"' in dom
    for name in ("matrix", "lines", "pair", "course"):  # each figure can be saved, as a whole picture
        figure = re.search(rf'<figure id="{name}"[^>]*>(.*?)</figure>', dom, re.DOTALL)[1]
        picture = re.search(r'href="data:image/svg\+xml,([^"]+)"', figure)[1]
        assert ElementTree.fromstring(unquote(unescape(picture))).tag.endswith("svg")
    wrong, _, _ = browse(pages[5], tmp_path / "other", "#layer=99&head=-1&token=x")
    assert selftest(wrong)["layer"] == 5
    assert selftest(wrong)["head"] == 0


def test_policy_forbids_the_network(pages, tmp_path):
    """What a text could at worst bring in, put there by hand: the browser itself refuses to run or to fetch it."""
    bad = "<script>document.body.id='ran'</script><img src='https://example.org/x.png' onerror='document.body.id=1'>"
    page = tmp_path / "bad.html"
    page.write_text(pages[5].read_text(encoding="utf-8").replace("<main>", f"<main>{bad}"), encoding="utf-8")
    dom, said, asked = browse(page, tmp_path)
    assert "<body id=" not in dom
    assert "violates" in said or "Refused" in said
    assert not [address for address in asked if "example.org" in address]
