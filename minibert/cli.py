"""The `minibert` command: each subcommand is a function that declares its arguments and one that does the work."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

Arguments = argparse.Namespace


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status: 0, 1 for an error told in one line, 130 after Ctrl-C."""
    arguments = build_parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except KeyboardInterrupt:
        print("minibert: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, `head` say, has enough
        sys.stderr.close()
        return 0
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"minibert: {error}", file=sys.stderr)
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    from minibert import __version__

    parser = argparse.ArgumentParser(prog="minibert", description="BERT in plain PyTorch: small, exact, fast.")
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, (add_arguments, run) in COMMANDS.items():
        first_line = (run.__doc__ or "").splitlines()[0]
        command = commands.add_parser(name, help=first_line.rstrip("."), description=run.__doc__)
        add_arguments(command)
        command.set_defaults(run=run)
    return parser


def add_revision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", help="branch, tag or commit on the Hub")


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="a directory or a name on the Hub; default: the model bundled with minibert")
    add_revision(parser)
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")


def chosen_model(arguments: Arguments) -> str:
    from minibert.weights import hub

    return arguments.model or hub.default_model()


def show(arguments: Arguments, result: Any, lines: Sequence[str]) -> None:
    """The result as JSON if asked for, else as readable lines."""
    print(json.dumps(result, indent=2, ensure_ascii=False) if arguments.json else "\n".join(lines))


