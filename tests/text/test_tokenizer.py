"""The tokenizer: equal to transformers' on real and on nasty text, its files, its errors."""

from __future__ import annotations

import copy
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from minibert.text.tokenizer import BatchEncoding, BertTokenizer, BertTokenizerFast

SEED = json.loads((Path(__file__).parents[1] / "seed_cases.json").read_text(encoding="utf-8"))

NASTY = [
    "",
    " ",
    " \t\n\r\v\f ",
    "tabs\tand\nnew\r\nlines\rhere",
    "É coração naïve Ångström Straße İstanbul ﬁne Ⅷ ½",
    "e\u0301 a\u0308 o\u0302\u0323 combining",
    "\u0301\u0302 marks alone",
    "汉字 and ひらがな, カタカナ、 한국어 𠀀𪜶",
    "\u1100\u1161\u11a8 decomposed jamo",
    "😀 👍🏽 👩\u200d👩\u200d👧\u200d👦 🇫🇷 ❤\ufe0f",
    "zero\u200bwidth\u200cand\u200djoiner\ufeffand\u2060word joiner",
    "soft\u00adhyphen non\u00a0breaking\u202fspace\u3000ideographic\u2028line\u2029paragraph\x85next",
    "null\x00byte \x01\x02\x1b[0m control \x7f\x9f",
    "replacement \ufffd and private \ue000 and noncharacter \uffff \U0010ffff",
    "שלום עולם \u202eleft over\u202c مرحبا بالعالم",
    "हिन्दी ไทย ქართული \u13a0 \uab70 \u13f8",
    "a" * 99 + " " + "b" * 100 + " " + "c" * 101 + " " + "long" * 5000,
    "." * 700,
    "don't can't o'clock 'quoted' \u2018curly\u2019 -- dash—dash …",
    "$3.50 + 1,000.00 = x^2_i | a@b.c #tag <html> &amp; {json} \\n ~`",
    "The [MASK] is [MASK].",
    "[CLS] special [SEP] tokens [PAD] in [UNK] text [mask] [ MASK ] x[MASK]y",
    "##ing ##s [unused1] [unused99] #",
    "ALL CAPS MiXeD cAsE ǅ ΑΣ ς ŉ",
    "\U0001d573\U0001d58a\U0001d591\U0001d591\U0001d594 \uff26\uff55\uff4c\uff4c ①②③ ℃ ﷺ",
]


@pytest.fixture(scope="module", params=["uncased", "cased", "accents kept", "no chinese"])
def both(request, minilm_dir):
    """The same tokenizer of ours and of transformers'."""
    options = {
        "uncased": {},
        "cased": {"do_lower_case": False},
        "accents kept": {"strip_accents": False},
        "no chinese": {"tokenize_chinese_chars": False},
    }[request.param]
    kinds = BertTokenizer, transformers.BertTokenizer
    return tuple(kind.from_pretrained(minilm_dir, **options) for kind in kinds)


@pytest.fixture(scope="module")
def ours(minilm_dir) -> BertTokenizer:
    return BertTokenizer.from_pretrained(minilm_dir)


@pytest.fixture(scope="module")
def theirs(minilm_dir):
    return transformers.BertTokenizer.from_pretrained(minilm_dir)


def as_lists(batch) -> dict:
    return {key: value.tolist() if hasattr(value, "tolist") else value for key, value in batch.items()}


def assert_same(ours, theirs) -> None:
    assert as_lists(ours) == as_lists(theirs)
    assert list(ours) == list(theirs)
    for i in range(len(theirs.encodings)):
        for view in ("tokens", "word_ids", "sequence_ids"):
            assert getattr(ours, view)(i) == getattr(theirs, view)(i)
        assert ours[i].offsets == theirs[i].offsets


# Parity on text


def test_real_text_is_tokenized_as_by_transformers(both, english):
    assert len(english) >= 2000
    for options in ({}, {"return_offsets_mapping": True}):
        assert_same(*(t(english, return_special_tokens_mask=True, **options) for t in both))
    pairs = english[:-1:2], english[1::2]
    options = {"padding": True, "truncation": True, "max_length": 40, "return_special_tokens_mask": True}
    assert_same(*(t(*pairs, return_tensors="pt", **options) for t in both))


