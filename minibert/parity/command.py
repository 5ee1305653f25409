"""`minibert parity`: exit status 0 the same, 1 different, 2 trouble."""

from __future__ import annotations

import argparse
import json
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minibert import terminal
from minibert.terminal import Arguments

CHECKS = ("tokenizer", "gradients", "train", "invariance")
DTYPES = ("float32", "bfloat16", "float16", "float64", "int8")
SAME, DIFFERENT, TROUBLE = 0, 1, 2
# What a certificate keeps, to be repeated
_OPTIONS = ("model", "against", "path", "dtype", "texts", "head", "require", "checks", "steps", "threads", "revision")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `minibert parity`."""
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a directory or a name on the Hub; default: bundled")
    parser.add_argument("--against", nargs="+", metavar="PEER", help="transformers (the default), transformers-eager, "
                        "onnxruntime, openvino, or a file written with --save or of JSON lines")  # fmt: skip
    parser.add_argument("--path", nargs="+", choices=("plain", "fast"), default=["plain", "fast"],
                        help="which of minibert's own (default: both)")  # fmt: skip
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["float32"], metavar="DTYPE",
                        type=lambda name: terminal.DTYPES.get(name, name),
                        help=f"{', '.join(DTYPES)}; default: float32")  # fmt: skip
    parser.add_argument(
        "--texts", metavar="FILE", help="one a line, a tab between the two of a pair; default: built in"
    )
    parser.add_argument("--checks", nargs="*", choices=CHECKS, default=list(CHECKS), help="beside outputs and steps")
    parser.add_argument("--steps", type=int, default=3, metavar="N", help="optimizer steps of the check train (3)")
    parser.add_argument("--require", choices=("bits", "exact", "answers"), help="default: bits for the plain path "
                        "against transformers, answers for int8, else exact")  # fmt: skip
    parser.add_argument("--head", help="compare with this head (see convert); default: the checkpoint's own")
    parser.add_argument("--threads", type=int, metavar="N", help="for all sides; default: torch's")
    parser.add_argument("-o", "--output", metavar="DIR", help="write certificate.json, .md and .html there")
    parser.add_argument("--save", metavar="FILE", help="write inputs and minibert's results as safetensors")
    parser.add_argument("--verify", metavar="CERTIFICATE", help="compute it again here, and say what differs and why")
    terminal.add_revision(parser)
    parser.set_defaults(trouble=TROUBLE)


def run(arguments: Arguments) -> int:
    """Certify that minibert computes what another implementation does, or name the line where it does not.

    Exit status: 0 the same, 1 different, 2 trouble (an argument, a file, a peer that is not installed).
    """
    return _verify(arguments) if arguments.verify else _certify(arguments)


class _Job:
    """One checkpoint, the head that it was saved with, its tokenizer, and what it is asked."""

    def __init__(self, arguments: Arguments):
        import torch

        from minibert.model import BertModel
        from minibert.parity import inputs
        from minibert.weights import hub
        from minibert.weights.convert import inspect

        if arguments.threads is not None:
            if arguments.threads < 1:
                raise ValueError(f"--threads {arguments.threads}: must be 1 or more")
            torch.set_num_threads(arguments.threads)
        chosen = [(path, dtype) for dtype in arguments.dtype for path in arguments.path]
        self.pairs = [pair for pair in chosen if pair != ("plain", "int8")]
        if not self.pairs:
            raise ValueError("--dtype int8 is computed by --path fast alone")
        self.arguments = arguments
        self.source = hub.as_source(terminal.chosen_model(arguments), revision=arguments.revision)
        skeleton, self.report = inspect(self.source, arguments.head)
        if absent := self.report.named("missing", "newly initialised"):
            raise ValueError(f"{self.source.name} lacks weights of {type(skeleton).__name__}: {', '.join(absent)}")
        self.kind, self.config = type(skeleton), skeleton.config
        self.options = {"add_pooling_layer": skeleton.pooler is not None} if isinstance(skeleton, BertModel) else {}
        self.directory = self.source.file("config.json").parent
        self.name = Path(self.source.name).name
        self.texts = inputs.read_texts(arguments.texts)
        self.tokenizer = self._tokenizer()
        self.cases = list(inputs.synthetic(self.config, self.kind.__name__))
        if self.tokenizer is not None and self.kind.__name__ != "BertForMultipleChoice":
            self.cases += inputs.encoded(self.texts, self.tokenizer, self.config)
        self._sides: dict[tuple[str, str], Any] = {}

    def _tokenizer(self) -> Any:
        from minibert.text.tokenizer import BertTokenizer

        try:
            return BertTokenizer.from_pretrained(self.source)
        except (OSError, ValueError):
            if self.arguments.texts is not None:
                raise
            return None  # ids alone, then

    def side(self, name: str, dtype: str) -> Any:
        """One of minibert's paths, or a peer."""
        from minibert.parity import peers

        if (name, dtype) not in self._sides:
            self._sides[name, dtype] = (
                peers.theirs(name, self.kind, self.directory, dtype, self.cases[0], **self.options)
                if name in peers.PEERS
                else peers.ours(self.kind, self.source, name, dtype, **self.options)
            )
        return self._sides[name, dtype]

    def compared(self, path: str, dtype: str, spec: str) -> Any:
        """One comparison with the checks that its sides allow."""
        from minibert.parity import checks, peers
        from minibert.parity.comparison import comparison

        is_peer, is_twin = spec in peers.PEERS, spec.startswith("transformers")
        if not is_peer and not Path(spec).is_file():
            raise ValueError(f"--against {spec}: is no file and none of {', '.join(peers.PEERS)}")
        own = self.side(path, dtype)
        widest = "float32" if dtype == "int8" or not is_twin else dtype
        other, cases = (self.side(spec, widest), self.cases) if is_peer else peers.golden(spec)
        default = "answers" if dtype == "int8" else "bits" if (path, spec) == ("plain", "transformers") else "exact"
        report = comparison(own, other, cases, self.config, self.arguments.require or default)
        wanted = self.arguments.checks
        if "tokenizer" in wanted and is_twin and self.tokenizer is not None:
            from transformers import BertTokenizer

            twin = BertTokenizer.from_pretrained(self.directory)
            report.checks["tokenizer"] = checks.tokenizers(
                self.tokenizer, twin, self.texts, self.config.max_position_embeddings
            )
        checks.run(report, own, other, cases, self.config, wanted, self.arguments.steps)
        return report

    def outputs(self) -> dict[str, str]:
        """Digests of the results of every minibert side."""
        from minibert.parity.certificate import outputs_digests

        sides = [self.side(*pair) for pair in self.pairs]
        return {name: digest for side in sides for name, digest in outputs_digests(side, self.cases).items()}

    def statement(self, reports: list[Any]) -> dict[str, Any]:
        from minibert.parity.certificate import sha256, statement

        options = {name: getattr(self.arguments, name) for name in _OPTIONS}
        files = {name: self.source.file(name) for name in ("config.json", "vocab.txt", "tokenizer.json")}
        sides = [self.side(*pair) for pair in self.pairs]
        return statement(
            self.name, reports, {"line": _line(options), **options},
            {side.name: str(side.module.plan).split(",")[0] for side in sides if hasattr(side.module, "plan")},
            weights={tensor["name"]: tensor["sha256"] for tensor in self.report.to_dict() if tensor["sha256"]},
            files={name: sha256(file.read_bytes()) for name, file in files.items() if file is not None},
            texts={f"text {number}": sha256(text) for number, text in enumerate(self.texts, 1)},
            outputs=self.outputs(),
        )  # fmt: skip


