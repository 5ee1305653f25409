"""The facts of one text as one HTML file: readable and printable without script, asking nothing of the network."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import struct
import zlib
from collections.abc import Iterable, Sequence
from importlib.resources import files
from string import Template
from typing import Any

import torch
from torch import Tensor

from minibert.study.exercises import EXERCISES
from minibert.study.trace import Trace

MAX_BYTES = 4_000_000  # of attention weights before compression; above, the largest of each row are kept
QK_BYTES = 1_500_000  # of query and key vectors
TOP = 8
Facts = dict[str, Any]


class Markup(str):
    """Text that is HTML already; everything else is escaped."""


def render(seen: Trace, facts: Facts) -> str:
    """The whole page."""
    parts = {name: (files("minibert.study") / name).read_text("utf-8") for name in ("page.html", "page.css", "page.js")}
    header, payload = _payload(seen, facts)
    data = json.dumps(header).replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    digest = {name: base64.b64encode(hashlib.sha256(parts[name].encode()).digest()).decode() for name in parts}
    policy = (f"default-src 'none'; script-src 'sha256-{digest['page.js']}'; style-src 'sha256-{digest['page.css']}'; "
              "img-src data:; base-uri 'none'; form-action 'none'")  # fmt: skip
    sections = {name: build(facts) for name, build in SECTIONS.items()}
    text = facts["text"] + (f" / {facts['pair']}" if facts["pair"] else "")
    return Template(parts["page.html"]).substitute(
        sections, policy=html.escape(policy, False), css=parts["page.css"], script=parts["page.js"], data=data,
        payload=payload, grid=_grid(seen), title=html.escape(text), model=html.escape(facts["model"]),
        summary=html.escape(_summary(seen, facts)),
    )  # fmt: skip


def _summary(seen: Trace, facts: Facts) -> str:
    sizes = ", ".join(f"{letter} = {size:,}" for letter, size in seen.sizes.items() if letter != "L")
    return f"{len(seen)} steps, {seen.flops / 1e6:,.1f} million operations in matrix products, {seen.params:,} parameters; {sizes}"


def cell(value: Any) -> str:
    return value if isinstance(value, Markup) else html.escape(str(value))


def table(head: Sequence[str], rows: Iterable[Sequence[Any]], kind: str = "") -> Markup:
    """Rows as an HTML table; all that is not Markup is escaped, numbers are aligned to the right."""
    top = "".join(f"<th>{cell(name)}" for name in head)
    body = "".join(
        "<tr>" + "".join(f"<td{' class=n' if _is_number(value) else ''}>{cell(value)}" for value in row) for row in rows
    )
    return Markup(f"<table class='{kind}'><thead><tr>{top}<tbody>{body}</table>")


def _is_number(value: Any) -> bool:
    return str(value)[:1] in "-0123456789" and str(value)[-1:] in "0123456789%"


def bar(share: float, width: int = 90) -> Markup:
    """A bar of this share of its width; a negative one is drawn in another colour."""
    size = round(min(abs(share), 1) * width, 1)
    sign = "neg" if share < 0 else "pos"
    return Markup(f"<svg width={width} height=10 class=bar><rect width={size} height=10 class={sign} /></svg>")


def _code(text: str) -> Markup:
    return Markup(f"<code>{html.escape(text)}</code>")


def _tokens(facts: Facts) -> Markup:
    chips = "".join(f"<a class='chip s{t['segment'] % 2}' href='#token={t['position']}'>{cell(t['token'])}</a>"
                    for t in facts["tokens"])  # fmt: skip
    head = ("position", "piece", "id", "segment", "mask", "|word|", "|segment|", "|position|")
    rows = [(t["position"], t["token"], t["id"], t["segment"], t["mask"], f"{t['word_norm']:.2f}",
             f"{t['segment_norm']:.2f}", f"{t['position_norm']:.2f}") for t in facts["tokens"]]  # fmt: skip
    return Markup(f"<p class=chips>{chips}</p><div class=scroll>{table(head, rows)}</div>")


def _walk(facts: Facts) -> Markup:
    """The steps, those of a layer folded together; the equality with transformers stands beside each."""
    groups: dict[str, list[Facts]] = {}
    for row in facts["walk"]:
        layer = row["name"].partition(".layer.")[2].partition(".")[0]
        group = f"Layer {int(layer) + 1}" if layer else "Embeddings" if "embeddings" in row["name"] else "Heads"
        groups.setdefault(group, []).append(row)
    head = ("step", "line and code", "equation", "shapes", "in numbers", "MFLOP", "", "parameters", "min / mean / max",
            "first values", "transformers")  # fmt: skip
    out = []
    for title, rows in groups.items():
        share = sum(row["share"] for row in rows)
        body = table(head, [_step(row, facts["proof"]) for row in rows], "walk")
        opened = " open" if title in ("Embeddings", "Layer 1", "Heads") else ""
        out.append(f"<details{opened}><summary>{title} <small>{len(rows)} steps, {share:.1%} of the arithmetic</small>"
                   f"</summary><div class=scroll>{body}</div></details>")  # fmt: skip
    return Markup("".join(out))


def _step(row: Facts, proof: Facts | None) -> tuple[Any, ...]:
    name = row["name"].split(".layer.")[-1].partition(".")[2] if ".layer." in row["name"] else row["name"]
    flops = "?" if row["flops"] is None else f"{row['flops'] / 1e6:,.2f}" if row["flops"] else ""
    numbers = f"{row['min']:.3g} / {row['mean']:.3g} / {row['max']:.3g}"
    line = Markup(f"<small>{cell(row['line'])}</small><br>{_code(row['code'])}")
    return (name, line, row["equation"], row["letters"], row["numbers"], flops, bar(row["share"] * 4, 40),
            f"{row['params']:,}" if row["params"] else "", numbers, " ".join(f"{x:.3f}" for x in row["slice"]),
            _verdict(row, proof))  # fmt: skip


def _verdict(row: Facts, proof: Facts | None) -> Markup:
    found = (proof or {}).get(row["name"])
    if row["beside"]:
        return Markup("<small>inside the fused kernel</small>")
    if found is None:
        return Markup("<small>not compared</small>")
    text = "<b class=same>same bits</b>" if found["ulps"] == 0 else f"<b class=apart>{found['ulps']:.1f} ulp</b>"
    return Markup(f"{text}<br><small>{cell(found['line'].rpartition('/')[2])}</small>")


def _proof(facts: Facts) -> Markup:
    kernel = ", ".join(f"{value:.0f}" for value in facts["kernel"])
    text = ("<p>Scores and weights are computed beside the fused attention kernel, from the same query and key. Weights "
            "times values differ from what the kernel returns by "
            f"{kernel} units in the last place (layer by layer): rounding in another order.</p>")  # fmt: skip
    if facts["proof"] is None:
        return Markup(f"<p>Not compared: transformers is not installed, or was not asked.</p>{text}")
    compared = [row["ulps"] for row in facts["proof"].values() if row["ulps"] is not None]
    same = sum(value == 0 for value in compared)
    verdict = "every one has" if same == len(compared) else f"{same} of them have"
    return Markup(f"<p class=big>{len(compared)} steps were compared with transformers {cell(facts['manifest']['versions'].get('transformers', ''))}, "
                  f"run just now on the same weights and text: {verdict} the same bits.</p>{text}")  # fmt: skip


def _heads(facts: Facts) -> Markup:
    head = ("layer", "head", "itself", "previous", "next", "[CLS] and [SEP]", "entropy, bits")
    percent = [[f"{row[key]:.0%}" for key in ("itself", "previous", "next", "special")] for row in facts["heads"]]
    rows = [(Markup(f"<a href='#layer={row['layer']}&amp;head={row['head']}'>{row['layer'] + 1}</a>"), row["head"] + 1, *shares,
             f"{row['entropy']:.2f}") for row, shares in zip(facts["heads"], percent, strict=True)]  # fmt: skip
    return Markup(f"<details><summary>Where each head looks</summary><div class=scroll>{table(head, rows)}</div></details>")


def _lens(facts: Facts) -> Markup:
    lens = facts["lens"]
    if lens is None:
        return Markup(f"<p>{cell(facts['model'])} has no masked-language-model head to look through.</p>")
    tokens, last = facts["tokens"], len(lens["words"]) - 1
    out = []
    for at in facts["masked"]:
        if at not in lens["at"]:
            continue
        i = lens["at"].index(at)
        rows = [
            (layer or "embeddings", *(Markup(f"{cell(word)} <small>{p:.3f}</small> {bar(p, 40)}") for word, p in
             zip(lens["words"][layer][i], lens["chances"][layer][i], strict=True)))
            for layer in range(last + 1)
        ]  # fmt: skip
        out.append(f"<h3>Token {at}, {cell(tokens[at]['token'])}: settled after layer {lens['settled'][i]}</h3>"
                   f"<div class=scroll>{table(('after layer', 'likeliest', '2', '3', '4', '5'), rows)}</div>")  # fmt: skip
    every = [(at, tokens[at]["token"], *(lens["words"][layer][i][0] for layer in range(last + 1)), lens["settled"][i])
             for i, at in enumerate(lens["at"])]  # fmt: skip
    head = ("position", "piece", "embeddings", *(f"layer {n}" for n in range(1, last + 1)), "settled after")
    opened = "" if out else " open"
    out.append(f"<details{opened}><summary>The likeliest word at each of {len(every)} tokens</summary><div class=scroll>"
               f"{table(head, every)}</div></details>")  # fmt: skip
    if lens["next_sentence"]:
        chances = ", ".join(f"{value:.2f}" for value in lens["next_sentence"])
        out.append(f"<p>The pooler and the next-sentence head on each layer’s [CLS] (an untrained use but for the last): "
                   f"probability that the second text follows: {chances}.</p>")  # fmt: skip
    return Markup("".join(out))


def _mattered(facts: Facts) -> Markup:
    found = facts["mattered"]
    if found is None:
        return Markup("<p>Only a masked-language-model head gives an answer that this section can ask about.</p>")
    at, names = found["at"], list(found["scores"])
    largest = {name: max(map(abs, scores)) or 1 for name, scores in found["scores"].items()}
    rows = [(i, t["token"], *(Markup(f"{bar(found['scores'][n][i] / largest[n])} <small>{found['scores'][n][i]:.3f}</small>")
                              for n in names)) for i, t in enumerate(facts["tokens"])]  # fmt: skip
    titles = [name.replace("_", " ") for name in names]
    agreement = [(title, *(f"{value:.2f}" for value in line)) for title, line in zip(titles, found["agreement"], strict=True)]
    group = found["group"]
    note = ("Leaving tokens out would cost too much at this length." if group is None else
            "Tokens are left out one at a time." if group == 1 else f"{group} neighbouring tokens are left out at a time.")  # fmt: skip
    ablated = [(row["layer"] + 1, row["heads"][0] + 1 if len(row["heads"]) == 1 else "all", Markup(f"{bar(row['lost'] / _most(found))} <small>{row['lost']:.3f}</small>"),
                row["word"]) for row in found["ablated"]]  # fmt: skip
    heads = table(("layer", "head taken out", "log-probability lost", "likeliest word then"), ablated) if ablated else (
        "<p>Taking heads out would cost too much at this length.</p>")  # fmt: skip
    return Markup(
        f"<p>At token {at} the model says <b>{cell(found['word'])}</b> with probability {found['chance']:.3f}. Which tokens "
        f"made it say so? {note}</p><div class=scroll>{table(('position', 'piece', *titles), rows)}</div>"
        f"<h3>How far they agree (rank correlation)</h3>{table(('', *titles), agreement)}<h3>Without a head</h3>"
        f"<div class=scroll>{heads}</div>"
    )


def _most(found: Facts) -> float:
    return max((abs(row["lost"]) for row in found["ablated"]), default=1) or 1


def _compare(facts: Facts) -> Markup:
    found = facts["compare"]
    if found is None:
        return Markup("")
    rows = [(row["layer"] or "embeddings", f"{row['cls']:.3f}", f"{row['at']:.3f}", *row["words"]) for row in found["rows"]]
    head = ("after layer", "cosine of [CLS]", f"cosine of tokens {found['at'][0]} and {found['at'][1]}", "here", "there")
    return Markup(f"<section id=compare><h2>Beside another text</h2><p>{cell(found['text'])}</p>{table(head, rows)}</section>")


def _names(facts: Facts) -> Markup:
    lines = {row["name"]: row for row in facts["walk"]}
    rows = []
    for name in facts["names"]:
        step = lines.get(name["name"] if name["shape"] is None else name["name"].rpartition(".")[0])
        proof = (facts["proof"] or {}).get(step["name"], {}) if step else {}
        shape = "" if name["shape"] is None else "×".join(map(str, name["shape"]))
        google = (name["google"] or "") + (" (transposed)" if name["transposed"] else "")
        rows.append((name["name"] or facts["model"], shape, step["line"] if step else "",
                     proof.get("line", "").rpartition("/")[2], google, step["google"] if step else "",
                     step["paper"] if step else ""))  # fmt: skip
    head = ("here and in transformers", "shape", "line here", "line there", "TensorFlow variable", "its function", "paper")
    return Markup(f"<div class=scroll>{table(head, rows, 'names')}</div>")


def _myths(facts: Facts) -> Markup:
    return Markup("".join(f"<dt>{cell(row['said'])}<dd>{cell(row['measured'])}" for row in facts["myths"]))


def _exercises(facts: Facts) -> Markup:
    return Markup("".join(f"<li><b>{cell(name)}</b>: {cell(x.task)}<pre>{cell(x.skeleton)}</pre>" for name, x in EXERCISES.items()))


def _manifest(facts: Facts) -> Markup:
    found = facts["manifest"]
    rows = [*found["versions"].items(), *((k.replace("_", " "), v) for k, v in found.items() if k != "versions")]
    return table(("what", "value"), rows)


SECTIONS = {"tokens": _tokens, "walk": _walk, "proof": _proof, "heads": _heads, "lens": _lens, "mattered": _mattered,
            "compare": _compare, "names": _names, "myths": _myths, "exercises": _exercises, "manifest": _manifest}  # fmt: skip


def _quantized(weights: Tensor) -> Tensor:
    """Weights from 0 to 1 as bytes on a square-root scale: small ones stay visible, the error is at most 0.004."""
    return (weights.float().clamp(0, 1).sqrt() * 255).round().to(torch.uint8)


def _payload(seen: Trace, facts: Facts) -> tuple[Facts, str]:
    """What the script draws: a header for JSON, and bytes, deflated and in base64."""
    maps = torch.stack([weights[0] for weights in seen.attentions])  # (layers, H, T, T)
    layers, H, T, _ = maps.shape
    top = 0 if maps.numel() <= MAX_BYTES else TOP
    if top:
        kept = maps.float().topk(top, -1)
        parts = [_quantized(kept.values), kept.indices.to(torch.int16).view(torch.uint8)]
    else:
        parts = [_quantized(maps)]
    D = seen.sizes["D"]
    most = max(1, QK_BYTES // (2 * layers * D))
    tokens = sorted([*facts["masked"], *(i for i in range(T) if i not in facts["masked"])][:most])
    both = torch.stack([step.tensor[0, tokens].float() for step in seen.ending("self.query", "self.key")])
    scale = both.abs().amax((1, 2)).clamp_min(1e-12) / 127  # (2 * layers,)
    parts.append((both / scale[:, None, None]).round().to(torch.int8).view(torch.uint8))
    raw = b"".join(part.contiguous().numpy().tobytes() for part in parts)
    header = {"layers": layers, "heads": H, "T": T, "D": D, "top": top, "qk": tokens, "scale": scale.tolist(),
              "tokens": [t["token"] for t in facts["tokens"]], "start": facts["masked"][:1] or [0], "lens": facts["lens"]}  # fmt: skip
    return header, base64.b64encode(zlib.compress(raw, 9)).decode()


def _grid(seen: Trace) -> str:
    """All heads as one grey picture, layers downwards: blocks of tokens show their largest weight; a PNG, in base64."""
    maps = torch.stack([weights[0].float() for weights in seen.attentions])  # (layers, H, T, T)
    layers, H, T, _ = maps.shape
    if T > 64:
        maps = torch.nn.functional.adaptive_max_pool2d(maps, 64)
    else:
        maps = maps.repeat_interleave(64 // T, 2).repeat_interleave(64 // T, 3)
    image = 255 - _quantized(maps)
    gap = (72 - image.shape[-1]) // 2
    image = torch.nn.functional.pad(image, (gap, 72 - image.shape[-1] - gap) * 2, value=255)
    picture = image.permute(0, 2, 1, 3).reshape(layers * 72, H * 72).numpy()
    rows = b"".join(b"\0" + row.tobytes() for row in picture)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", H * 72, layers * 72, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b"")]
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return base64.b64encode(png).decode()
