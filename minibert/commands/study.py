"""`minibert study`."""

from __future__ import annotations

import argparse
from typing import Any

from minibert import terminal
from minibert.terminal import Arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `minibert study`."""
    parser.add_argument("text", metavar="TEXT", help="a text, with or without a [MASK], in quotation marks")
    parser.add_argument("pair", metavar="SECOND", nargs="?", help="a second text, the next sentence perhaps")
    parser.add_argument("-o", "--output", metavar="FILE", default="study.html", help="the page (default study.html)")
    parser.add_argument("--compare", metavar="TEXT", help="another text to set beside it")
    parser.add_argument("--save", metavar="FILE", help="all tensors, exact, as safetensors")
    parser.add_argument("--no-reference", action="store_true", help="do not compare with transformers")
    terminal.add_model(parser)


def run(arguments: Arguments) -> None:
    """What happens inside a model on a text, step by step, with proof, as one HTML file that needs no network."""
    from minibert.study.examine import examine
    from minibert.study.page import render
    from minibert.text.tokenizer import BertTokenizer
    from minibert.weights import files

    name = terminal.chosen_model(arguments)
    tokenizer = BertTokenizer.from_pretrained(name, revision=arguments.revision)
    model = _opened(name, arguments.revision)
    reference = not arguments.no_reference
    seen, facts = examine(model, tokenizer, arguments.text, arguments.pair, arguments.compare, reference)
    page = render(seen, facts)
    files.write(arguments.output, page)
    if arguments.save:
        seen.save(arguments.save)
    terminal.show(
        arguments, {"page": arguments.output, **facts}, _findings(arguments.output, len(page.encode()), facts)
    )


def _opened(name: str, revision: str | None) -> Any:
    """The model as the class that it was saved as, in float32."""
    import minibert

    config = minibert.BertConfig.from_pretrained(name, revision=revision)
    saved = config.architectures
    kind = saved[0] if saved and saved[0] in minibert.__all__ else "BertForPreTraining"
    return getattr(minibert, kind).from_pretrained(name, config=config, revision=revision, dtype="float32")


def _findings(output: str, size: int, facts: dict[str, Any]) -> list[str]:
    from minibert.study.twin import equal_steps

    rows = [f"{output}: {size / 1e6:.2f} MB, {len(facts['walk'])} steps"]
    if facts["proof"]:
        same, compared = equal_steps(facts["proof"])
        rows.append(f"{same} of {compared} steps have the bits of transformers")
    if found := facts["mattered"]:
        rows.append(f"token {found['at']}: {found['word']}, probability {found['chance']:.3f}")
        lost = found["scores"].get("leave_one_out")
        if lost:
            most = max((i for i in range(len(lost)) if i != found["at"]), key=lambda i: lost[i], default=0)
            rows.append(f"what mattered most: {facts['tokens'][most]['token']} (token {most})")
    return rows
