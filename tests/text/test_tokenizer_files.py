"""The tokenizer's files: what decides its settings, and that transformers opens what we save and the reverse."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transformers
from test_tokenizer import NASTY, TEXTS, as_lists, assert_same
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import BPE

from minibert.text.tokenizer import BertTokenizer


def write(directory: Path, **files) -> Path:
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        text = content if isinstance(content, str) else json.dumps(content)
        (directory / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return directory


LOWER = "[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\nhello\nworld\n##s\ncafe\ncafé\n.\n"
CASED = LOWER + "Hello\nWorld\nParis\nParis\n"


@pytest.mark.parametrize(
    ("files", "settings", "lowercases"),
    [
        ({"vocab__txt": LOWER}, {}, True),
        ({"vocab__txt": CASED}, {}, False),
        ({"vocab__txt": CASED}, {"do_lower_case": True}, True),
        ({"vocab__txt": CASED, "tokenizer_config__json": {"do_lower_case": True}}, {}, True),
        ({"vocab__txt": LOWER, "tokenizer_config__json": {"do_lower_case": False}}, {}, False),
        ({"vocab__txt": LOWER, "tokenizer_config__json": {"do_lower_case": False}}, {"do_lower_case": True}, True),
        ({"vocab__txt": LOWER, "tokenizer_config__json": {"do_lower_case": None}}, {}, True),
    ],
    ids=str,
)
def test_casing_is_decided_by_the_first_that_speaks(tmp_path, files, settings, lowercases):
    tokenizer = BertTokenizer.from_pretrained(write(tmp_path, **files), **settings)
    assert tokenizer.do_lower_case is lowercases
    assert tokenizer.tokenize("HELLO") == (["hello"] if lowercases else ["[UNK]"])
    tokenizer.save_pretrained(tmp_path / "saved")
    (tmp_path / "saved" / "tokenizer_config.json").unlink()  # then tokenizer.json says it
    assert BertTokenizer.from_pretrained(tmp_path / "saved").do_lower_case is lowercases
    again = BertTokenizer.from_pretrained(tmp_path / "saved", do_lower_case=not lowercases)
    assert again.tokenize("HELLO") == (["[UNK]"] if lowercases else ["hello"])


def test_real_checkpoints_without_a_config(rxnfp_dir):
    tokenizer = BertTokenizer.from_pretrained(rxnfp_dir / "bert_pretrained")
    assert not tokenizer.do_lower_case  # its vocabulary is of chemical symbols: C is carbon, c aromatic carbon
    assert tokenizer.tokenize("C c Cl") == ["C", "c", "Cl"]
    assert tokenizer.model_max_length == 512  # of config.json
    assert len(tokenizer) == 591


@pytest.fixture(scope="module")
def ours(minilm_dir) -> BertTokenizer:
    return BertTokenizer.from_pretrained(minilm_dir)


def test_vocab_as_path_dict_and_old_name(minilm_dir, ours):
    path = minilm_dir / "vocab.txt"
    made = [BertTokenizer(path), BertTokenizer(str(path)), BertTokenizer(vocab_file=path), BertTokenizer(ours.vocab)]
    reference = transformers.BertTokenizer(str(path))
    for tokenizer in made:
        assert tokenizer(TEXTS)["input_ids"] == reference(TEXTS)["input_ids"]
        assert tokenizer.model_max_length == reference.model_max_length


def test_odd_vocabulary_lines_are_read_as_by_transformers(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_bytes("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\na \nb\r\n\nc\u2028\nb\n\u3000d\nlast".encode())
    assert BertTokenizer(path).get_vocab() == transformers.BertTokenizer(str(path)).get_vocab()


def test_settings_of_the_files(tmp_path):
    files = {
        "vocab__txt": LOWER.replace("[PAD]", "<pad>"),
        "tokenizer_config__json": {
            "do_lower_case": False,
            "strip_accents": True,
            "max_len": 77,
            "padding_side": "left",
            "model_input_names": ["input_ids", "attention_mask"],
            "clean_up_tokenization_spaces": True,
            "some_unknown_key": 1,
        },
        "special_tokens_map__json": {
            "pad_token": "<pad>",
            "mask_token": {"content": "[MASK]", "lstrip": True, "normalized": False},
            "additional_special_tokens": ["[E1]"],
        },
        "added_tokens__json": {"[E1]": 11, "newword": 12},
    }
    directory = write(tmp_path, **files)
    ours, theirs = BertTokenizer.from_pretrained(directory), transformers.BertTokenizer.from_pretrained(directory)
    texts = ["hello [E1] café  [MASK] newword.", "worlds"]
    assert_same(ours(texts, padding=True), theirs(texts, padding=True))
    assert "token_type_ids" not in ours(texts)
    assert ours.model_max_length == 77
    assert ours.pad_token == "<pad>"
    assert ours.get_vocab() == theirs.get_vocab()
    assert ours.all_special_tokens == theirs.all_special_tokens
    assert ours.decode(ours(texts[0])["input_ids"], skip_special_tokens=True) == "hello cafe newword."


@pytest.mark.parametrize("options", [{}, {"do_lower_case": False, "model_max_length": 64, "padding_side": "left"}])
def test_save_and_load_again(minilm_dir, tmp_path, options):
    ours = BertTokenizer.from_pretrained(minilm_dir, **options)
    ours.add_special_tokens({"extra_special_tokens": ["[E1]", "[E2]"]})
    ours.add_tokens(["Quux", AddedToken("solo", single_word=True)])
    paths = ours.save_pretrained(tmp_path / "new" / "deep")
    names = ["vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
    assert [Path(path).name for path in paths] == names
    assert sorted(path.name for path in (tmp_path / "new" / "deep").iterdir()) == sorted(names)
    texts = [*TEXTS, *NASTY, "[E1] Quux quux [E2] solo soloist"]
    expected = ours(texts, padding=True)
    for kind in (BertTokenizer, transformers.BertTokenizer, transformers.AutoTokenizer):
        again = kind.from_pretrained(tmp_path / "new" / "deep")
        assert as_lists(again(texts, padding=True)) == as_lists(expected)
        assert again.model_max_length == ours.model_max_length
        assert again.all_special_tokens == ours.all_special_tokens
        assert again.get_vocab() == ours.get_vocab()


def test_what_transformers_saved(minilm_dir, tmp_path):
    theirs = transformers.BertTokenizer.from_pretrained(minilm_dir)
    theirs.add_special_tokens({"extra_special_tokens": ["[E1]"]})
    theirs.add_tokens(["Quux"])
    theirs.save_pretrained(tmp_path)
    ours = BertTokenizer.from_pretrained(tmp_path)
    texts = [*NASTY, "[E1] Quux quux"]
    assert_same(ours(texts), theirs(texts))
    assert ours.all_special_tokens == theirs.all_special_tokens


def test_add_tokens(minilm_dir):
    kinds = BertTokenizer, transformers.BertTokenizer
    ours, theirs = (kind.from_pretrained(minilm_dir) for kind in kinds)
    for tokenizer in (ours, theirs):
        assert tokenizer.add_tokens(["Quux", "hello"]) == 2
        assert tokenizer.add_special_tokens({"mask_token": "<m>", "extra_special_tokens": ["[E1]"]}) == 2
    text = "a <m> Quux quux [E1] [MASK]"
    assert_same(ours(text), theirs(text))
    assert (len(ours), ours.vocab_size, ours.mask_token_id) == (len(theirs), theirs.vocab_size, theirs.mask_token_id)
    with pytest.raises(ValueError, match=r"special_tokens_dict must be one of 'bos_token'.*got 'end_token'"):
        ours.add_special_tokens({"end_token": "</s>"})


@pytest.mark.parametrize(
    ("files", "settings", "error", "message"),
    [
        ({}, {}, FileNotFoundError, "neither tokenizer.json nor vocab.txt"),
        ({"vocab__txt": ""}, {}, ValueError, "vocab.txt' is empty"),
        ({"vocab__txt": "a\nb\n"}, {}, ValueError, "2 tokens lacks unk_token='\\[UNK\\]'"),
        ({"vocab__txt": LOWER, "tokenizer_config__json": "{"}, {}, ValueError, "tokenizer_config.json is not JSON"),
        ({"vocab__txt": LOWER, "tokenizer_config__json": []}, {}, ValueError, "must hold a JSON object, got list"),
        ({"vocab__txt": LOWER, "added_tokens__json": {"x": 99}}, {}, ValueError, "'x' must have id 99.*give it 11"),
        (
            {"vocab__txt": LOWER, "tokenizer_config__json": {"tokenizer_class": "BertJapaneseTokenizer"}},
            {},
            ValueError,
            "tokenizer_class=BertJapaneseTokenizer",
        ),
        ({"tokenizer__json": "{}"}, {}, ValueError, "tokenizer.json cannot be read"),
        ({"tokenizer__json": Tokenizer(BPE()).to_str()}, {}, ValueError, "holds a BPE model"),
        ({"vocab__txt": LOWER}, {"lower": True}, TypeError, "lower"),
        ({"vocab__txt": LOWER}, {"vocab_file": "other.txt"}, ValueError, "give one of vocab, vocab_file"),
        ({"vocab__txt": LOWER}, {"padding_side": "up"}, ValueError, "padding_side must be one of"),
    ],
    ids=lambda value: ascii(value)[:50],
)
def test_errors_of_files(tmp_path, files, settings, error, message):
    with pytest.raises(error, match=message):
        BertTokenizer.from_pretrained(write(tmp_path, **files), **settings)


@pytest.mark.parametrize(
    ("vocab", "error"), [(None, TypeError), (5, TypeError), ({"a": "b"}, TypeError), ("/no/file", FileNotFoundError)]
)
def test_errors_of_the_vocabulary(vocab, error):
    with pytest.raises(error, match="vocab"):
        BertTokenizer(vocab)


def test_a_vocabulary_in_another_encoding_is_named(tmp_path):
    (tmp_path / "vocab.txt").write_bytes("[UNK]\ncafé\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"vocab.txt' cannot be read: .*UTF-8"):
        BertTokenizer.from_pretrained(tmp_path)


def test_save_refuses_a_file(ours, tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="must be a directory"):
        ours.save_pretrained(tmp_path / "file")


def test_a_folder_inside(minilm_dir, tmp_path):
    ours = BertTokenizer.from_pretrained(minilm_dir)
    ours.save_pretrained(tmp_path / "inner")
    assert BertTokenizer.from_pretrained(tmp_path, subfolder="inner").get_vocab() == ours.get_vocab()
