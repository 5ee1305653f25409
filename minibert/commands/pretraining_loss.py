"""`minibert pretraining-loss`."""

from __future__ import annotations

import argparse

from minibert import terminal
from minibert.commands.next_sentence import add_pair
from minibert.terminal import Arguments


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `minibert pretraining-loss`."""
    add_pair(parser)
    parser.add_argument("--mask", metavar="9,44", default="", help="numbers of the tokens to replace by [MASK], from 0")
    parser.add_argument("--not-next", action="store_true", help="say that B does not follow A (default: it does)")
    terminal.add_model(parser)
    terminal.add_compute(parser)


def run(arguments: Arguments) -> None:
    """The joint loss of masked words and next sentence on a pair of texts; every token is a label."""
    from minibert.demo import pretraining_loss
    from minibert.heads import BertForPreTraining, NextSentence
    from minibert.pipelines import chosen_device
    from minibert.text.tokenizer import BertTokenizer

    name, revision = terminal.chosen_model(arguments), arguments.revision
    model = BertForPreTraining.from_pretrained(
        name, revision=revision, device=chosen_device(arguments.device), dtype=arguments.dtype
    )
    tokenizer = BertTokenizer.from_pretrained(name, revision=revision)
    positions = _positions(arguments.mask)
    label = NextSentence.NOT_NEXT if arguments.not_next else NextSentence.IS_NEXT
    result = pretraining_loss(model, tokenizer, arguments.text, arguments.text_pair, positions, label)
    del result["prediction_logits"]
    result["seq_relationship_logits"] = result["seq_relationship_logits"][0].tolist()
    table = terminal.table
    lines = table([(f"{key}:", f"{result[key]:.4f}") for key in ("loss", "mlm_loss", "nsp_loss")], right=(1,))
    if result["masked"]:
        rows = [(m["position"], m["token"], f"{m['probability']:.4f}", m["predicted"]) for m in result["masked"]]
        lines += ["", *table([("position", "token", "probability", "predicted"), *rows], right=(0, 2))]
    terminal.show(arguments, result, lines)


def _positions(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"--mask {text!r}: must be numbers of tokens separated by commas, such as 9,44") from None
