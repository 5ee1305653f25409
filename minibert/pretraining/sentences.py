"""Running English prose to sentences, by rules: good enough for sentence pairs, where a wrong split now and then is
harmless.
"""

from __future__ import annotations

import re

_OPENING, _CLOSING = "\"'\u201c\u2018([", "\"'\u201d\u2019)]"

# A sentence ends with . ! or ?, closing quotation marks or brackets, and white space before what can begin another
_END = re.compile(rf"[.!?]+[{re.escape(_CLOSING)}]*\s+(?=[{re.escape(_OPENING)}]*[A-Z0-9])")

# What has a full stop inside a sentence; single letters are initials
_ABBREVIATIONS = frozenset(
    "mr mrs ms messrs dr prof st rev hon sen rep gov gen col maj capt lt sgt jr sr no nos vol vols fig figs p pp ch "
    "sec art ed eds etc e.g i.e cf vs viz approx ca al inc ltd co corp dept est jan feb mar apr jun jul aug sep sept "
    "oct nov dec mt ft u.s u.k a.m p.m b.c a.d ph.d".split()
)


def split_sentences(text: str) -> list[str]:
    """The sentences of `text`, stripped; none of them is empty.

    >>> split_sentences('Dr. Who came at 5 p.m. sharp. "Run!" he said. They ran.')
    ['Dr. Who came at 5 p.m. sharp.', '"Run!" he said.', 'They ran.']
    """
    sentences, start = [], 0
    for match in _END.finditer(text):
        if text[match.start()] == "." and not _ends_sentence(text[start : match.start()]):
            continue
        sentences.append(text[start : match.end()].strip())
        start = match.end()
    if rest := text[start:].strip():
        sentences.append(rest)
    return sentences


def _ends_sentence(before: str) -> bool:
    """Whether a full stop after `before` ends a sentence, rather than an abbreviation or an initial."""
    last = before.rsplit(maxsplit=1)[-1].lstrip(_OPENING).lower() if before.strip() else ""
    return last not in _ABBREVIATIONS and not (len(last) == 1 and last.isalpha() and last != "i")
