"""The page: whole without script and network, for every model and text that there is."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import minibert
from minibert import BertConfig, BertTokenizer, cli
from minibert.study.examine import examine
from minibert.study.page import render
from minibert.weights import hub

SECTIONS = ("tokens", "walk", "proof", "attention", "lens", "mattered", "names", "myths", "try", "manifest")


@pytest.fixture(scope="module")
def tokenizer():
    return BertTokenizer.from_pretrained(hub.default_model())


@pytest.fixture(scope="module")
def model():
    return minibert.BertForPreTraining.from_pretrained(hub.default_model())


class Parsed(HTMLParser):
    """Tags, and what would be fetched or run."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.addresses, self.handlers, self.styles, self.ids = [], [], [], [], []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            if name in ("src", "href", "action", "data", "srcset"):
                self.addresses.append(value)
            if name.startswith("on"):
                self.handlers.append(name)
            if name == "style":
                self.styles.append(value)
            if name == "id":
                self.ids.append(value)


def small(head: str, **changes) -> torch.nn.Module:
    sizes = {"vocab_size": 8192, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "intermediate_size": 48, "max_position_embeddings": 64}  # fmt: skip
    torch.manual_seed(0)
    return getattr(minibert, head)(BertConfig(**{**sizes, **changes})).eval()


def page_of(*arguments, **options) -> tuple[str, dict]:
    seen, facts = examine(*arguments, **{"reference": False, **options})
    return render(seen, facts), facts


def test_whole_page(model, tokenizer):
    page, facts = page_of(
        model, tokenizer, "She opened the [MASK].", "It was dark.", compare="A [MASK] .", reference=True
    )
    parsed = Parsed(page)
    assert [name for name in SECTIONS if name not in parsed.ids] == []
    assert "compare" in parsed.ids
    assert all(a.startswith(("#", "data:image/png;base64,")) for a in parsed.addresses)
    assert parsed.handlers == []
    assert parsed.styles == []  # the policy forbids them
    assert parsed.tags.count("script") == 3
    assert all(row["ulps"] in (0.0, None) for row in facts["proof"].values())
    assert "every one has the same bits" in page
    assert facts["masked"] == [4]
    assert len(facts["walk"]) == 69
    assert len(facts["mattered"]["ablated"]) == 16
    assert set(facts["mattered"]["scores"]) == {"leave_one_out", "gradient_x_input", "attention", "rollout"}
    assert len(facts["myths"]) == 9
    json.dumps(facts)


def test_static_page_has_the_facts(model, tokenizer):
    page, facts = page_of(model, tokenizer, "She opened the [MASK].")
    static = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    for row in facts["walk"]:
        assert html.escape(row["code"]) in static
    for word in facts["lens"]["words"][-1][4]:
        assert html.escape(word) in static
    assert facts["proof"] is None
    assert "not compared" in static


TEXTS = (
    "<script>alert(1)</script> [MASK]",
    "</script><img src=x onerror=alert(1)>",
    "$title ${x} & \"q\" 'q' `",
    "\u2028 \u00fc \u4e2d ]]>",
)


@pytest.mark.parametrize("text", TEXTS)
def test_text_is_only_text(text, tokenizer):
    page, _ = page_of(small("BertForMaskedLM"), tokenizer, text, text, compare=text)
    harmless, _ = page_of(small("BertForMaskedLM"), tokenizer, "a", "a", compare="a")
    parsed = Parsed(page)
    assert set(parsed.tags) == set(Parsed(harmless).tags)
    assert parsed.tags.count("script") == 3
    assert parsed.handlers == []
    data = re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1]
    assert "<" not in data
    json.loads(data)


def test_pieces_that_are_markup_are_escaped(tmp_path):
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "<script>", "</script>", "<img", "&amp;", "a"]
    words = BertTokenizer({piece: i for i, piece in enumerate(pieces)})
    page, facts = page_of(small("BertForMaskedLM", vocab_size=10), words, "a [MASK]")
    assert Parsed(page).tags.count("script") == 3
    assert "</script>" in str(facts["lens"]["words"])


@pytest.mark.parametrize("head", ["BertModel", "BertForNextSentencePrediction", "BertForSequenceClassification",
                                  "BertForTokenClassification", "BertForQuestionAnswering", "BertForMultipleChoice",
                                  "BertForMaskedLM"])  # fmt: skip
def test_every_model(head, tokenizer):
    page, facts = page_of(small(head), tokenizer, "She opened the [MASK].", reference=True)
    assert [name for name in SECTIONS if name not in Parsed(page).ids] == []
    assert (facts["lens"] is None) == (head != "BertForMaskedLM")
    assert all(row["ulps"] in (0.0, None) for row in facts["proof"].values())


def test_without_mask_the_lens_shows_all_tokens(model, tokenizer):
    page, facts = page_of(model, tokenizer, "She opened the door.")
    assert facts["masked"] == []
    assert facts["lens"]["at"] == list(range(7))
    assert "<details open><summary>The likeliest word at each of 7 tokens" in page


def test_a_text_of_one_token_and_one_of_the_most(tokenizer):
    for text in ("a", " ".join(["a"] * 62)):
        page, facts = page_of(small("BertForPreTraining"), tokenizer, text)
        assert facts["sizes"]["T"] == len(text.split()) + 2
        assert Parsed(page).tags.count("svg") > 0


@pytest.mark.parametrize(
    ("text", "pair", "message"),
    [("", None, "text is empty"), (" \n", None, "text is empty"), ("a", " ", "second text is empty"),
     ("a " * 63, None, "65 tokens long: this model takes at most 64")],
)  # fmt: skip
def test_bad_text_is_refused(text, pair, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        examine(small("BertForMaskedLM"), tokenizer, text, pair)


def test_long_texts_keep_the_largest_weights(tokenizer, monkeypatch):
    monkeypatch.setattr("minibert.study.page.MAX_BYTES", 100)
    monkeypatch.setattr("minibert.study.page.QK_BYTES", 640)
    monkeypatch.setattr("minibert.study.examine.BUDGET", 0)
    page, facts = page_of(small("BertForMaskedLM"), tokenizer, "She opened the [MASK] with her key .")
    header = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert header["top"] == 8
    assert facts["masked"][0] in header["qk"]
    assert len(header["qk"]) == 5
    assert "would cost too much" in page


def test_command(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = ["study", "She opened the [MASK].", "--no-reference", "--save", "trace.safetensors"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().out.startswith("study.html: 0.")
    assert Path("study.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    assert Path("trace.safetensors").stat().st_size > 100_000
    assert cli.main([*arguments, "--json", "-o", "other.html", "--compare", "A [MASK]."]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["page"] == "other.html"
    assert facts["compare"]["rows"]
    assert cli.main(["study", ""]) == 1
    assert "text is empty" in capsys.readouterr().err
