"""The page in a real browser: all is drawn, all is reached from the URL's hash, nothing is asked of the network."""

from __future__ import annotations

import itertools
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
        words = itertools.cycle(["[MASK]", "the", "door", "<script>", "document.title", "=", "1", "</script>"])
        text = ""
        while (size := len(tokenizer(text)["input_ids"])) < length:
            longer = f"{text} {next(words)}"
            text = longer if len(tokenizer(longer)["input_ids"]) <= length else text
        assert size == length
        seen, facts = examine(model, tokenizer, text, compare="a [MASK]", reference=False)
        found[length] = tmp_path_factory.mktemp("page") / f"study-{length}.html"
        found[length].write_text(render(seen, facts), encoding="utf-8")
    patch.undo()
    return found


def browse(page: Path, folder: Path, hash_: str = "") -> tuple[str, str, list[str]]:
    """The page's tree after its script has run, what Chromium said, and all addresses that it asked for.

    Chromium itself may hang, where its processes are stopped for a while say: it is started once more then.
    """
    try:
        return _browse(page, folder / "first", hash_)
    except subprocess.TimeoutExpired:
        return _browse(page, folder / "second", hash_)


def _browse(page: Path, folder: Path, hash_: str) -> tuple[str, str, list[str]]:
    folder.mkdir(parents=True)
    log = folder / "net.json"
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", f"--log-net-log={log}",
               "--host-resolver-rules=MAP * ~NOTFOUND", "--virtual-time-budget=30000", "--dump-dom",
               f"file://{page}{hash_}"]  # fmt: skip
    environment = {**os.environ, "HOME": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment, check=True)
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


USER = """<script>
const wait = () => new Promise((done) => setTimeout(done, 50)), did = [];
const choose = (id, value) => { $(id).value = value; $(id).dispatchEvent(new Event("change")); };
const click = (node, x = 0.5, y = 0.5) => {
  const box = node.getBoundingClientRect();
  const at = { clientX: box.left + x * box.width, clientY: box.top + y * box.height };
  node.dispatchEvent(new MouseEvent("click", { bubbles: true, cancelable: true, ...at }));
};
const find = (selector) => document.querySelector(selector), side = 5 * 26 + 96;  // of the matrix of 5 tokens
const actions = [
  () => choose("layer", 2), () => choose("head", 5), () => choose("token", 1), () => choose("key", 3),
  () => click(document.querySelectorAll(".chip")[2]),
  () => click(find("#grid img"), 3.5 / 12, 1.5 / 6),
  () => click(find("#matrix svg"), (92 + 1.5 * 26) / side, (92 + 4.5 * 26) / side),
  () => click(find("#lines svg"), 0.2, 0.1), () => click(find("#lines svg"), 0.8, 0.6),
  () => { location.hash = "walk"; }, () => choose("layer", 4),
  () => find("#attention td a").click(),
  () => choose("find", "QUERY"),
];
(async () => {
  while (!$("selftest").value) await wait();
  for (const act of actions) { act(); await wait(); did.push({ hash: location.hash, ...last }); }
  document.body.append(Object.assign(document.createElement("output"), { id: "did", value: JSON.stringify(did) }));
})();
</script>"""


def test_every_control_works_and_is_in_the_hash(pages, tmp_path):
    """A user's clicks and choices, by a script of ours beside the page's own; what is not chosen anew stays."""
    text = pages[5].read_text(encoding="utf-8")
    text = re.sub(r"script-src '[^']*'", "script-src 'unsafe-inline'", text).replace("</html>", f"{USER}</html>")
    page = tmp_path / "used.html"
    page.write_text(text, encoding="utf-8")
    dom, said, _ = browse(page, tmp_path)
    assert "Uncaught" not in said
    did = json.loads(unescape(re.search(r'<output id="did">(.*?)</output>', dom, re.DOTALL)[1]))
    expected = [
        {"layer": 2}, {"head": 5}, {"token": 1}, {"key": 3}, {"token": 2}, {"layer": 1, "head": 3},
        {"token": 4, "key": 1}, {"token": 0}, {"key": 3}, {}, {"layer": 4}, {"layer": 0, "head": 0}, {"find": "QUERY"},
    ]  # fmt: skip
    now = {"layer": 5, "head": 0, "token": did[0]["token"], "find": ""}
    for change, after in zip(expected, did, strict=True):
        now |= {name: value for name, value in change.items() if name != "key"}  # a key is that of one token alone
        assert {**after, **now, **change} == after
        assert after["hash"] == "#walk" if not change else all(f"{k}={v}" in after["hash"] for k, v in change.items())
    rows = re.findall(r"<tr([^>]*)>(.*?)</tr>", dom[dom.index('<section id="names">') :], re.DOTALL)
    shown = [row for hidden, row in rows if "hidden" not in hidden and "<td" in row and ".layer." in row]
    assert shown
    assert all("query" in row for row in shown)


def test_policy_forbids_the_network(pages, tmp_path):
    """What a text could at worst bring in, put there by hand: the browser itself refuses to run or to fetch it."""
    bad = "<script>document.body.id='ran'</script><img src='https://example.org/x.png' onerror='document.body.id=1'>"
    page = tmp_path / "bad.html"
    page.write_text(pages[5].read_text(encoding="utf-8").replace("<main>", f"<main>{bad}"), encoding="utf-8")
    dom, said, asked = browse(page, tmp_path)
    assert "<body id=" not in dom
    assert "violates" in said or "Refused" in said
    assert not [address for address in asked if "example.org" in address]
