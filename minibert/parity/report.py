"""A certificate for people: Markdown for a model card, and one HTML file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

_STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:92em;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{border-bottom:1px solid #ddd;padding:.2em .7em;text-align:left}
td{font-variant-numeric:tabular-nums}code{font-size:.9em;background:#f4f4f4;padding:0 .2em}
.FAILED,.bug{color:#b00020;font-weight:bold}.PASSED{color:#006d2c;font-weight:bold}"""
_LEVELS = (
    "bits: equal to the last bit. exact: root mean square error to float64 at most 2 times the reference's own, 3 in "
    "half precision. answers: top word, label, span, nearest text. Rows of padding do not count."
)
Block = tuple[str, Any]  # ("h1" to "h3" or "p", text) or ("table", rows with the header first)


def _number(value: Any, digits: int = 2) -> str:
    return "" if value is None else "0" if value == 0 else f"{value:.{digits}g}"


def _distance(found: dict[str, Any]) -> list[str]:
    if found["broken"]:
        return ["no", found["broken"], "", "", ""]
    return ["yes" if found["bits"] else "no", *(_number(found[key]) for key in ("max", "p99", "rms", "ulp"))]


def blocks(certificate: dict[str, Any]) -> Iterator[Block]:
    """What a certificate says, in order."""
    predicate = certificate["predicate"]
    found = predicate["measurements"]
    yield "h1", f"Parity certificate: {found['model']}"
    yield "p", f"{predicate['result']}. Repeat it: `{found['command']['line']}`"
    rows = [["", "against", "asked for", "holds", "verdict", "largest error", "ulp", "answers that are the same"]]
    for each in found["comparisons"]:
        worst = max(each["outputs"].values(), key=lambda x: float("inf") if x["ulp"] is None else x["ulp"])
        asked = [f"{name}: {a['same']} of {a['count']}{', none can flip' * a['cannot_flip']}"
                 for name, a in each["answers"].items()]  # fmt: skip
        result = "PASSED" if each["passed"] else "FAILED"
        rows.append([f"{result} {each['candidate']}", each["reference"], each["require"], each["level"] or "nothing",
                     each["verdict"], worst["broken"] or _number(worst["max"]), _number(worst["ulp"]),
                     "; ".join(asked)])  # fmt: skip
    yield "table", rows
    yield "p", _LEVELS
    for each in found["comparisons"]:
        yield from _comparison(each)
    yield "h2", "What it is about"
    yield "table", [["subject", "SHA-256"], *([s["name"], s["digest"]["sha256"]] for s in certificate["subject"]),
                    ["texts", predicate["configuration"][0]["digest"]["sha256"]]]  # fmt: skip
    yield "h2", "Machine"
    facts = [(f"{group}: {key}", value) for group, values in found["machine"].items() for key, value in values.items()]
    yield "table", [["", ""], *([name, " ".join(x) if isinstance(x, list) else str(x)] for name, x in facts)]


def _comparison(each: dict[str, Any]) -> Iterator[Block]:
    yield "h2", f"{each['candidate']} against {each['reference']}"
    if (first := each["first"]) is not None:
        bug = each["bug"]
        what = "Bug" if bug else "Bits first differ"
        why = f" ({bug['why']}, on {bug['case']}, {bug['weights']} weights)" if bug else ""
        yield "p", (f"{what} at {first['step']}{why}: `{first['line']}` `{first['code']}`; "
                    f"there: `{first['twin_line']}` `{first['twin_code']}`")  # fmt: skip
    head = ["bits", "max", "p99", "rms", "ulp"]
    yield "table", [["output", *head, "rms error to float64", "the reference's"],
                    *([name, *_distance(x), _number(x["error"]), _number(x["reference_error"])]
                      for name, x in each["outputs"].items())]  # fmt: skip
    for name, a in each["answers"].items():
        risks = f"{a['at_risk_count']} could flip: {', '.join(a['at_risk'][:5])}"
        proof = "so none can flip" if a["cannot_flip"] else risks
        sizes = f"largest error {_number(a['largest_error'])}, half the smallest gap {_number(a['half_smallest_gap'])}"
        yield "p", f"{name}: {a['same']} of {a['count']} answers the same; {sizes}, {proof}"
    if each["checks"]:
        yield "table", [["check", "result"], *([name, x["summary"]] for name, x in each["checks"].items())]
    if each["steps"]:
        yield "h3", "Steps: as errors pile up, and each on the reference's input (local)"
        yield "table", [["step", "line", "there", *head, "local bits", "local ulp"],
                        *([s["step"] + " (beside)" * s["beside"], s["line"], s["twin_line"], *_distance(s),
                           "yes" if s["local"]["bits"] else "no", _number(s["local"]["ulp"])]
                          for s in each["steps"])]  # fmt: skip
    for note in each["notes"]:
        yield "p", f"Note: {note}"


def to_markdown(certificate: dict[str, Any]) -> str:
    """The certificate as Markdown, for a model card."""
    lines = []
    for kind, content in blocks(certificate):
        if kind == "table":
            head, *rows = [[str(cell).replace("|", "\\|") for cell in row] for row in content]
            lines += ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
        else:
            lines.append("#" * int(kind[1]) + " " + content if kind != "p" else content)
        lines.append("")
    return "\n".join(lines)


def to_html(certificate: dict[str, Any]) -> str:
    """One file that loads nothing."""
    parts = []
    for kind, content in blocks(certificate):
        if kind == "table":
            rows = [_row(row, "td" if number else "th") for number, row in enumerate(content)]
            parts.append(f"<table>{''.join(rows)}</table>")
        else:
            parts.append(f"<{kind}>{_inline(content)}</{kind}>")
    title = escape(f"Parity certificate: {certificate['predicate']['measurements']['model']}")
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return (f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}"><style>{_STYLE}</style>'
            f"{''.join(parts)}</html>\n")  # fmt: skip


def _row(cells: Sequence[Any], tag: str) -> str:
    marked = [str(cell).split(" ")[0] for cell in cells]
    shown = [f'<{tag} class="{mark}">' if mark in ("PASSED", "FAILED", "bug") else f"<{tag}>" for mark in marked]
    return (
        f"<tr>{''.join(f'{start}{_inline(str(cell))}</{tag}>' for start, cell in zip(shown, cells, strict=True))}</tr>"
    )


def _inline(text: str) -> str:
    pieces = escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if number % 2 else piece for number, piece in enumerate(pieces))