@pytest.mark.parametrize("text", NASTY, ids=ascii)
def test_nasty_text_is_tokenized_as_by_transformers(both, text):
    ours, theirs = both
    assert_same(ours(text, return_offsets_mapping=True), theirs(text, return_offsets_mapping=True))
    assert_same(ours(text, "second " + text), theirs(text, "second " + text))
    assert_same(ours([text], [""]), theirs([text], [""]))
    assert ours.tokenize(text) == theirs.tokenize(text)
    ids = theirs(text)["input_ids"]
    assert ours.encode(text) == ids
    for skip, clean in product([False, True], [None, False, True]):
        options = {"skip_special_tokens": skip, "clean_up_tokenization_spaces": clean}
        assert ours.decode(ids, **options) == theirs.decode(ids, **options)


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_unicode_text_is_tokenized_as_by_transformers(ours, theirs, text):
    assert_same(ours(text, return_offsets_mapping=True), theirs(text, return_offsets_mapping=True))


def test_seed_flows_have_their_ids(ours):
    case = SEED["next_sentence"]
    batch = ours(case["text"], case["text_pair"], return_tensors="pt")
    assert batch["input_ids"].tolist() == [case["input_ids"]]
    assert batch["token_type_ids"].tolist()[0].index(1) == case["first_segment_length"]
    assert list(batch) == ["input_ids", "token_type_ids", "attention_mask"]
    assert len(ours) == case["vocab_size"]

    case = SEED["pretraining_masked_input"]
    batch = ours(case["text"], case["text_pair"])
    assert batch.input_ids == case["input_ids"]
    assert batch.token_type_ids == [0] * case["first_segment_length"] + [1] * (
        len(case["input_ids"]) - case["first_segment_length"]
    )
    unmasked = [case[key].replace("[MASK]", word) for key, word in [("text", "election"), ("text_pair", "attacked")]]
    ids = ours(*unmasked).input_ids
    assert [ids[9], ids[44]] == SEED["pretraining_loss"]["unmasked_ids_at_9_and_44"]
    assert [ours.convert_tokens_to_ids(token) for token in SEED["fill_mask"]["special_tokens"]] == [
        0,
        100,
        101,
        102,
        103,
    ]


# Parity of the options

LONG, SHORT = "one two three four five six seven eight nine ten", "un deux trois"
TEXTS = [LONG, SHORT, "", "unbelievably [MASK] tokenizers"]
PAIRS = [SHORT, LONG, LONG, "x"]


ONE, PAIR = ("one", "texts", "words"), ("one pair", "pairs")  # forms of input
FORMS = {
    "one": (LONG,),
    "texts": (TEXTS,),
    "words": ([text.split(" ") for text in TEXTS],),
    "one pair": (LONG, SHORT),
    "pairs": (TEXTS, PAIRS),
}
OPTIONS = [
    (ONE + PAIR, {"padding": True}),
    (ONE + PAIR, {"padding": "longest", "padding_side": "left", "pad_to_multiple_of": 8}),
    (ONE + PAIR, {"padding": "max_length", "max_length": 30}),
    (ONE + PAIR, {"padding": "max_length", "max_length": 12, "truncation": True, "padding_side": "left"}),
    (ONE + PAIR, {"padding": "max_length"}),
    (ONE + PAIR, {"padding": True, "pad_to_multiple_of": 5, "truncation": True, "max_length": 10}),
    (ONE + PAIR, {"max_length": 7}),
    (ONE + PAIR, {"max_length": 9, "truncation": "longest_first", "padding": True}),
    (("one", "one pair"), {"max_length": 15, "truncation": "only_first", "padding": "do_not_pad"}),
    (PAIR, {"max_length": 15, "truncation": "only_second"}),
    (ONE + PAIR, {"max_length": 9, "truncation": "do_not_truncate"}),
    (ONE + PAIR, {"truncation": True}),
    (ONE + PAIR, {"truncation": False, "padding": False}),
    (ONE, {"add_special_tokens": False, "max_length": 4, "truncation": True}),
    (ONE, {"return_token_type_ids": False, "return_attention_mask": False, "return_length": True, "padding": True}),
    (PAIR, {"return_special_tokens_mask": True, "return_offsets_mapping": True, "padding": True}),
    (PAIR, {"return_special_tokens_mask": True, "return_offsets_mapping": True, "padding_side": "left"}),
    (
        ONE + PAIR,
        {"max_length": 8, "truncation": True, "return_overflowing_tokens": True, "stride": 1, "padding": True},
    ),
    (PAIR, {"max_length": 15, "truncation": "only_second", "return_overflowing_tokens": True, "padding": True}),
]
CASES = [(form, tensors, options) for forms, options in OPTIONS for form in forms for tensors in (None, "np", "pt")
         if tensors is None or options.get("padding") or form.startswith("one")]  # fmt: skip


