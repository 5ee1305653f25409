"""The facts of one text as one HTML file: readable and printable without script, asking nothing of the network."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import struct
import textwrap
import zlib
from collections.abc import Iterable, Sequence
from importlib.resources import files
from itertools import groupby
from string import Template
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from minibert.study.exercises import EXERCISES
from minibert.study.trace import Trace
from minibert.study.twin import equal_steps

MAX_BYTES = 4_000_000  # of attention weights before compression; above, the largest of each row are kept
QK_BYTES = 1_500_000  # of query and key vectors
TOP = 8
Facts = dict[str, Any]


class Markup(str):
    """Text that is HTML already; everything else is escaped."""


def render(seen: Trace, facts: Facts) -> str:
    """The whole page."""
    parts = {name: (files("minibert.study") / name).read_text("utf-8") for name in ("page.html", "page.css", "page.js")}
    maps = torch.stack([weights[0].float() for weights in seen.attentions])  # (layers, H, T, T)
    header, payload = _payload(seen, maps, facts)
    data = json.dumps(header).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    digest = {name: base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for name, part in parts.items()}
    policy = (
        f"default-src 'none'; script-src 'sha256-{digest['page.js']}'; style-src 'sha256-{digest['page.css']}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )
    sizes = ", ".join(f"{letter} = {size:,}" for letter, size in seen.sizes.items() if letter != "L")
    total = f"{len(seen)} steps, {seen.flops / 1e6:,.1f} million operations, {seen.params:,} parameters; {sizes}"
    text = textwrap.shorten(facts["text"] + (f" / {facts['pair']}" if facts["pair"] else ""), 150, placeholder=" ...")
    sections = {name: build(facts) for name, build in SECTIONS.items()}
    named = {"title": cell(text), "model": cell(facts["model"]), "summary": cell(total), "policy": policy}
    files_ = {"css": parts["page.css"], "script": parts["page.js"], "data": data, "payload": payload}
    return Template(parts["page.html"]).substitute(sections, grid=_grid(maps), **named, **files_)


def cell(value: Any) -> str:
    """A value as HTML: escaped, unless it is Markup already."""
    return value if isinstance(value, Markup) else html.escape(str(value))


def lines(first: Any, *rest: Any) -> Markup:
    """A value in a cell, and others below it in small print."""
    return Markup("<br>".join([cell(first), *(f"<small>{cell(value)}</small>" for value in rest)]))


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], kind: str = "plain") -> Markup:
    """Rows as an HTML table; all that is not Markup is escaped, numbers are aligned to the right."""
    top = "".join(f"<th>{cell(name)}" for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td{' class=n' if _is_number(value) else ''}>{cell(value)}" for value in row) for row in rows
    )
    return Markup(f"<table class={kind}><thead><tr>{top}<tbody>{body}</table>")


def _is_number(value: Any) -> bool:
    return not isinstance(value, Markup) and str(value)[:1] in "-0123456789" and str(value)[-1:] in "0123456789%"


def bar(share: float, width: int = 90) -> Markup:
    """A bar of this share of its width; a negative one is drawn in another colour."""
    size, sign = round(min(abs(share), 1) * width, 1), "neg" if share < 0 else "pos"
    return Markup(f"<svg width={width} height=10 class=bar><rect width={size} height=10 class={sign} /></svg>")


def _scored(value: float, among: Sequence[float]) -> Markup:
    return Markup(f"{bar(value / (max(map(abs, among)) or 1))} <small>{value:.3f}</small>")


def _fold(title: str, body: str, opened: bool = False) -> str:
    return f"<details{' open' * opened}><summary>{title}</summary><div class=scroll>{body}</div></details>"


def _tokens(facts: Facts) -> Markup:
    chips = [
        f"<a class='chip s{t['segment'] % 2}' href='#token={t['position']}'>{cell(t['token'])}</a>"
        for t in facts["tokens"]
    ]
    head = ("position", "piece", "id", "segment", "mask", "|word|", "|segment|", "|position|")
    rows = [
        [t[key] for key in ("position", "token", "id", "segment", "mask")]
        + [f"{t[key]:.2f}" for key in ("word_norm", "segment_norm", "position_norm")]
        for t in facts["tokens"]
    ]
    return Markup(f"<p class=chips>{''.join(chips)}</p>{_fold('As numbers', table(head, rows), len(rows) <= 16)}")


def _walk(facts: Facts) -> Markup:
    """The steps, those of a layer folded together; the equality with transformers stands beside each."""

    def part(row: Facts) -> str:
        layer = row["name"].partition(".layer.")[2].partition(".")[0]
        return f"Layer {int(layer) + 1}" if layer else "Embeddings" if "embeddings" in row["name"] else "Heads"

    head = ("step, line and code", "equation and shapes", "MFLOP", "parameters", "values", "transformers")
    out = []
    for title, rows in ((title, list(rows)) for title, rows in groupby(facts["walk"], part)):
        note = f"<small>{len(rows)} steps, {sum(row['share'] for row in rows):.1%} of the arithmetic</small>"
        body = table(head, [_step(row, facts["proof"]) for row in rows], "walk")
        out.append(_fold(f"{title} {note}", body, title in ("Embeddings", "Layer 1", "Heads")))
    return Markup("".join(out))


def _step(row: Facts, proof: Facts | None) -> tuple[Any, ...]:
    name = row["name"].split(".layer.")[-1].partition(".")[2] if ".layer." in row["name"] else row["name"]
    flops = "?" if row["flops"] is None else f"{row['flops'] / 1e6:,.2f}" if row["flops"] else ""
    return (
        lines(Markup(f"<b>{cell(name)}</b>"), row["line"], Markup(f"<code>{cell(row['code'])}</code>")),
        lines(row["equation"], row["letters"], row["numbers"]),
        lines(flops, bar(row["share"] * 4, 60) if row["flops"] else ""),
        f"{row['params']:,}" if row["params"] else "",
        lines(
            f"{row['min']:.3g} to {row['max']:.3g}, mean {row['mean']:.3g}",
            " ".join(map("{:.3f}".format, row["slice"])),
        ),
        _verdict(row, proof),
    )


def _verdict(row: Facts, proof: Facts | None) -> Markup:
    found = (proof or {}).get(row["name"])
    if row["beside"]:
        return Markup("<small>inside the fused kernel</small>")
    if found is None:
        return Markup("<small>not compared</small>")
    text = "<b class=same>same bits</b>" if found["ulps"] == 0 else f"<b class=apart>{found['ulps']:.1f} ulp</b>"
    return lines(Markup(text), found["line"].rpartition("/")[2])


def _proof(facts: Facts) -> Markup:
    kernel = ", ".join(f"{value:.0f}" for value in facts["kernel"])
    text = (
        "<p>Scores and weights are computed beside the fused attention kernel, from the same query and key. Weights "
        f"times values differ from what the kernel returns by {kernel} units in the last place (layer by layer): "
        "rounding in another order.</p>"
    )
    if facts["proof"] is None:
        return Markup(f"<p class=big>Not compared: transformers is not installed, or was not asked.</p>{text}")
    same, compared = equal_steps(facts["proof"])
    verdict = "every one has" if same == compared else f"{same} of them have"
    version = cell(facts["manifest"]["versions"].get("transformers", ""))
    return Markup(
        f"<p class=big>{compared} steps were compared with transformers {version}, run just now on the same "
        f"weights and text: {verdict} the same bits.</p>{text}"
    )


def _heads(facts: Facts) -> Markup:
    head = ("layer", "head", "itself", "previous", "next", "[CLS] and [SEP]", "entropy, bits")
    rows = []
    for row in facts["heads"]:
        link = f"<a href='#layer={row['layer']}&amp;head={row['head']}'>{row['layer'] + 1}</a>"
        shares = [f"{row[key]:.0%}" for key in ("itself", "previous", "next", "special")]
        rows.append((Markup(link), row["head"] + 1, *shares, f"{row['entropy']:.2f}"))
    return Markup(_fold("Where each head looks", table(head, rows)))


def _lens(facts: Facts) -> Markup:
    lens, tokens = facts["lens"], facts["tokens"]
    if lens is None:
        return Markup(f"<p>{cell(facts['model'])} has no masked-language-model head to look through.</p>")
    layers, out = range(len(lens["words"])), []
    for at in (at for at in facts["masked"][:8] if at in lens["at"]):
        i = lens["at"].index(at)
        best = [map(_chance, lens["words"][layer][i], lens["chances"][layer][i]) for layer in layers]
        rows = [(layer or "embeddings", *words) for layer, words in enumerate(best)]
        settled = f"Token {at}, {cell(tokens[at]['token'])}: settled after layer {lens['settled'][i]}"
        out.append(f"<h3>{settled}</h3><div class=scroll>{table(('after', 'likeliest', *'2345'), rows)}</div>")
    every = [
        (at, tokens[at]["token"], *(lens["words"][layer][i][0] for layer in layers), lens["settled"][i])
        for i, at in enumerate(lens["at"])
    ]
    head = ("position", "piece", "embeddings", *(f"layer {n}" for n in layers[1:]), "settled after")
    out.append(_fold(f"The likeliest word at each of {len(every)} tokens", table(head, every), not out))
    if lens["next_sentence"]:
        chances = ", ".join(f"{value:.2f}" for value in lens["next_sentence"])
        out.append(
            "<p>The pooler and the next-sentence head on the state of [CLS] after each layer (an untrained use but for "
            f"the last): probability that the second text follows the first: {chances}.</p>"
        )
    return Markup("".join(out))


def _chance(word: str, probability: float) -> Markup:
    return Markup(f"{cell(word)} <small>{probability:.3f}</small> {bar(probability, 40)}")


def _mattered(facts: Facts) -> Markup:
    found = facts["mattered"]
    if found is None:
        return Markup("<p>Only a masked-language-model head gives an answer that this section can ask about.</p>")
    scores, group = found["scores"], found["group"]
    titles = [name.replace("_", " ") for name in scores]
    rows = [
        (i, t["token"], *(_scored(among[i], among) for among in scores.values())) for i, t in enumerate(facts["tokens"])
    ]
    agreement = [(title, *map("{:.2f}".format, row)) for title, row in zip(titles, found["agreement"], strict=True)]
    left_out = f"{group} neighbouring tokens are" if group and group > 1 else "Tokens are"
    note = f"{left_out} left out at a time." if group else "Leaving tokens out would cost too much at this length."
    losses = [row["lost"] for row in found["ablated"]]
    off = []
    for row in found["ablated"]:
        which = row["heads"][0] + 1 if len(row["heads"]) == 1 else "all"
        off.append((row["layer"] + 1, which, _scored(row["lost"], losses), row["word"]))
    head = ("layer", "head taken out", "log-probability lost", "likeliest word then")
    without = table(head, off) if off else "<p>Taking heads out would cost too much at this length.</p>"
    return Markup(
        f"<p>At token {found['at']} the model says <b>{cell(found['word'])}</b>, probability {found['chance']:.3f}. "
        f"Which tokens made it say so? {note}</p><div class=scroll>{table(('position', 'piece', *titles), rows)}</div>"
        f"<h3>How far they agree (rank correlation)</h3>{table(('', *titles), agreement)}<h3>Without a head</h3>"
        f"<div class=scroll>{without}</div>"
    )


def _compare(facts: Facts) -> Markup:
    found = facts["compare"]
    if found is None:
        return Markup("")
    rows = [
        (row["layer"] or "embeddings", f"{row['cls']:.3f}", f"{row['at']:.3f}", *row["words"]) for row in found["rows"]
    ]
    here, there = found["at"]
    head = ("after layer", "cosine of [CLS]", f"cosine of tokens {here} and {there}", "likeliest here", "there")
    text = f"<h2>Beside another text</h2><p>{cell(found['text'])}</p>{table(head, rows)}"
    return Markup(f"<section id=compare>{text}</section>")


def _names(facts: Facts) -> Markup:
    steps, rows = {row["name"]: row for row in facts["walk"]}, []
    for name in facts["names"]:
        step = steps.get(name["name"] if name["shape"] is None else name["name"].rpartition(".")[0], {})
        there = (facts["proof"] or {}).get(step.get("name"), {}).get("line", "").rpartition("/")[2]
        shape = "" if name["shape"] is None else " x ".join(map(str, name["shape"]))
        google = (name["google"] or "") + (" (transposed)" if name["transposed"] else "")
        rest = (step.get("line", ""), there, google, step.get("google", ""), step.get("paper", ""))
        rows.append((name["name"] or facts["model"], shape, *rest))
    head = ("here and in transformers", "shape", "line", "line there", "TensorFlow variable", "its function", "paper")
    return Markup(f"<div class=scroll>{table(head, rows, 'names')}</div>")


def _myths(facts: Facts) -> Markup:
    return Markup("".join(f"<dt>{cell(row['said'])}<dd>{cell(row['measured'])}" for row in facts["myths"]))


def _exercises(facts: Facts) -> Markup:
    parts = [f"<li><b>{cell(name)}</b>: {cell(x.task)}<pre>{cell(x.skeleton)}</pre>" for name, x in EXERCISES.items()]
    return Markup("".join(parts))


def _manifest(facts: Facts) -> Markup:
    found = facts["manifest"]
    rest = [(key.replace("_", " "), value) for key, value in found.items() if key != "versions"]
    return table(("what", "value"), [*found["versions"].items(), *rest])


SECTIONS = {
    name.__name__[1:]: name
    for name in (_tokens, _walk, _proof, _heads, _lens, _mattered, _compare, _names, _myths, _exercises, _manifest)
}


def _quantized(weights: Tensor) -> Tensor:
    """Weights from 0 to 1 as bytes on a square-root scale: small ones stay visible, the error is at most 0.004."""
    return (weights.clamp(0, 1).sqrt() * 255).round().to(torch.uint8)


def _payload(seen: Trace, maps: Tensor, facts: Facts) -> tuple[Facts, str]:
    """What the script draws: a header for JSON, and bytes, deflated and in base64."""
    (layers, H, T, _), D = maps.shape, seen.sizes["D"]
    top = 0 if maps.numel() <= MAX_BYTES else TOP
    kept = maps.topk(top, -1) if top else None
    parts = [_quantized(kept.values), kept.indices.to(torch.int16).view(torch.uint8)] if kept else [_quantized(maps)]
    order = [*facts["masked"], *(i for i in range(T) if i not in facts["masked"])]
    tokens = sorted(order[: max(1, QK_BYTES // (2 * layers * D))])
    both = torch.stack([step.tensor[0, tokens].float() for step in seen.ending("self.query", "self.key")])
    scale = both.abs().amax((1, 2)).clamp_min(1e-12) / 127  # (2 * layers,)
    parts.append((both / scale[:, None, None]).round().to(torch.int8).view(torch.uint8))
    raw = b"".join(part.contiguous().numpy().tobytes() for part in parts)
    pieces = [t["token"] for t in facts["tokens"]]
    header = {"layers": layers, "heads": H, "T": T, "D": D, "top": top, "qk": tokens, "scale": scale.tolist()}
    shown = {"tokens": pieces, "start": facts["masked"][:1] or [0], "lens": facts["lens"]}
    return {**header, **shown}, base64.b64encode(zlib.compress(raw, 9)).decode()


def _grid(maps: Tensor) -> str:
    """All heads as one grey picture, layers downwards: blocks of tokens show their largest weight; a PNG, in base64."""
    layers, H, T, _ = maps.shape
    maps, fine = maps / maps.amax((2, 3), keepdim=True), 64 // T
    maps = (
        maps.repeat_interleave(fine, 2).repeat_interleave(fine, 3) if fine else functional.adaptive_max_pool2d(maps, 64)
    )
    gap = (72 - maps.shape[-1]) // 2
    image = functional.pad(255 - _quantized(maps), (gap, 72 - maps.shape[-1] - gap) * 2, value=255)
    picture = image.permute(0, 2, 1, 3).reshape(layers * 72, H * 72).numpy()
    scanlines = b"".join(b"\0" + line.tobytes() for line in picture)
    size = struct.pack(">IIBBBBB", H * 72, layers * 72, 8, 0, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", size), (b"IDAT", zlib.compress(scanlines, 9)), (b"IEND", b"")):
        png += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    return base64.b64encode(png).decode()
