"""Token ids by arrays: those of the `tokenizers` library, whatever the text, the vocabulary and the settings."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from minibert.pretraining import ids as ids_module
from minibert.pretraining.ids import TokenIds
from minibert.text.tokenizer import BertTokenizer

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
# Letters with accents, whole and in parts; controls and blanks of all kinds; marks whose order is decided by the norm
# (Javanese, Balinese, musical, Hangul); Hangul, Thai, Arabic, Devanagari, Hebrew; Chinese, rare, doubled and beyond
# 16 bits, and what lies beside it; symbols, emoji and what joins them; what lowercasing makes two of
ODD = (
    "abABzZ éÉ"
    "e\u0301\u0323İıßẞſﬁΣςσ12_ .,-'’[]#$\u00a0\u2028\u2029\u0085\u3000\u1680\t\r\x0b\x1c\x01\x7f\u00ad\u200b\u200d"
    "\ufeff\ufffd\ufe0f\ua953\ua9c0\u1b44\u1baa\U0001d165\U0001d16d\u302e\u302f\U00016ff0가각힣가ไทยกำ้عَّـकि्षनिאָשׁ"
    "中文字㐀䶿䷀䷿一鿿ꀀ豈\ufa0e\U00020000\U0002a6df\U0002a6e0\U0002b81e\U0002f800々〇、。ー東京カｶﾞがか\u3099"
    "😀👩🏽❤€™№½²ⅷ𝐀\U0010ffff\ue000"
)
CHARACTERS = st.one_of(st.sampled_from(ODD), st.characters(exclude_categories=["Cs"]).filter(lambda c: c != "\n"))
LINES = st.lists(st.text(CHARACTERS, max_size=20), max_size=8)


def library(tokenizer: Tokenizer, lines: list[str]) -> list[list[int]]:
    tokenizer.encode_special_tokens = True
    return [encoding.ids for encoding in tokenizer.encode_batch(lines, add_special_tokens=False)]


def ours(token_ids: TokenIds, lines: list[str]) -> list[list[int]]:
    ids, lengths = token_ids(lines)
    assert len(lengths) == len(lines)
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] if lines else []


def check(tokenizer: Tokenizer, lines: list[str]) -> None:
    assert ours(TokenIds(tokenizer), lines) == library(tokenizer, lines)


def vocabulary(pieces: list[str]) -> dict[str, int]:
    return {piece: i for i, piece in enumerate(dict.fromkeys([*SPECIAL, *pieces]))}


def some_pieces(seed: int) -> list[str]:
    """Of the odd characters, as the normalizer leaves them and as they are; a third of them is left out."""
    draw = random.Random(seed)
    letters = [*ODD, *normalizers.BertNormalizer().normalize_str(ODD), *"abc" * 20]
    words = ["".join(draw.choices(letters, k=draw.randint(1, 4))) for _ in range(400)]
    return [
        *draw.sample(letters, len(letters) * 2 // 3),
        *words[::2],
        *(f"##{word}" for word in [*words[1::2], *letters[::2]]),
    ]


TOKENIZERS = [
    BertTokenizer(vocabulary(some_pieces(i)), do_lower_case=lower, strip_accents=strip, tokenize_chinese_chars=chinese)
    for i, (lower, strip, chinese) in enumerate(
        (lower, strip, chinese) for lower in (True, False) for strip in (None, True, False) for chinese in (True, False)
    )
]
KNOWN = [TokenIds(tokenizer.backend_tokenizer) for tokenizer in TOKENIZERS]


@pytest.mark.parametrize("which", range(len(TOKENIZERS)))
@settings(max_examples=60, deadline=None)
@given(lines=LINES, chunk=st.sampled_from([1, 7, 1 << 17]))
def test_any_text_has_the_ids_of_the_library(which, lines, chunk):
    """Of texts cut anywhere, and of characters known from other texts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ids_module, "CHUNK", chunk)
        assert ours(KNOWN[which], lines) == library(TOKENIZERS[which].backend_tokenizer, lines)