def table(rows: Sequence[Sequence[object]], right: Sequence[int] = ()) -> list[str]:
    """Rows as aligned columns; the columns numbered in `right` are aligned to the right."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(cells[0]))]
    pad = [str.rjust if column in right else str.ljust for column in range(len(widths))]
    return ["  ".join(pad[i](cell, widths[i]) for i, cell in enumerate(row)).rstrip() for row in cells]


# fill-mask


def add_fill_mask(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", nargs="+", metavar="TEXT", help="a text with one or several [MASK], in quotation marks")
    parser.add_argument("--top-k", type=int, default=5, help="answers for each mask (default 5)")
    parser.add_argument("--targets", nargs="+", metavar="WORD", help="score these words only")
    add_model(parser)


def run_fill_mask(arguments: Arguments) -> None:
    """The likeliest words at each [MASK] of a text."""
    from minibert.pipelines import pipeline

    fill_mask = pipeline("fill-mask", chosen_model(arguments), revision=arguments.revision)
    results = [fill_mask(text, top_k=arguments.top_k, targets=arguments.targets) for text in arguments.text]
    lines = []
    for text, result in zip(arguments.text, results, strict=True):
        masks = [result] if isinstance(result[0], dict) else result
        for i, answers in enumerate(masks, 1):
            lines += [*([""] if lines else []), text + (f"   (mask {i} of {len(masks)})" if len(masks) > 1 else "")]
            lines += table(
                [(f"  {answer['score']:.4f}", answer["token_str"], answer["sequence"]) for answer in answers]
            )
    show(arguments, results[0] if len(results) == 1 else results, lines)


# next-sentence


def add_pair(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", metavar="A", help="the first text")
    parser.add_argument("text_pair", metavar="B", help="the text that may follow it")


def add_next_sentence(parser: argparse.ArgumentParser) -> None:
    add_pair(parser)
    add_model(parser)


def run_next_sentence(arguments: Arguments) -> None:
    """Does text B follow text A?"""
    from minibert.pipelines import pipeline

    judge = pipeline("next-sentence-prediction", chosen_model(arguments), revision=arguments.revision)
    result = judge((arguments.text, arguments.text_pair))
    meaning = {"IS_NEXT": "B follows A", "NOT_NEXT": "B comes from elsewhere"}
    rows = [(f"  {score:.4f}", name, meaning[name]) for name, score in result["probabilities"].items()]
    show(arguments, result, table(rows))


# pretraining-loss


def add_pretraining_loss(parser: argparse.ArgumentParser) -> None:
    add_pair(parser)
    parser.add_argument("--mask", metavar="9,44", default="", help="numbers of the tokens to replace by [MASK], from 0")
    parser.add_argument("--not-next", action="store_true", help="say that B does not follow A (default: it does)")
    add_model(parser)


def run_pretraining_loss(arguments: Arguments) -> None:
    """The joint loss of masked words and next sentence on a pair of texts; every token is a label."""
    from minibert.demo import pretraining_loss
    from minibert.heads import BertForPreTraining, NextSentence
    from minibert.text.tokenizer import BertTokenizer

    name = chosen_model(arguments)
    model = BertForPreTraining.from_pretrained(name, revision=arguments.revision)
    tokenizer = BertTokenizer.from_pretrained(name, revision=arguments.revision)
    positions = _positions(arguments.mask)
    label = NextSentence.NOT_NEXT if arguments.not_next else NextSentence.IS_NEXT
    result = pretraining_loss(model, tokenizer, arguments.text, arguments.text_pair, positions, label)
    del result["prediction_logits"]
    result["seq_relationship_logits"] = result["seq_relationship_logits"][0].tolist()
    lines = table([(f"{key}:", f"{result[key]:.4f}") for key in ("loss", "mlm_loss", "nsp_loss")], right=(1,))
    if result["masked"]:
        rows = [(m["position"], m["token"], f"{m['probability']:.4f}", m["predicted"]) for m in result["masked"]]
        lines += ["", *table([("position", "token", "probability", "predicted"), *rows], right=(0, 2))]
    show(arguments, result, lines)


def _positions(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"--mask {text!r}: must be numbers of tokens separated by commas, such as 9,44") from None


# demo


def add_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="one model for all three flows; default: bert-base from the Hub if reachable")


def run_demo(arguments: Arguments) -> None:
    """The three flows: fill-mask, next sentence, joint pretraining loss."""
    from minibert.demo import run

    run(arguments.model)


# inspect


def add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="a directory or a name on the Hub; default: the bundled model")
    add_revision(parser)
    parser.add_argument("--tensors", action="store_true", help="list every tensor: status, type, shape, hash")
    parser.add_argument("--head", help="look at it with this head (see convert; default: what it was saved as)")
    parser.add_argument("--json", action="store_true", help="print JSON, with all tensors")


def run_inspect(arguments: Arguments) -> None:
    """What a checkpoint holds: the tree of modules, parameters, and what became of each tensor."""
    from minibert.weights.convert import inspect

    name = chosen_model(arguments)
    model, report = inspect(name, arguments.head, revision=arguments.revision)
    statuses = dict.fromkeys(tensor.status for tensor in report.tensors)
    counts = {status: len(report.named(status)) for status in statuses}
    dtypes = sorted(
        {str(tensor.dtype).removeprefix("torch.") for tensor in report.tensors if tensor.status == "loaded"}
    )
    result: dict[str, Any] = {
        "model": str(name),
        "class": type(model).__name__,
        "parameters": model.num_parameters(),
        "dtypes": dtypes,
        "config": model.config.to_dict(),
        "counts": counts,
    }
    lines = [repr(model), "", f"{model.num_parameters():,} parameters, stored as {' and '.join(dtypes)}"]
    lines += ["tensors: " + ", ".join(f"{count} {status}" for status, count in counts.items())]
    if arguments.json or arguments.tensors:
        result["tensors"] = report.to_dict()
        rows = [
            (entry["name"], entry["status"], entry["dtype"] or "", "x".join(map(str, entry["shape"])),
             (entry["sha256"] or "")[:16], "" if entry["source"] == entry["name"] else entry["source"] or "")
            for entry in result["tensors"]
        ]  # fmt: skip
        lines += ["", *table([("tensor", "status", "dtype", "shape", "sha256", "name in file"), *rows])]
    show(arguments, result, lines)


# convert


def add_convert(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SOURCE", help="a directory or a name on the Hub")
    parser.add_argument("out_dir", metavar="OUT_DIR", help="the directory to write; what was there is replaced whole")
    parser.add_argument("--dtype", help="fp32, bf16 or fp16; default: as in the source")
    parser.add_argument("--head", help="keep this head only: encoder, pretraining, masked-lm, next-sentence, ...")
    parser.add_argument("--verify", action="store_true", help="compare all outputs with transformers' (if installed)")
    add_revision(parser)


def run_convert(arguments: Arguments) -> None:
    """Write any BERT checkpoint anew: config.json, safetensors with today's names, tokenizer files."""
    from minibert.weights.convert import convert

    report = convert(
        arguments.source,
        arguments.out_dir,
        dtype=arguments.dtype,
        head=arguments.head,
        verify=arguments.verify,
        revision=arguments.revision,
    )
    kept, renamed = len(report.named("loaded", "renamed")), len(report.named("renamed"))
    verified = ", outputs verified to be equal" if arguments.verify else ""
    print(f"{arguments.out_dir}: {kept} tensors of the model, {renamed} of them renamed{verified}")


