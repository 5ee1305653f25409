"""Write docs/tour.md: one pair of sentences from text to loss, with the numbers of the bundled model.

    python tools/tour.py

Code and numbers come from a trace, so the tour says what the program does; a test fails when it no longer does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

import minibert
from minibert import BertForPreTraining, BertTokenizer, NextSentence, study
from minibert.study.steps import PAPERS, kind_of
from minibert.weights import hub

FILE = Path(__file__).parents[1] / "docs" / "tour.md"
FIRST, SECOND, WORD = "She opened the [MASK] with her key.", "The room was dark.", "door"
LAYER = "bert.encoder.layer.0."
SCRIPT = """\
import torch
from minibert import BertConfig, BertForMaskedLM, BertTokenizer
from minibert.weights.hub import default_model

tokenizer = BertTokenizer.from_pretrained(default_model())  # pieces and their ids; the model below starts from nothing
texts = ["she opened the door with her key .", "he closed the window with his hand .", "they left the house at night ."]
batch = tokenizer(texts, padding=True, return_tensors="pt")
config = BertConfig(
    vocab_size=tokenizer.vocab_size, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128
)
torch.manual_seed(0)
model = BertForMaskedLM(config).train()
optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
special = torch.isin(batch["input_ids"], torch.tensor(tokenizer.all_special_ids))
for step in range(60):
    masked = (torch.rand(special.shape) < 0.15) & ~special  # the paper masks 15 % of the tokens
    ids = torch.where(masked, tokenizer.mask_token_id, batch["input_ids"])
    labels = torch.where(masked, batch["input_ids"], -100)  # -100: no label
    output = model(input_ids=ids, attention_mask=batch["attention_mask"], labels=labels)
    output.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    if step % 20 == 0:
        print(step, round(output.loss.item(), 2))
