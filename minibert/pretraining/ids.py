"""Token ids of many lines at once: BERT's tokenizer on arrays, id for id as the `tokenizers` library gives them.

Each character stands for symbols: numbers that say which letter of the vocabulary it is, and whether it is a word of
its own, as punctuation is. What it stands for is asked of the library, once. Then the pieces of all words are found
side by side: the first piece of each word, the second, and so on.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from itertools import chain, count

import numpy as np
from tokenizers import Tokenizer, normalizers, pre_tokenizers

CHUNK = 1 << 17  # characters at a time: memory stays flat, and arrays in the processor's caches

# Marks that change places where they stand side by side, as those on a letter do in the order of their classes
_LATE, _EARLY = "\U0001d16d", "\U0001d165"


class TokenIds:
    """Token ids of lines, without special tokens: a "[MASK]" in a text is text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokenizer.encode_special_tokens = True
        self.unknown_id = tokenizer.token_to_id(tokenizer.model.unk_token)
        self._longest_word: int = tokenizer.model.max_input_chars_per_word
        self._on_arrays = _looks_at_characters(tokenizer)
        if self._on_arrays:
            vocab = tokenizer.get_vocab(with_added_tokens=False)
            self._symbols = _Symbols(tokenizer, "".join(vocab))
            self._pieces = _Pieces(vocab, tokenizer.model.continuing_subword_prefix, self._symbols)
            added = tokenizer.get_added_tokens_decoder().values()
            self._added = [self._symbols(token.content)[0][:-1] for token in added if not token.special]

    def __call__(self, lines: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of all lines in one array, and the number of tokens of each line."""
        if not lines:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        if not self._on_arrays:
            return self._encoded(lines)
        ids, lengths = [], [0]
        for text in _chunks("\n".join(lines) + "\n"):
            found, counts = self._of_text(text)
            ids.append(found)
            lengths[-1] += int(counts[0])  # the text before may have ended within a line
            lengths += counts[1:].tolist()
        return np.concatenate(ids), np.array(lengths[:-1])  # nothing follows the last line

    def _of_text(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Token ids of a text, and the number of tokens of each of its lines."""
        symbols, line_ends, entangled = self._symbols(text)
        places, ids = self._found(symbols)
        lengths = np.diff(np.searchsorted(places, line_ends), prepend=0)
        doubtful = np.concatenate([entangled, *(_places_of(token, symbols) for token in self._added)])
        if not len(doubtful):
            return ids, lengths
        lines, parts = text.split("\n"), np.split(ids, np.cumsum(lengths)[:-1])
        for number in np.unique(np.searchsorted(line_ends, doubtful)).tolist():
            parts[number] = self._encoded([lines[number]])[0]
        return np.concatenate(parts), np.fromiter(map(len, parts), np.int64, len(parts))

    def _found(self, symbols: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where each token begins, and its id: always the longest piece that the rest of the word begins with."""
        starts, ends = self._symbols.words(symbols)
        failed = ends - starts > self._longest_word
        ids = np.full(len(symbols), -1)
        words, places, root = np.flatnonzero(~failed), starts[~failed], self._pieces.first
        while len(words):
            ids[places], lengths = self._pieces.longest(symbols, places, root)
            failed[words[lengths == 0]] = True
            places = places + lengths
            more = np.flatnonzero((lengths > 0) & (places < ends[words]))
            words, places, root = words[more], places[more], self._pieces.further
        for start, end in zip(starts[failed].tolist(), ends[failed].tolist(), strict=True):
            ids[start:end] = -1
        ids[starts[failed]] = self.unknown_id
        found = np.flatnonzero(ids >= 0)
        return found, ids[found]

    def _encoded(self, lines: list[str]) -> tuple[np.ndarray, np.ndarray]:
        ids = [encoding.ids for encoding in self._tokenizer.encode_batch_fast(lines, add_special_tokens=False)]
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        return np.fromiter(chain.from_iterable(ids), np.int64, int(lengths.sum())), lengths


class _Symbols:
    """What characters stand for: 0 between words, then the letters of an alphabet, one more for all other letters; and
    again as many for the same characters where each is a word.
    """

    def __init__(self, tokenizer: Tokenizer, alphabet: str) -> None:
        self._normalize = tokenizer.normalizer.normalize_str
        self._split = tokenizer.pre_tokenizer.pre_tokenize_str
        self.numbers = {char: i for i, char in enumerate(sorted(set(alphabet)), 1)}
        self.letters = len(self.numbers) + 1  # the number of the unknown one, and the distance to those that are words
        self._start = np.full(0x110000, -1)  # of each code point in _flat
        self._size = np.zeros(0x110000, np.uint8)
        self._moves = np.zeros(0x110000, bool)  # whether its place depends on what stands beside it
        self._flat = np.zeros(0, np.int64)

    def __call__(self, text: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The symbols of a text and one 0 more, where each line ends, and where marks stand that may change places."""
        codes = np.frombuffer((text + "\n").encode("utf-32-le"), "<u4").astype(np.int64)
        starts = self._start[codes]
        if len(new := codes[starts < 0]):
            self._learn(np.unique(new).tolist())
            starts = self._start[codes]
        sizes = self._size[codes]
        ends = np.cumsum(sizes, dtype=np.int64)
        symbols = self._flat[np.repeat(starts - ends + sizes, sizes) + np.arange(ends[-1])]
        moving = np.flatnonzero(self._moves[codes])
        after, before = ends[moving][:-1], ends[moving][1:] - sizes[moving][1:]
        return symbols, ends[codes == ord("\n")] - 1, before[before == after]

    def _learn(self, codes: list[int]) -> None:
        symbols = list(map(self._of, map(chr, codes)))
        sizes = np.array(list(map(len, symbols)))
        self._start[codes] = len(self._flat) + np.cumsum(sizes) - sizes
        self._size[codes] = sizes
        self._flat = np.concatenate([self._flat, np.array(list(chain.from_iterable(symbols)), np.int64)])
        for code in codes:
            normal, beside = map(self._normalize, (chr(code), f"{_LATE}{chr(code)}{_EARLY}"))
            self._moves[code] = bool(normal) and beside != f"{_LATE}{normal}{_EARLY}"

    def _of(self, char: str) -> list[int]:
        normal = self._normalize(char)
        if len(normal) == 3 and normal[0] == normal[2] == " ":  # Chinese
            return [self.letters + self.numbers.get(normal[1], self.letters)]
        return [self._of_normal(char) for char in normal]

    def _of_normal(self, char: str) -> int:
        parts = len(self._split(f"a{char}a"))  # 1: a letter, 2: a blank, 3: a word of its own
        return 0 if parts == 2 else self.numbers.get(char, self.letters) + (self.letters if parts == 3 else 0)

    def words(self, symbols: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where each word starts and ends."""
        alone = symbols > self.letters
        letter = (symbols > 0) & ~alone
        starts, ends = alone | letter, alone | letter
        starts[1:] &= ~(letter[1:] & letter[:-1])
        ends[:-1] &= ~(letter[1:] & letter[:-1])
        return np.flatnonzero(starts), np.flatnonzero(ends) + 1


class _Pieces:
    """The pieces of a vocabulary as an automaton: a tree of those that begin a word, and one of those that go on.

    A state is a number, and its edge for a symbol lies at that number plus the symbol in three tables: `_owner` says
    whose edge it is, `_next` where it leads (0 if no longer piece begins so), `_ids` which piece ends with it (or -1).
    """

    def __init__(self, vocab: dict[str, int], prefix: str, symbols: _Symbols) -> None:
        nodes: list[dict[int, int]] = [{}, {}]  # symbol -> node; the roots of both trees first
        piece_of = {}  # node -> id

        def add(node: int, path: list[int], index: int) -> None:
            for symbol in path:
                if symbol not in nodes[node]:
                    nodes[node][symbol] = len(nodes)
                    nodes.append({})
                node = nodes[node][symbol]
            piece_of[node] = index

        for piece, index in vocab.items():
            letters = [symbols.numbers[char] for char in piece]
            add(0, letters, index)
            if len(letters) == 1:
                add(0, [symbols.letters + letters[0]], index)
            if piece.startswith(prefix):
                add(1, letters[len(prefix) :], index)
        states = _without_collision(nodes)
        self.first, self.further = states[:2]
        self._owner, self._next, self._ids = np.full((3, max(states) + 2 * symbols.letters + 1), -1)
        for state, edges in zip(states, nodes, strict=True):
            for symbol, node in edges.items():
                place = state + symbol
                self._owner[place], self._next[place], self._ids[place] = state, states[node], piece_of.get(node, -1)

    def longest(self, symbols: np.ndarray, places: np.ndarray, root: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the longest piece at each place: its id, and its length; -1 and 0 where there is none."""
        ids, lengths = np.full(len(places), -1), np.zeros(len(places), np.int64)
        rows, state = np.arange(len(places)), np.full(len(places), root)
        for length in count(1):
            edges = state + symbols[places]
            going = np.flatnonzero(self._owner[edges] == state)
            if not len(going):
                break
            rows, places, edges = rows[going], places[going] + 1, edges[going]
            found, state = self._ids[edges], self._next[edges]
            ends = np.flatnonzero(found >= 0)
            ids[rows[ends]], lengths[rows[ends]] = found[ends], length
        return ids, lengths


def _without_collision(nodes: list[dict[int, int]]) -> list[int]:
    """A number for each node that has edges, so that no two edges share their number plus symbol; 0 for the others."""
    draw, numbers, end = random.Random(0), [0] * len(nodes), 1
    used: set[int] = set()
    taken: set[int] = set()
    for node in sorted(range(len(nodes)), key=lambda node: -len(nodes[node])):  # large ones are hard to find room for
        if edges := nodes[node]:
            gaps = (draw.randrange(1, end + 1) for _ in range(8))
            for number in chain(gaps, count(max(1, end - min(edges)))):
                places = [number + symbol for symbol in edges]
                if number not in used and taken.isdisjoint(places):
                    break
            numbers[node], end = number, max(end, 1 + max(places))
            used.add(number)
            taken.update(places)
    return numbers


def _chunks(text: str) -> Iterator[str]:
    """The text in pieces of about CHUNK characters, cut behind a blank or, where there is none, a line's end."""
    start = 0
    while start < len(text):
        end = 1 + max(text.rfind(blank, start, start + CHUNK) for blank in (" ", "\n"))
        end = end or 1 + text.find("\n", start) or len(text)
        yield text[start:end]
        start = end


def _places_of(token: np.ndarray, symbols: np.ndarray) -> np.ndarray:
    """Where a token begins that stands whole among the symbols."""
    places = np.arange(max(0, len(symbols) - len(token)))
    for i, symbol in enumerate(token.tolist()):
        places = places[symbols[places + i] == symbol]
    return places


def _looks_at_characters(tokenizer: Tokenizer) -> bool:
    """Whether the ids of a text are those of its words between blanks, and words what BERT takes for words."""
    plain = isinstance(tokenizer.normalizer, normalizers.BertNormalizer)
    plain &= isinstance(tokenizer.pre_tokenizer, pre_tokenizers.BertPreTokenizer)
    added = tokenizer.get_added_tokens_decoder().values()
    return plain and not any(re.search(r"\s", token.content) for token in added)