@pytest.mark.parametrize("which", range(len(TOKENIZERS)))
def test_each_character_has_the_ids_of_the_library(which):
    """One in a hundred of all, and all odd ones, within a word, beside themselves, and beside each other."""
    codes = [code for code in range(1 + which, 0x110000, 101) if not 0xD800 <= code < 0xE000 and code != ord("\n")]
    odd = [f"a{one}{other}b" for one in ODD for other in random.Random(which).sample(ODD, 12)]
    check(TOKENIZERS[which].backend_tokenizer, [*(f"a{c}b {c}{c}" for c in map(chr, codes)), *odd])


@pytest.mark.parametrize("seed", range(5))
def test_running_text(seed):
    """Words of many pieces, which the longest piece first often leads astray."""
    draw = random.Random(seed)
    pieces = ["".join(draw.choices("abc", k=draw.randint(1, 6))) for _ in range(60)]
    tokenizer = BertTokenizer(vocabulary([*pieces[::2], *(f"##{piece}" for piece in pieces[1::2])]))
    words = ["".join(draw.choices([*pieces, "d", ","], [4] * 60 + [1, 10], k=draw.randint(1, 8))) for _ in range(5000)]
    lines = [" ".join(words[i : i + 10]) for i in range(0, len(words), 10)]
    check(tokenizer.backend_tokenizer, lines)
    ids = [i for line in ours(TokenIds(tokenizer.backend_tokenizer), lines) for i in line]
    assert 0.01 < ids.count(tokenizer.unk_token_id) / len(ids) < 0.7