@pytest.mark.parametrize(("form", "tensors", "options"), CASES, ids=str)
def test_options(ours, theirs, form, tensors, options):
    options = options | {"return_tensors": tensors, "is_split_into_words": form == "words"}
    expected, result = theirs(*FORMS[form], **options), ours(*FORMS[form], **options)
    assert_same(result, expected)
    for key, value in expected.items():
        assert type(result[key]) is type(value)
        assert getattr(result[key], "dtype", None) == getattr(value, "dtype", None)


@pytest.mark.parametrize("side", ["left", "right"])
def test_sides_of_the_tokenizer(minilm_dir, side):
    kinds = BertTokenizer, transformers.BertTokenizer
    ours, theirs = (kind.from_pretrained(minilm_dir, padding_side=side, truncation_side=side) for kind in kinds)
    options = {"padding": True, "truncation": True, "max_length": 8, "return_overflowing_tokens": True, "stride": 1}
    assert_same(ours(TEXTS, **options), theirs(TEXTS, **options))


@settings(max_examples=200, deadline=None)
@given(
    texts=st.lists(st.text("ab [MASK].", max_size=30), min_size=1, max_size=4),
    paired=st.booleans(),
    options=st.fixed_dictionaries(
        {
            "truncation": st.sampled_from([True, "only_first", "only_second", False]),
            "padding": st.sampled_from([True, False]),
            "max_length": st.integers(3, 12),
            "padding_side": st.sampled_from(["left", "right"]),
        }
    ),
)
@pytest.mark.filterwarnings("ignore:.*max_length.*")
def test_any_cut_is_that_of_transformers(ours, theirs, texts, paired, options):
    arguments = (texts, texts[::-1]) if paired else (texts,)
    try:
        expected = theirs(*arguments, **options)
    except Exception:  # a bare one, of the backend
        with pytest.raises(ValueError, match=r"cannot be encoded.*max_length"):
            ours(*arguments, **options)
        return
    assert_same(ours(*arguments, **options), expected)


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        (["Hello", "wor ld", "", "x"], None),
        ([["a b", "c"], ["d"]], None),
        ([["a b", "c"]], [["d", "unbelievably"]]),
        ([(["a b"], ["c", "d"])], None),
        ([], None),
    ],
)
def test_words(ours, theirs, text, pair):
    assert_same(ours(text, pair, is_split_into_words=True), theirs(text, pair, is_split_into_words=True))


def test_pairs_in_one_list(ours, theirs):
    for batch in ([("a", "b c"), ("d", "e")], [["a", "b c"]]):
        assert_same(ours(batch, padding=True), theirs(batch, padding=True))


def test_an_empty_second_text_counts_as_none_for_one_text_only(ours, theirs):
    assert ours("a", "").input_ids == theirs("a", "").input_ids == [101, 1037, 102]
    assert ours(["a"], [""]).input_ids == theirs(["a"], [""]).input_ids == [[101, 1037, 102, 102]]