# pretrain


def add_pretrain(parser: argparse.ArgumentParser) -> None:
    from minibert.pretraining.command import add_arguments

    add_arguments(parser)


def run_pretrain(arguments: Arguments) -> None:
    """Pretrain a model with masked words and next sentences on text files, from scratch or from a checkpoint."""
    from minibert.pretraining.command import run

    run(arguments)


# embed


def add_embed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="texts in UTF-8, one a line; - for standard input")
    parser.add_argument("--model", required=True, help="a sentence encoder: a directory or a name on the Hub")
    parser.add_argument("-o", "--output", required=True, metavar="OUT.npy", help="a float32 array, one row a line")
    parser.add_argument("--normalize", action="store_true", help="scale vectors to length 1")
    parser.add_argument("--prompt-name", help="put this prompt of the model before each text (query, document, ...)")
    parser.add_argument("--dtype", help="compute in bfloat16, int8, or auto; default float32")
    parser.add_argument("--device", help="default: the CPU")
    add_revision(parser)


def run_embed(arguments: Arguments) -> None:
    """Embed a file of any size, line by line, into a .npy; run it again to go on after an interruption."""
    from minibert.embedding.files import run

    names = ("model", "normalize", "prompt_name", "dtype", "device", "revision")
    run(arguments.file, arguments.output, **{name: getattr(arguments, name) for name in names})


# classify, ner, answer


def add_texts(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", nargs="+", metavar="TEXT", help="texts, each in quotation marks")
    add_model(parser)


def run_classify(arguments: Arguments) -> None:
    """The label of each text, by a fine-tuned classifier."""
    from minibert.pipelines import pipeline

    results = pipeline("text-classification", arguments.model, revision=arguments.revision)(arguments.text)
    rows = [(f"{each['score']:.4f}", each["label"], text) for each, text in zip(results, arguments.text, strict=True)]
    show(arguments, results, table(rows))


def run_ner(arguments: Arguments) -> None:
    """The entities in each text, by a fine-tuned tagger."""
    from minibert.pipelines import pipeline

    tag = pipeline("ner", arguments.model, revision=arguments.revision, aggregation_strategy="first", stride=16)
    results = tag(arguments.text)
    rows = [
        (f"{each['score']:.4f}", each["entity_group"], text[each["start"] : each["end"]])
        for text, found in zip(arguments.text, results, strict=True)
        for each in found
    ]
    show(arguments, results, table(rows) if rows else ["no entities"])


def add_answer(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("question", metavar="QUESTION", help="a question, in quotation marks")
    parser.add_argument("context", metavar="CONTEXT", help="the text that answers it")
    parser.add_argument("--top-k", type=int, default=1, help="answers (default 1)")
    add_model(parser)


def run_answer(arguments: Arguments) -> None:
    """The span of a text that answers a question, by a fine-tuned model."""
    from minibert.pipelines import pipeline

    ask = pipeline("question-answering", arguments.model, revision=arguments.revision)
    found = ask(arguments.question, arguments.context, top_k=arguments.top_k)
    answers = found if isinstance(found, list) else [found]
    show(arguments, answers, table([(f"{each['score']:.4f}", each["answer"]) for each in answers]))


# finetune


def add_finetune(parser: argparse.ArgumentParser) -> None:
    from minibert.finetuning.command import add_arguments

    add_arguments(parser)


def run_finetune(arguments: Arguments) -> None:
    """Fine-tune a model to classify texts or to tag words, and keep the best epoch."""
    from minibert.finetuning.command import run

    arguments.model = chosen_model(arguments)
    run(arguments)


COMMANDS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], Callable[[Arguments], None]]] = {
    "demo": (add_demo, run_demo),
    "fill-mask": (add_fill_mask, run_fill_mask),
    "next-sentence": (add_next_sentence, run_next_sentence),
    "pretraining-loss": (add_pretraining_loss, run_pretraining_loss),
    "inspect": (add_inspect, run_inspect),
    "convert": (add_convert, run_convert),
    "embed": (add_embed, run_embed),
    "pretrain": (add_pretrain, run_pretrain),
    "finetune": (add_finetune, run_finetune),
    "classify": (add_texts, run_classify),
    "ner": (add_texts, run_ner),
    "answer": (add_answer, run_answer),
}
