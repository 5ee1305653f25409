"""What a pretraining run goes by: settings that fit together, checked before any work, then words, text and model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from minibert.config import BertConfig
from minibert.heads import BertForPreTraining
from minibert.pretraining.corpus import MAX_UNKNOWN, Corpus, build_corpus
from minibert.pretraining.initial import look_at_neighbours
from minibert.pretraining.loop import Settings
from minibert.pretraining.pairs import PairRules
from minibert.pretraining.report import report
from minibert.pretraining.texts import check_texts
from minibert.pretraining.vocabulary import check_sizes, check_vocab, train_vocab
from minibert.text.tokenizer import BertTokenizer
from minibert.training.run import RunDirectory, Settled, hash_of_file
from minibert.weights import files

# What decides on the words and on a new model, and its default
START: dict[str, Any] = {
    "init": None,
    "vocab": None,
    "vocab_size": 30522,
    "limit_alphabet": None,
    "cased": False,
    "size": "base",
    "layers": None,
    "hidden_size": None,
    "initializer_range": 0.02,
    "neighbours": False,
    "dropout": 0.1,
}
# What a run may go on with differently: the schedule, and how it is computed, written down and watched
MAY_CHANGE = frozenset(
    "steps learning_rate warmup_steps weight_decay betas clip_norm epsilon accumulate bf16 compile "
    "gradient_checkpointing dense fsdp workers save_every validate_every validation_rows log_every".split()
)
VOCAB, TRAIN, VALIDATION = "data/vocab.txt", "data/train", "data/validation"


@dataclass(frozen=True)
class RunPlan:
    """All that is decided. start: the settings that are neither of training nor of the pairs."""

    settled: Settled
    rules: PairRules
    training: Settings
    start: dict[str, Any]


def plan(given: Mapping[str, Any], directory: RunDirectory, *, resume: bool, processes: int = 1) -> RunPlan:
    """Decide on all settings, and refuse what cannot be before anything is touched.

    Raises ValueError for options that cannot go together, that have no effect, or that contradict the run that goes
    on, each by its name; FileNotFoundError for files that are not there; and what the files' readers raise.
    """
    paths = ("text", "validation", "vocab")
    given = {name: _absolute(value) if name in paths else value for name, value in given.items()}
    if resume:
        given = _without_same_texts(given, directory)
    defaults = {**asdict(Settings()), **asdict(PairRules()), **START}
    defaults |= {"text": [], "validation": [], "prose": False, "max_unknown": MAX_UNKNOWN}
    if "steps" in given and not resume:
        defaults["warmup_steps"] = min(10_000, given["steps"] // 10)
    settled = directory.settle("pretrain", given, defaults, resume=resume, may_change=MAY_CHANGE)
    values = settled.settings
    if not resume:
        refuse_void(given)
    rules, training = (
        cls(**{field.name: _value(values, field.name) for field in fields(cls)}) for cls in (PairRules, Settings)
    )
    training.check_rows(processes)
    if training.fsdp and processes == 1:
        raise ValueError("--fsdp shards the parameters over several processes, but this is the only one: use torchrun")
    if training.compile and training.fsdp:
        raise ValueError("--compile and --fsdp cannot go together: leave one of them out")
    start = {name: value for name, value in values.items() if name not in asdict(rules) | asdict(training)}
    result = RunPlan(settled, rules, training, start)
    if not (resume and directory.has_checkpoint):
        check_start(result)
    if not _is_built(directory, TRAIN) or (start["validation"] and not _is_built(directory, VALIDATION)):
        if not start["text"]:
            raise ValueError("text is empty: name at least one text file (.txt, .gz or .xz) to pretrain on")
        check_texts([*start["text"], *start["validation"]])
    return result


def refuse_void(given: Mapping[str, Any]) -> None:
    """Raise ValueError for options that another option makes void."""
    if "init" in given and given.get("neighbours"):
        raise ValueError("--neighbours is for a start from scratch: leave it or --init out")
    of_init = [name for name in START if name != "init"]
    for chosen, brings, names in (
        ("init", "brings its own sizes, weights and tokenizer", of_init),
        ("vocab", "is a vocabulary that is there already", ["vocab_size", "limit_alphabet"]),
    ):
        if chosen in given and (void := [f"--{name.replace('_', '-')}" for name in names if name in given]):
            raise ValueError(f"--{chosen} {brings}: leave out {', '.join(void)}, or --{chosen}")


def check_start(plan: RunPlan) -> None:
    """Raise ValueError for a model or a vocabulary that cannot be, or does not fit the run."""
    start = plan.start
    if start["init"] is not None:
        config = BertConfig.from_pretrained(start["init"])
        if plan.rules.max_length > config.max_position_embeddings:
            raise ValueError(
                f"--max-length is {plan.rules.max_length}, but {start['init']} has {config.max_position_embeddings} "
                "positions: name a smaller one"
            )
        ids = 1 + max(BertTokenizer.from_pretrained(start["init"]).get_vocab().values())
        if ids > config.vocab_size:
            raise ValueError(f"{start['init']}: its tokenizer has {ids} ids, but the model only {config.vocab_size}")
        return
    if start["vocab"] is not None:
        check_vocab(start["vocab"])
    check_sizes(start["vocab_size"], start["limit_alphabet"])
    model_config(start, plan.rules.max_length, start["vocab_size"])


def model_config(start: Mapping[str, Any], max_length: int, vocab_size: int) -> BertConfig:
    """The sizes of a new model. Raises ValueError for impossible ones."""
    changes: dict[str, Any] = {"vocab_size": vocab_size, "max_position_embeddings": max_length}
    changes["initializer_range"] = start["initializer_range"]
    changes |= {"hidden_dropout_prob": start["dropout"], "attention_probs_dropout_prob": start["dropout"]}
    if start["layers"] is not None:
        changes["num_hidden_layers"] = start["layers"]
    if (width := start["hidden_size"]) is not None:
        if width > 64 and width % 64:
            raise ValueError(f"--hidden-size is {width}, but must be a multiple of 64, the size of a head")
        heads = max(1, width // 64)
        changes |= {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": 4 * width}
    return BertConfig.named(start["size"], **changes)


def make_data(plan: RunPlan, directory: RunDirectory, progress: bool | None = None) -> None:
    """Vocabulary and tokenized text, unless they are there and made of the same."""
    start = plan.start
    texts = {TRAIN: start["text"], VALIDATION: start["validation"]}
    if plan.settled.resumes and all(_is_built(directory, name) for name, names in texts.items() if names):
        return  # the text itself need not be there any more
    hashes = {path: hash_of_file(path) for names in texts.values() for path in names}
    tokenizer = _tokenizer(start, directory, [hashes[path] for path in start["text"]], progress)
    backend = hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    for name, paths in texts.items():
        made_of = {"text": [hashes[path] for path in paths], "tokenizer": backend, "prose": start["prose"]}
        if not paths or (_is_built(directory, name) and directory.is_made_of(name, made_of)):
            continue
        options = {"prose": start["prose"], "max_unknown": start["max_unknown"], "progress": progress}
        build_corpus(paths, directory.path / name, tokenizer, **options)
        directory.made(name, made_of)


def _tokenizer(
    start: Mapping[str, Any], directory: RunDirectory, texts: list[str], progress: bool | None
) -> BertTokenizer:
    """The tokenizer of --init, or one with the vocabulary of --vocab, or of one trained on the text."""
    if start["init"] is not None:
        return BertTokenizer.from_pretrained(start["init"])
    vocab = directory.path / VOCAB
    vocab.parent.mkdir(exist_ok=True)
    if start["vocab"] is not None:
        files.write(vocab, Path(start["vocab"]).read_bytes())
    else:
        sizes = {name: start[name] for name in ("vocab_size", "limit_alphabet")}
        made_of = {"text": texts, "cased": start["cased"], **sizes}
        if not directory.is_made_of(VOCAB, made_of):
            train_vocab(start["text"], vocab, lowercase=not start["cased"], progress=progress, **sizes)
            directory.made(VOCAB, made_of)
    return BertTokenizer(vocab, do_lower_case=not start["cased"])


def open_corpora(plan: RunPlan, directory: RunDirectory) -> tuple[Corpus, Corpus | None]:
    """The tokenized text of a run, and that of its validation if there is one."""
    validation = Corpus(directory.path / VALIDATION) if plan.start["validation"] else None
    return Corpus(directory.path / TRAIN), validation


def described(plan: RunPlan, corpus: Corpus) -> str:
    """What the text and the examples made of it are like."""
    return f"{corpus.report}\n{report(corpus, plan.rules, plan.training.rows, packed=plan.training.packed)}"


def make_model(plan: RunPlan, corpus: Corpus, state: Mapping[str, Any] | None) -> BertForPreTraining:
    """A new model, or the one to continue from, in float32: of a checkpoint's `state` only the sizes matter here."""
    start = plan.start
    if state is not None and "config" in state:
        return BertForPreTraining(BertConfig.from_dict(state["config"]))
    torch.manual_seed(plan.rules.seed)
    if start["init"] is not None:
        return BertForPreTraining.from_pretrained(start["init"], dtype=torch.float32)
    model = BertForPreTraining(model_config(start, plan.rules.max_length, corpus.vocab_size))
    if start["neighbours"]:
        look_at_neighbours(model)
    return model


def _is_built(directory: RunDirectory, name: str) -> bool:
    return (directory.path / name / "corpus.json").is_file()


def _without_same_texts(given: Mapping[str, Any], directory: RunDirectory) -> dict[str, Any]:
    """`given` without the texts that the run's corpora were made of, wherever they lie now.

    Raises ValueError for other texts.
    """
    given = dict(given)
    for option, name in (("text", TRAIN), ("validation", VALIDATION)):
        made_of = directory.sources_of(name)
        if option in given and made_of is not None:
            if [hash_of_file(path) for path in check_texts(given[option])] != made_of["text"]:
                raise ValueError(f"{directory.path} holds a run on another {option}: leave it out, the run has its own")
            del given[option]
    return given


def _absolute(value: str | list[str]) -> str | list[str]:
    return [_absolute(each) for each in value] if isinstance(value, list) else str(Path(value).absolute())


def _value(values: Mapping[str, Any], name: str) -> Any:
    """A setting as it was before JSON."""
    return tuple(values[name]) if name == "betas" else values[name]