@pytest.mark.parametrize("text", ["Unbelievable naïve café", "a\u0301 b 😀 汉字"])
def test_alignment(ours, theirs, text):
    mine, reference = (
        ours([text, "other"], ["second " + text, "one"]),
        theirs([text, "other"], ["second " + text, "one"]),
    )
    assert mine.n_sequences == reference.n_sequences == 2
    for i, sequence in product(range(len(text)), range(2)):
        for name in ("char_to_token", "char_to_word"):
            assert getattr(mine, name)(0, i, sequence) == getattr(reference, name)(0, i, sequence)
            assert getattr(mine, name)(i) == getattr(reference, name)(i)
    for i in range(len(reference.tokens(0))):
        assert mine.token_to_word(0, i) == reference.token_to_word(0, i)
        assert mine.token_to_sequence(i) == reference.token_to_sequence(i)
        assert mine.token_to_chars(0, i) == reference.token_to_chars(0, i)
    for word in range(2):
        assert mine.word_to_tokens(0, word, 1) == reference.word_to_tokens(0, word, 1)
        assert mine.word_to_tokens(word).start == reference.word_to_tokens(word).start
        assert mine.word_to_chars(0, word, 1) == reference.word_to_chars(0, word, 1)
    with pytest.raises(ValueError, match="counted from 0, got -1"):
        mine.token_to_word(0, -1)


@pytest.mark.parametrize(
    "rows",
    [
        [{"input_ids": [1, 2, 3], "token_type_ids": [0, 0, 1]}, {"input_ids": [4], "token_type_ids": [1]}],
        {"input_ids": [[1, 2, 3], [4]], "attention_mask": [[1, 1, 0], [1]], "special_tokens_mask": [[1, 0, 1], [1]]},
        {"input_ids": [5, 6]},
        [{"input_ids": torch.tensor([1, 2])}, {"input_ids": torch.tensor([3])}],
        [{"input_ids": [1, 2], "labels": 1}, {"input_ids": [1], "labels": 0}],
    ],
)
@pytest.mark.parametrize("options", [{}, {"padding": "max_length", "max_length": 6, "padding_side": "left"}], ids=str)
def test_pad(ours, theirs, rows, options):
    for tensors in ("pt", "np"):
        mine = ours.pad(copy.deepcopy(rows), return_tensors=tensors, **options)
        reference = theirs.pad(copy.deepcopy(rows), return_tensors=tensors, **options)
        assert as_lists(mine) == as_lists(reference)
        assert {key: value.dtype for key, value in mine.items()} == {key: v.dtype for key, v in reference.items()}
    assert as_lists(ours.pad(copy.deepcopy(rows), **options)) == as_lists(theirs.pad(copy.deepcopy(rows), **options))


def test_decode_takes_ids_in_every_form(ours, theirs):
    ids = theirs("If you don't [MASK] at the sign, it's \"bad\"!")["input_ids"]
    for form in (ids, tuple(ids), np.array(ids), torch.tensor(ids), [torch.tensor(i) for i in ids]):
        assert ours.decode(form) == theirs.decode(ids)
    for form in ([ids, ids[:4]], torch.tensor([ids, ids]), [np.array(ids)], [[]]):
        assert ours.decode(form) == theirs.decode(form)
        assert ours.batch_decode(form, skip_special_tokens=True) == theirs.batch_decode(form, skip_special_tokens=True)
    assert ours.batch_decode(ids) == theirs.batch_decode(ids) == [ours.decode(ids)]
    for form in (2003, [], [99999], 99999):
        assert ours.decode(form) == theirs.decode(form)
    assert ours.convert_ids_to_tokens([101, 99999]) == ["[CLS]", None]
    assert ours.convert_ids_to_tokens(ids, skip_special_tokens=True) == theirs.convert_ids_to_tokens(ids, True)
    tokens = ours.convert_ids_to_tokens(torch.tensor(ids))
    assert ours.convert_tokens_to_string(tokens) == theirs.convert_tokens_to_string(tokens)


