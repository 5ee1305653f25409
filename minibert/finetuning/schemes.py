"""Labels of words as entities: which scheme they follow, and how many entities were found, counted by seqeval.

All schemes are read as the CoNLL shared tasks' conlleval reads them: B, I, E and S begin, continue, end and make up an
entity; a label that continues nothing begins an entity. IOB1, IOB2, IOE1, IOE2 and IOBES are that already. BILOU says L
and U for E and S, BMES says M for I, and labels without a prefix (PER, PER, O) say I.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from importlib.util import find_spec

OUTSIDE = "O"
# What is written after B, I, ... and what conlleval says for each
SCHEMES: dict[str, dict[str, str]] = {
    "IOB": {"B": "B", "I": "I"},
    "IOE": {"I": "I", "E": "E"},
    "IOBES": {"B": "B", "I": "I", "E": "E", "S": "S"},
    "BILOU": {"B": "B", "I": "I", "L": "E", "U": "S"},
    "BMES": {"B": "B", "M": "I", "E": "E", "S": "S"},
    "BMEWO": {"B": "B", "M": "I", "E": "E", "W": "S"},
}
NO_PREFIX, NO_ENTITIES = "IO", "none"
CHOICES = (*SCHEMES, NO_PREFIX, NO_ENTITIES)
_PREFIXED = re.compile(r"([BIELUSMW])(?:[-_](.+))?", re.IGNORECASE)
_SUFFIXED = re.compile(r"(.+)[-_]([BIELUSMW])", re.IGNORECASE)


def is_entity_label(label: str) -> bool:
    """Whether a label is O, a letter of a scheme, or such a letter with a type behind it (B-PER)."""
    return is_outside(label) or _PREFIXED.fullmatch(label) is not None


def is_outside(label: str) -> bool:
    """Whether a label says that a word belongs to no entity."""
    return label.upper() == OUTSIDE


def find_scheme(labels: Collection[str]) -> str:
    """The name of the scheme that a set of labels follows: one of `CHOICES`.

    Labels without any letter of a scheme are names: of entities if there is an O among them (IO), else of something
    else (parts of speech, say). Raises ValueError for labels that mix both, or letters of several schemes.
    """
    named = [label for label in labels if not is_outside(label)]
    with_outside = len(named) < len(labels)
    if not named:
        return NO_ENTITIES
    suffixed = _are_suffixed(named)
    parsed = [_parts(label, suffixed) for label in named]
    plain = [label for label, (letter, _) in zip(named, parsed, strict=True) if letter is None]
    typed = [label for label, (letter, kind) in zip(named, parsed, strict=True) if letter and kind]
    if plain and not (typed and (with_outside or any(label.startswith(("B-", "I-")) for label in typed))):
        # Single characters are codes of parts of speech, where O is one as others are
        return NO_PREFIX if with_outside and any(len(label) > 1 for label in named) else NO_ENTITIES
    letters = {letter for letter, _ in parsed if letter}
    fits = [name for name, known in SCHEMES.items() if letters <= known.keys()]
    if plain or not fits:
        what = f"{', '.join(sorted(plain)[:5])} have none" if plain else f"no scheme has {', '.join(sorted(letters))}"
        raise ValueError(
            f"labels: {sorted(typed or named)[0]} has a letter that places it in an entity, but {what}; known schemes "
            f"are {', '.join(SCHEMES)}. Give --scheme {NO_PREFIX} if each label is a type of entity, --scheme "
            f"{NO_ENTITIES} if they are no entities"
        )
    return fits[0]


def check_scheme(scheme: str, labels: Collection[str]) -> None:
    """Raises ValueError for labels that the scheme does not have, ImportError where seqeval is needed and missing."""
    if scheme == NO_ENTITIES:
        return
    if scheme in SCHEMES:
        named = [label for label in labels if not is_outside(label)]
        suffixed = _are_suffixed(named)
        wrong = sorted(label for label in named if _parts(label, suffixed)[0] not in SCHEMES[scheme])
        if wrong:
            raise ValueError(f"--scheme {scheme}: the labels {', '.join(wrong[:5])} are not of it")
    if find_spec("seqeval") is None:
        raise ImportError(
            "labels of entities are scored by seqeval, which is not installed: pip install 'minibert-torch[finetune]'; "
            f"or score words alone with --scheme {NO_ENTITIES}"
        )


def entity_scores(
    predicted: Sequence[Sequence[str]], true: Sequence[Sequence[str]], scheme: str = "IOB"
) -> dict[str, float]:
    """Precision, recall and F1 over entities, which must be right in type and both ends, and the words' accuracy."""
    from seqeval.metrics.sequence_labeling import precision_recall_fscore_support

    labels = {label for side in (true, predicted) for labels in side for label in labels}
    read = _canonical(labels, scheme)
    both = [[[read[label] for label in labels] for labels in side] for side in (true, predicted)]
    precision, recall, f1, _ = precision_recall_fscore_support(*both, average="micro", zero_division=0)
    same = sum(a == b for ours, theirs in zip(predicted, true, strict=True) for a, b in zip(ours, theirs, strict=True))
    accuracy = same / max(1, sum(map(len, true)))
    return {"precision": float(precision), "recall": float(recall), "f1": float(f1), "accuracy": accuracy}


def _are_suffixed(labels: Collection[str]) -> bool:
    """Whether the letters stand behind the types (PER-B): all labels end so, and one type has several letters."""
    found = [_SUFFIXED.fullmatch(label) for label in labels]
    if not all(found) or all(_PREFIXED.fullmatch(label) for label in labels):
        return False
    return len({match[1] for match in found if match}) < len(found)


def _parts(label: str, suffixed: bool) -> tuple[str | None, str]:
    """The letter and the type; the letter is None where there is none."""
    if suffixed and (found := _SUFFIXED.fullmatch(label)):
        return found[2].upper(), found[1]
    if found := _PREFIXED.fullmatch(label):
        return found[1].upper(), found[2] or ""
    return None, label


def _canonical(labels: Collection[str], scheme: str) -> dict[str, str]:
    """Each label as seqeval reads it."""
    named = [label for label in labels if not is_outside(label)]
    suffixed = scheme != NO_PREFIX and _are_suffixed(named)
    read = {label: OUTSIDE for label in labels if is_outside(label)}
    for label in named:
        letter, kind = ("I", label) if scheme == NO_PREFIX else _parts(label, suffixed)
        letter = letter if scheme == NO_PREFIX else SCHEMES[scheme][letter or ""]
        read[label] = f"{letter}-{kind}" if kind else letter
    return read