"""


def tour() -> str:
    """The whole page, in Markdown."""
    name = hub.default_model()
    model = BertForPreTraining.from_pretrained(name)
    tokenizer = BertTokenizer.from_pretrained(name)
    inputs = dict(tokenizer(FIRST, SECOND, return_tensors="pt"))
    ids = inputs["input_ids"][0].tolist()
    at, answer = ids.index(tokenizer.mask_token_id), tokenizer.convert_tokens_to_ids([WORD])[0]
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[0, at] = answer
    trace = study.trace(
        model, {**inputs, "labels": labels, "next_sentence_label": torch.tensor([NextSentence.IS_NEXT])}
    )
    pieces = tokenizer.convert_ids_to_tokens(ids)
    parts = [
        _opening(Path(name).name, trace),
        _text(pieces, ids, inputs["token_type_ids"][0].tolist()),
        _embeddings(trace, at),
        _attention(trace, at, pieces),
        _second_half(trace, at),
        _layers(study.lens(model, trace, 3), tokenizer, at),
        _loss(trace, at, answer),
        _names(trace),
        "## Train one yourself\n\nA whole training run to change. With three sentences it learns them by heart; with a "
        f"file of text, it is `minibert pretrain`.\n\n```python\n{SCRIPT}```",
    ]
    return "\n\n".join(parts) + "\n"


def _opening(name: str, trace: study.Trace) -> str:
    sizes = ", ".join(f"{letter} = {size}" for letter, size in trace.sizes.items() if letter != "L")
    return (
        "# The tour\n\n<!-- Written by tools/tour.py. -->\n\n"
        f"Two sentences go through `{name}`, the model that comes with minibert, from text to loss. Every number "
        f"and every "
        "line of code below was read off the running program; `minibert study` does the same with your own text, and "
        f"shows all {len(trace)} steps.\n\nThe letters, as in `model.py`: {sizes} (B batch, T tokens, D hidden "
        f"size, H heads, "
        "K head size, F feed-forward size, V vocabulary)."
    )


def _text(pieces: Sequence[str], ids: Sequence[int], segments: Sequence[int]) -> str:
    rows = [("piece", *pieces), ("id", *ids), ("segment", *segments)]
    return (
        f"## Text to numbers\n\n> {FIRST} {SECOND}\n\nThe tokenizer cuts text into pieces of words and numbers them. "
        f"[MASK] hides the word *{WORD}*; [CLS] opens, [SEP] closes each sentence.\n\n{_table(rows)}"
    )


def _embeddings(trace: study.Trace, at: int) -> str:
    steps = ("word_embeddings", "token_type_embeddings", "position_embeddings", "sum", "LayerNorm")
    return (
        "## Embeddings\n\nEach id picks one of V vectors; its segment and its position pick one each. The three "
        "are added "
        f"and normalised to a mean of 0 and a variance of 1 before a learned scale and shift. At [MASK], token "
        f"{at}:\n\n" + _steps(trace, (f"bert.embeddings.{step}" for step in steps), at)
    )


def _attention(trace: study.Trace, at: int, pieces: Sequence[str]) -> str:
    names = [f"{LAYER}attention.{step}" for step in ("self.query", "self.key", "self.value")]
    weights = [layer[0, :, at] for layer in trace.attentions]  # (H, T)
    layer, head, _ = max(
        ((n, h, row.max()) for n, rows in enumerate(weights[1:], 1) for h, row in enumerate(rows)), key=lambda x: x[2]
    )
    row = weights[layer][head]
    scores, weighed = (trace.step(f"{LAYER}attention.self.{part}").source.code for part in ("scores", "weights"))
    context = trace.step(f"{LAYER}attention.self.context").source.code
    return (
        "## Attention\n\nThree linear maps make of every token a question, an offer and a content:\n\n"
        + _steps(trace, names, at)
        + "\n\nA head compares the question of one token with the offers of all, and softmax turns the scores into "
        "weights "
        f"that sum to 1:\n\n```python\n{scores}\n{weighed}\n```\n\nHow much [MASK] takes from each token in head "
        f"{head + 1} of layer {layer + 1}, where it takes most from one:\n\n"
        + _table([("piece", *pieces), ("weight", *map(_number, row.tolist()))])
        + "\n\nThe contents, weighted so, are the new state. The model does all three in one fused kernel:\n\n"
        f"```python\n{context}\n```"
    )


def _second_half(trace: study.Trace, at: int) -> str:
    steps = ("attention.output.dense", "attention.output.residual", "attention.output.LayerNorm", "intermediate.dense",
             "intermediate.intermediate_act_fn", "output.dense", "output.residual", "output.LayerNorm")  # fmt: skip
    return (
        "## The rest of a layer\n\nThe heads are joined and mixed, what came in is added, and the sum is "
        "normalised. Then "
        "each token goes through two linear maps with GELU between them, and again what came in is added.\n\n"
        + _steps(trace, (LAYER + step for step in steps), at)
    )


def _layers(lens: Sequence[study.Lens], tokenizer: BertTokenizer, at: int) -> str:
    rows = [("after layer", "likeliest words at [MASK]")]
    for layer in lens:
        words = tokenizer.convert_ids_to_tokens(layer.ids[0, at].tolist())
        chances = layer.probabilities[0, at].tolist()
        said = ", ".join(f"`{word}` {_number(chance)}" for word, chance in zip(words, chances, strict=True))
        rows.append((str(layer.layer) if layer.layer else "embeddings", said))
    return (
        f"## Layer upon layer\n\nThe same happens {len(lens) - 1} times, each time with other weights. The head of "
        f"masked "
        "words, put on the state after each layer (it was trained for the last one alone), shows the answer come "
        f"about:\n\n{_table(rows)}"
    )


def _loss(trace: study.Trace, at: int, answer: int) -> str:
    output = trace.output
    words, follows = output.prediction_logits[0, at].softmax(-1), output.seq_relationship_logits[0]
    chance = words[answer].item()
    return (
        "## Answers and loss\n\n"
        "The head of masked words compares the last state with all V word embeddings:\n\n"
        + _steps(
            trace, [f"cls.predictions.{part}" for part in ("transform.dense", "transform.LayerNorm", "decoder")], at
        )
        + f"\n\n*{WORD}* gets probability {_number(chance)}, so its loss is -log {_number(chance)} = "
        f"{_number(output.mlm_loss.item())}. The state of [CLS] goes through the pooler, and two logits say "
        f"whether the "
        f"second sentence follows the first: {_number(follows[0].item())} (it does: label 0) and "
        f"{_number(follows[1].item())} (it does not: label 1). It does, and the loss is "
        f"{_number(output.nsp_loss.item())}. Pretraining adds the two: **{_number(output.loss.item())}**."
    )


def _names(trace: study.Trace) -> str:
    rows = [("here and in transformers", "equation", "shapes", "Google's TensorFlow", "paper")]
    seen = set()
    for step in trace:
        short = step.name.replace(".layer.0.", ".layer.N.")
        if ".layer." in step.name and ".layer.0." not in step.name:
            continue
        kind = kind_of(step.name)
        variable = study.google_variable(f"{step.module}.weight") if step.params else None
        there = f"`{variable}`".replace("layer_0", "layer_N") if variable else f"in `{kind.google}`"
        if short not in seen:
            rows.append((f"`{short}`", f"`{step.equation}`", f"`{step.letters}`", there, kind.paper))
        seen.add(short)
    papers = "; ".join(f"{name}: {paper}" for name, paper in PAPERS.items())
    return (
        "## A map of names\n\nAll steps, those of one layer for all. Kernels are stored transposed in TensorFlow. "
        f"Papers, with the number of the section: {papers}.\n\n{_table(rows)}"
    )


def _steps(trace: study.Trace, names: Iterable[str], at: int) -> str:
    rows = [("step", "code", "first values")]
    for name in names:
        x: Tensor = trace[name][0]
        values = " ".join(map(_number, x[at if len(x) > at else 0, :4].tolist()))
        short = name.removeprefix(LAYER).removeprefix("bert.").removeprefix("cls.predictions.")
        rows.append((f"`{short}`", f"`{trace.step(name).source.code}`", values))
    return _table(rows)


def _table(rows: Sequence[Sequence[object]]) -> str:
    head, *body = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float) -> str:
    """Two decimals: the rounding of another CPU does not show, but where it falls right between two."""
    return f"{value:.2f}".replace("-0.00", "0.00")


def main() -> int:
    FILE.write_text(tour(), encoding="utf-8")
    print(f"{FILE.name} written with minibert {minibert.__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