def test_attributes(ours, theirs):
    for name in ("unk", "sep", "pad", "cls", "mask"):
        assert getattr(ours, f"{name}_token") == getattr(theirs, f"{name}_token")
        assert getattr(ours, f"{name}_token_id") == getattr(theirs, f"{name}_token_id")
    for name in ("vocab_size", "all_special_tokens", "all_special_ids", "special_tokens_map", "model_max_length",
                 "padding_side", "truncation_side", "model_input_names", "is_fast", "vocab"):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.num_special_tokens_to_add(pair=True) == 3
    assert ours.get_special_tokens_mask([101, 5, 0]) == [1, 0, 1]
    assert BertTokenizerFast is BertTokenizer
    assert "do_lower_case=True" in repr(ours)


# The batch


def test_batch_is_a_dict_with_attributes(ours):
    batch = ours(["a", "b c"], padding=True, return_tensors="pt")
    assert isinstance(batch, dict)
    assert batch.input_ids is batch["input_ids"]
    assert batch[0].ids == batch.input_ids[0].tolist()
    assert batch.to("meta") is batch
    assert batch.attention_mask.device.type == "meta"
    assert dict(**batch).keys() == {"input_ids", "token_type_ids", "attention_mask"}
    with pytest.raises(AttributeError, match=r"input_ids.*no logits"):
        _ = batch.logits
    with pytest.raises(TypeError, match="device must be a torch.device, its name or its number; got torch.float16"):
        batch.to(torch.float16)


def test_batch_pickles_with_what_is_known(ours):
    batch = ours("unbelievably so")
    lost = pickle.loads(pickle.dumps(batch))
    assert lost == batch
    with pytest.raises(ValueError, match="no alignment with a text"):
        lost.word_ids()
    words = batch.word_ids()
    assert pickle.loads(pickle.dumps(batch)).word_ids() == words
    with pytest.raises(ValueError, match="pad\\(\\)"):
        ours.pad([batch]).tokens()
    assert BatchEncoding({"input_ids": [1]}).encodings is None


def test_alignment_is_of_the_tokens_at_the_time_of_the_call(minilm_dir):
    tokenizer = BertTokenizer.from_pretrained(minilm_dir)
    batch = tokenizer("a newword")
    assert tokenizer.add_tokens("newword") == 1
    assert batch.tokens() == ["[CLS]", "a", "new", "##word", "[SEP]"]
    assert tokenizer("a newword").tokens() == ["[CLS]", "a", "newword", "[SEP]"]


def test_tokenizer_pickles(ours):
    for again in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert_same(again(TEXTS, PAIRS, padding=True), ours(TEXTS, PAIRS, padding=True))
        assert repr(again) == repr(ours)


def test_threads_do_not_disturb_each_other(ours):
    texts = [LONG * k for k in range(1, 40)]
    expected = [ours(text, truncation=True, max_length=3 + k)["input_ids"] for k, text in enumerate(texts)]

    def job(k):
        return ours(texts[k], truncation=True, max_length=3 + k)["input_ids"]

    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            assert list(pool.map(job, range(len(texts)))) == expected