def _line(options: dict[str, Any]) -> str:
    """The command that repeats a certificate."""
    words = ["minibert", "parity", *([options["model"]] if options["model"] else [])]
    for name, value in options.items():
        if name != "model" and value not in (None, []):
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return shlex.join(words)


def _certify(arguments: Arguments) -> int:
    from minibert.parity import peers

    if arguments.against is None:
        arguments.against = ["transformers"] if find_spec("transformers") else []
        if not arguments.against and not arguments.save:
            raise ImportError("nothing to compare with: pip install 'minibert-torch[parity]', or give --against FILE")
    job = _Job(arguments)
    if arguments.save:
        side = job.side(*job.pairs[0])
        peers.save(arguments.save, side, job.cases, {"model": job.name, "side": side.name})
    reports = []
    for path, dtype in job.pairs:
        for spec in arguments.against:
            reports.append(job.compared(path, dtype, spec))
            if not (arguments.json or arguments.quiet):
                print(reports[-1], flush=True)
    certificate = job.statement(reports) if arguments.output or arguments.json else {}
    if arguments.output:
        _write(Path(arguments.output), certificate)
    if arguments.json:
        terminal.show(arguments, certificate, [])
    return SAME if all(reports) else DIFFERENT


def _write(directory: Path, certificate: dict[str, Any]) -> None:
    from minibert.parity.report import to_html, to_markdown
    from minibert.weights import files

    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(certificate, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    for name, content in (("json", text), ("md", to_markdown(certificate)), ("html", to_html(certificate))):
        files.write(directory / f"certificate.{name}", content)


def _verify(arguments: Arguments) -> int:
    """Compute the results of a certificate again; what differs of subject, results and machine is named."""
    import torch

    from minibert.parity import certificate

    then = certificate.load(arguments.verify)
    measured = then["predicate"]["measurements"]
    for name in ("path", "dtype", "model", "texts", "head", "revision", "threads"):
        if name in ("path", "dtype") or getattr(arguments, name) is None:
            setattr(arguments, name, measured["command"][name])
    job = _Job(arguments)
    found = certificate.differences(then, job.statement([]))
    holds, why = certificate.verdict(found)
    recorded = measured["threads"]["threads"]
    if "outputs" in found and recorded != torch.get_num_threads():
        torch.set_num_threads(recorded)
        if job.outputs() == measured["outputs"]:
            why += f"; with {recorded} threads they are the same: the number of threads explains it"
    lines = [f"{'SAME' if holds else 'DIFFERENT'}  {job.name}: {why}"]
    lines += [f"  {group}: {'; '.join(items[:5])}" + f" and {len(items) - 5} more" * (len(items) > 5)
              for group, items in found.items()]  # fmt: skip
    terminal.show(arguments, {"holds": holds, "why": why, "differences": found}, lines)
    return SAME if holds else DIFFERENT