def wordpiece(pieces: list[str], **options) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, **options))
    tokenizer.normalizer = normalizers.BertNormalizer(clean_text=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


@pytest.mark.parametrize("prefix", ["##", "@", "x", ""])
@pytest.mark.parametrize("longest", [1, 3, 100])
def test_the_models_own_rules(prefix, longest):
    """Another mark of pieces that go on, other longest words, another name of the unknown; control characters kept."""
    pieces = ["<?>", "a", "ab", "abc", "x", "xa", "\x01", *(f"{prefix}{p}" for p in ("b", "bc", "ca", "x", "\x02"))]
    options = {"unk_token": "<?>", "max_input_chars_per_word": longest, "continuing_subword_prefix": prefix}
    draw = random.Random(0)
    lines = ["".join(draw.choices("abcx@# \x01\x02", k=draw.randint(0, 9))) for _ in range(500)]
    check(wordpiece(list(dict.fromkeys(pieces)), **options), lines)


@pytest.mark.parametrize("length", [99, 100, 101, 300])
@pytest.mark.parametrize("text", ["a{}b, a", "{} a", "é{}", "가{}", "\u200b{}", "中{}"])
def test_long_words(length, text):
    """Beyond 100 characters, counted after the normalizer, a word is unknown."""
    tokenizer = BertTokenizer(vocabulary(["a", "b", "##a", "##b", "e", "ᄀ", "##ᅡ", "中", ","]))
    check(tokenizer.backend_tokenizer, [text.format("a" * length), "a b", text.format("ab" * length)])


def test_a_vocabulary_of_words_only_and_one_without_any():
    check(BertTokenizer(vocabulary(["cat"])).backend_tokenizer, ["cat cats", "", "  ", "at, cat"])
    check(BertTokenizer(vocabulary([])).backend_tokenizer, ["cat [MASK]", "[", "[unk]"])


ADDED = [
    AddedToken("catmat", normalized=True),
    AddedToken("1,024", normalized=True),
    AddedToken("Élan", normalized=True),
    AddedToken("東京", normalized=True),
    AddedToken("aA", normalized=False),
    AddedToken("b", normalized=True, single_word=True),
    AddedToken("<x>", normalized=False, lstrip=True, rstrip=True),
    AddedToken("\u00ad", normalized=False),
    AddedToken("[NEW]", special=True),
]


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("many", [1, 2, len(ADDED)])
def test_added_tokens(lowercase, many, monkeypatch):
    """Each alone with its neighbours in the list, and all together; lines with and without them, cut anywhere."""
    monkeypatch.setattr(ids_module, "CHUNK", 16)
    draw = random.Random(0)
    parts = ["catmat", "cat", "mat", "CatMat", "1,024", "1", "élan", "Élan", "elan", "東京", "東", "aA", "aa", "b",
             "<x>", "[NEW]", "[MASK]", " ", " ", "\t", ",", "\u00ad"]  # fmt: skip
    lines = ["".join(draw.choices(parts, k=draw.randint(0, 8))) for _ in range(1000)]
    for first in range(0, len(ADDED), many):
        pieces = ["a", "cat", "##mat", "1", "##0", "elan", "##an", "東", "aa", "##b", "b", "<", "x", "[", "##k", "Él"]
        tokenizer = BertTokenizer(vocabulary(pieces), do_lower_case=lowercase)
        tokenizer.backend_tokenizer.add_tokens(ADDED[first : first + many])
        check(tokenizer.backend_tokenizer, lines)


def test_only_lines_with_added_tokens_are_left_to_the_library(monkeypatch):
    tokenizer = BertTokenizer(vocabulary(["cat", "##s", "mat"]))
    tokenizer.add_tokens(["catmat"])
    token_ids, left = TokenIds(tokenizer.backend_tokenizer), []
    encoded = token_ids._encoded
    monkeypatch.setattr(token_ids, "_encoded", lambda lines: left.extend(lines) or encoded(lines))
    lines = ["cats", "a catmat", "cat mat", "", "CATMAT catmat", "mat"]
    assert ours(token_ids, lines) == library(tokenizer.backend_tokenizer, lines)
    assert left == ["a catmat", "CATMAT catmat"]


def test_marks_that_change_places_are_left_to_the_library():
    """Javanese and musical marks: the order that NFD gives them is not the text's."""
    late, early = "\U0001d16d", "\U0001d165"
    tokenizer = BertTokenizer(vocabulary(["a", f"##{early}{late}", f"##{late}", f"##{early}", f"##{early}b"]))
    lines = [f"a{late}{early}", f"a{early}{late}", f"a{late}b", f"a{late} {early}", f"a{late}\u0301{early}b", "a"]
    check(tokenizer.backend_tokenizer, lines)
    assert ours(TokenIds(tokenizer.backend_tokenizer), lines[:2]) == [[5, 6], [5, 6]]


def test_a_tokenizer_of_another_kind_is_asked_itself():
    tokenizer = wordpiece(["[UNK]", "a", "##b", "b"], unk_token="[UNK]")
    tokenizer.normalizer = normalizers.Replace("c", "b")
    check(tokenizer, ["ac", "c a", "", "abc"])
    tokenizer = BertTokenizer(vocabulary(["cat", "sat"]))
    tokenizer.add_tokens(["cat sat"])
    check(tokenizer.backend_tokenizer, ["a cat sat", "cat", "cat  sat"])


def test_states_share_no_place():
    """Whatever the tree: many scattered branches too, for which a table must grow."""
    draw = random.Random(0)
    for branches in (1, 3, 300):
        nodes = [dict.fromkeys(draw.sample(range(1, 1000), draw.randint(0, branches)), 0) for _ in range(400)]
        numbers = ids_module._without_collision(nodes)
        places = [number + symbol for number, edges in zip(numbers, nodes, strict=True) for symbol in edges]
        assert len(places) == len(set(places))
        given = [number for number, edges in zip(numbers, nodes, strict=True) if edges]
        assert 0 not in given
        assert len(given) == len(set(given))
        assert all(number == 0 for number, edges in zip(numbers, nodes, strict=True) if not edges)


def test_chunks_end_behind_blanks(monkeypatch):
    monkeypatch.setattr(ids_module, "CHUNK", 4)
    assert list(ids_module._chunks("ab cdefghi jk\nl\nmnopqr\n\ns")) == [
        "ab ",
        "cdefghi jk\n",
        "l\n",
        "mnopqr\n",
        "\n",
        "s",
    ]
