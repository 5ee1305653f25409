"""Small open tasks built from the corpus: halves of sentences, questions about people, words and their definitions."""

from __future__ import annotations

import json
import lzma
import random
import re
from pathlib import Path
from typing import Any

Example = tuple[str, str]  # text, label; or text and the text that belongs to it
WORDS = (12, 40)  # of a sentence
LINES = 200_000  # of a part of the corpus to choose from

# A person's name and years, and what they were: "Collins, William Wilkie (1824-1889), English novelist, ..."
PERSON = re.compile(r"^([A-Z][^\W\d]+), ([A-Z][^.,;:()\d]{2,40}) \((\d{4})-(\d{4})\), ([A-Za-z][A-Za-z -]{5,40}), ")
QUESTIONS = ("When was {} born?", "When did {} die?", "What was {}?")
DEFINITION = re.compile(r"^([A-Z][A-Za-z -]+(?:, [A-Za-z -]+)*): ([a-z(][^\":]{15,200}\.)$")  # WordNet's lines
MOST_WORDS = 4  # that are defined together
LONGEST_PASSAGE = 120  # characters of what is said about a person


def lines(path: Path, count: int | None) -> list[str]:
    """The first lines of a corpus file."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return [line.strip() for _, line in zip(range(count or 10**9), file, strict=False)]


def halves(path: Path, count: int, seed: int) -> list[Example]:
    """One half each of `count` sentences of a corpus file, as many first as second halves."""
    found = lines(path, LINES)
    draw = random.Random(seed)
    draw.shuffle(found)
    examples: list[Example] = []
    for line in found:
        words = re.findall(r"[a-z']+", line.lower())
        if line.endswith(".") and WORDS[0] <= len(words) <= WORDS[1]:
            first = len(examples) % 2 == 0
            half = words[: len(words) // 2] if first else words[len(words) // 2 :]
            examples.append((" ".join(half), "first" if first else "second"))
        if len(examples) == count:
            return examples
    raise ValueError(f"{path} has {len(examples)} suitable sentences in its first {LINES} lines, not {count}")


def people(path: Path) -> list[dict[str, Any]]:
    """Each person once: the name, the passage, and the answers to the three questions."""
    found = {}
    for line in lines(path, None):
        if match := PERSON.match(line):
            surname, forename, born, died, what = match.groups()
            name = f"{forename} {surname}"
            passage = line if len(line) <= LONGEST_PASSAGE else line[: line.rfind(" ", 0, LONGEST_PASSAGE)]
            if match.end() > len(passage):
                continue
            starts = [match.start(i) for i in (3, 4, 5)]
            answers = list(zip((born, died, what), starts, strict=True))
            found[name] = {"name": name, "passage": passage, "answers": answers}
    return list(found.values())


def questions(persons: list[dict[str, Any]], count: int, seed: int) -> list[dict[str, Any]]:
    """Questions about one of the two persons of a passage, or (a quarter) about somebody else, with no answer."""
    draw = random.Random(seed)
    made = []
    for i in range(count):
        asked, other, absent = draw.sample(persons, 3)
        pair = draw.sample([asked, other], 2)
        context = " ".join(person["passage"] for person in pair)
        kind = draw.randrange(len(QUESTIONS))
        has = i % 4 != 0
        name = asked["name"] if has else absent["name"]
        answer, start = asked["answers"][kind]
        start += 0 if pair[0] is asked else len(pair[0]["passage"]) + 1
        answers = [{"text": answer, "answer_start": start}] if has else []
        made.append({"question": QUESTIONS[kind].format(name), "context": context, "answers": answers})
    draw.shuffle(made)
    return made


def definitions(path: Path, count: int, seed: int) -> list[Example]:
    """A definition and the words for it, each once."""
    found: dict[str, str] = {}
    for line in lines(path, None):
        if (match := DEFINITION.match(line)) and len(match[1].split()) <= MOST_WORDS:
            found.setdefault(match[1].lower(), match[2])
    pairs = [(definition, words) for words, definition in found.items()]
    random.Random(seed).shuffle(pairs)
    if len(pairs) < count:
        raise ValueError(f"{path} has {len(pairs)} definitions, not {count}")
    return pairs[:count]


def write_json_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path
