"""A certificate for people: Markdown for a model card, and the same as one HTML file."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from itertools import groupby
from typing import Any

from minibert.parity.certificate import FACTS, combined
from minibert.parity.verdict import summary

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:92em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{border-bottom:1px solid #ddd;padding:.2em .7em;text-align:left}
td{font-variant-numeric:tabular-nums}code{font-size:.9em;background:#f4f4f4;padding:0 .2em}
.FAILED,.bug{color:#b00020}.PASSED{color:#006d2c}li{margin-left:1.5em}"""
_LEVELS = (
    "bits: equal to the last bit. exact: root mean square error to float64 at most 2 times the reference's own, 3 in "
    "half precision. answers: top word, label, span, nearest text. Rows of padding do not count."
)
_TAGS = {"#": "h1", "##": "h2", "###": "h3", "-": "li"}


def to_markdown(certificate: dict[str, Any]) -> str:
    """The certificate as Markdown, for a model card."""
    return "\n".join(_lines(certificate)) + "\n"


def to_html(certificate: dict[str, Any]) -> str:
    """The certificate as one file that loads nothing."""
    lines, parts = to_markdown(certificate).splitlines(), []
    for is_table, group in groupby(filter(None, lines), lambda line: line.startswith("|")):
        if is_table:
            head, _, *rows = (line[2:-2].split(" | ") for line in group)
            cells = [_element("th", head), *(_element("td", row) for row in rows)]
            parts.append(f"<table>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>")
        else:
            for line in group:
                mark, _, text = line.partition(" ")
                parts.append(_element(_TAGS[mark], [text]) if mark in _TAGS else _element("p", [line]))
    title = escape(lines[0].removeprefix("# "))
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{_STYLE}</style>'
            f"{''.join(parts)}</html>\n")  # fmt: skip


def _element(tag: str, texts: Iterable[str]) -> str:
    """An element a text; code between backquotes, and a verdict that a text begins with, stand out."""
    shown = [re.sub("`(.*?)`", r"<code>\1</code>", escape(text.replace("\\|", "|"))) for text in texts]
    marked = [re.sub("^(PASSED|FAILED|bug)", r'<b class="\1">\1</b>', text) for text in shown]
    return "".join(f"<{tag}>{text}</{tag}>" for text in marked)


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Iterator[str]:
    yield ""
    for row in (head, ["---"] * len(head), *rows):
        cells = [str(cell).replace("|", "\\|") for cell in row]
        yield f"| {' | '.join(cells)} |"
    yield ""


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2g}"


def _ulps(outputs: dict[str, Any]) -> str:
    ulps = [each["ulp"] for each in outputs.values()]
    return "infinite" if None in ulps else _number(max(ulps))


def _bits(found: dict[str, Any]) -> str:
    return "yes" if found["bits"] else found["broken"] or "no"


def _lines(certificate: dict[str, Any]) -> Iterator[str]:
    predicate = certificate["predicate"]
    found = predicate["measurements"]
    yield f"# Parity certificate: {found['model']}\n"
    yield f"{predicate['result']}. Repeat it: `{found['command']['line']}`"
    yield from _table(
        ["result", "minibert", "against", "asked for", "holds", "verdict", "largest ulp", "same answers"],
        [["PASSED" if each["passed"] else "FAILED", each["candidate"], each["reference"], each["require"],
          each["level"] or "nothing", each["verdict"], _ulps(each["outputs"]),
          "; ".join(f"{name}: {x['same']} of {x['count']}{', none can flip' * x['cannot_flip']}"
                    for name, x in each["answers"].items())] for each in found["comparisons"]],
    )  # fmt: skip
    yield f"{_LEVELS}\n"
    for each in found["comparisons"]:
        head, *lines = summary(each)
        yield f"## {head}\n"
        yield from (f"- {line}" for line in lines)
        if each["steps"]:
            yield "\n### Steps: as errors pile up, and each on the reference's input (local)"
            yield from _table(
                ["step", "line", "there", "bits", "max", "p99", "rms", "ulp", "local bits", "local ulp"],
                [[step["step"] + " (beside)" * step["beside"], step["line"], step["twin_line"], _bits(step),
                  *(_number(step[key]) for key in ("max", "p99", "rms", "ulp")), _bits(step["local"]),
                  _number(step["local"]["ulp"])] for step in each["steps"]],
            )  # fmt: skip
    yield "\n## What it is about"
    subjects = {"weights": combined(found["weights"]), "texts": combined(found["texts"]), **found["files"]}
    yield from _table(["subject", "SHA-256"], subjects.items())
    yield "## Machine"
    facts = [(f"{group}: {name}", value) for group in FACTS for name, value in found[group].items()]
    yield from _table(["", ""], ((name, " ".join(x) if isinstance(x, list) else x) for name, x in facts))