# Errors: the argument, what came, what is allowed


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((None,), {}, TypeError, "text must be a str.*got None"),
        ((5,), {}, TypeError, "text must be a str.*got int 5"),
        ((b"abc",), {}, TypeError, "text must be a str.*got bytes"),
        ((["a", None],), {}, TypeError, r"text\[1\] must be a str or a pair.*got None"),
        ((["a", 3.5, "b"],), {}, TypeError, r"text\[1\] must be.*got float 3.5"),
        (([["a", "b", "c"]],), {}, TypeError, r"text\[0\] must be"),
        ((["a", "b"], ["c", b"d"]), {}, TypeError, r"text_pair\[1\] must be a str, got bytes"),
        (([],), {}, ValueError, "text is an empty list"),
        ((["a"], ["b", "c"]), {}, ValueError, "text has 1 items and text_pair 2"),
        ((["a"], "b"), {}, TypeError, "text_pair must be a list.*got str 'b'"),
        (("a", ["b"]), {}, TypeError, "text_pair must be a str.*got list"),
        (("a b",), {"is_split_into_words": True}, TypeError, "text must be a list of words.*got str"),
        (([["a"], ["b", 1]],), {"is_split_into_words": True}, TypeError, r"text\[1\] must be a list of words"),
        (("a\ud800b",), {}, ValueError, r"text is not Unicode text: lone surrogate '\\ud800' at character 1"),
        ((["a"] * 9 + ["\udfff"],), {}, ValueError, r"text\[9\] is not Unicode"),
        ((["a", "b"], ["c", "\udfff"]), {}, ValueError, r"text_pair\[1\] is not Unicode"),
        (("a",), {"padding": "longst"}, ValueError, "padding must be one of False, True, 'longest'.*got 'longst'"),
        (("a",), {"padding": 1}, ValueError, "padding must be one of.*got 1"),
        (("a",), {"truncation": "first"}, ValueError, "truncation must be one of.*'only_second'; got 'first'"),
        (("a",), {"return_tensors": "tf"}, ValueError, "return_tensors must be one of None, 'pt', 'np'; got 'tf'"),
        (("a",), {"padding_side": "top"}, ValueError, "padding_side must be one of 'right', 'left'; got 'top'"),
        (("a",), {"max_length": 0}, ValueError, "max_length must be a whole number from 1 up, got 0"),
        (("a",), {"max_length": 1}, ValueError, "max_length=1 leaves no room: 2 special tokens"),
        (("a", "b"), {"max_length": 2}, ValueError, "max_length=2 leaves no room: 3 special tokens"),
        (([("a", "b")],), {"max_length": 2, "truncation": True}, ValueError, "3 special tokens"),
        (("a",), {"max_length": 2.5}, ValueError, "max_length must be a whole number.*got 2.5"),
        (
            ("a",),
            {"max_length": 9, "pad_to_multiple_of": 4, "padding": True, "truncation": True},
            ValueError,
            "multiple",
        ),
        (
            ("a b c d",),
            {"max_length": 4, "truncation": True, "stride": 2, "return_overflowing_tokens": True},
            ValueError,
            "stride=2 must be below 2",
        ),
        (("a b", "c d e f"), {"max_length": 5, "truncation": "only_first"}, ValueError, "text cannot be.*max_length=5"),
        (("a b c d",), {"max_length": 4, "truncation": "only_second"}, ValueError, "Second sequence not provided"),
        ((["a", "b c"],), {"return_tensors": "pt"}, ValueError, "input_ids has 3 to 4 values a row: pass padding=True"),
        (
            (["a", "b c d e f"],),
            {"return_tensors": "pt", "padding": "max_length", "max_length": 5},
            ValueError,
            "padding ends at 5.*truncation=True",
        ),
        (("a",), {"foo": 1}, TypeError, "foo"),
    ],
    ids=lambda value: ascii(value)[:60],
)
def test_errors_of_a_call(ours, arguments, options, error, message):
    with pytest.raises(error, match=message):
        ours(*arguments, **options)
    assert ours("still works")["input_ids"] == [101, 2145, 2573, 102]


def test_a_stride_beyond_a_short_cut_is_an_error_not_a_crash(ours):
    options = {"max_length": 10, "truncation": "only_second", "stride": 5, "return_overflowing_tokens": True}
    with pytest.raises(ValueError, match=r"text cannot be encoded with max_length=10.*stride"):
        ours("a b c d e", LONG, **options)


@pytest.mark.parametrize("ids", [-100, [5, -100], [[1], [-1]], "abc", [1.5], None], ids=str)
def test_errors_of_decode(ours, ids):
    with pytest.raises(ValueError, match="token_ids must be whole numbers from 0 up, got"):
        ours.decode(ids)


def test_errors_of_pad(ours):
    with pytest.raises(ValueError, match="must have input_ids, got attention_mask"):
        ours.pad({"attention_mask": [1]})
    with pytest.raises(ValueError, match="labels cannot become a tensor"):
        ours.pad([{"input_ids": [1], "labels": [1]}, {"input_ids": [1, 2], "labels": [1, 2]}], return_tensors="pt")
    with pytest.raises(ValueError, match="needs max_length: this tokenizer has no model_max_length"):
        BertTokenizer(ours.vocab).pad({"input_ids": [1]}, padding="max_length")
