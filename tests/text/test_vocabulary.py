"""Tokens and ids: vocabularies with gaps, added tokens, special tokens by name, a vocabulary learnt anew."""

from __future__ import annotations

import copy
import pickle

import pytest
import transformers
from tokenizers import AddedToken, Tokenizer

from minibert import BatchEncoding, BertTokenizer

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "dog", "the", "##s"]
NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


def made(tokens=WORDS) -> BertTokenizer:
    return BertTokenizer({token: index for index, token in enumerate(tokens)})


@pytest.fixture
def vocab_file(tmp_path):
    """A line twice: id 5 is of no token."""
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join([*WORDS[:5], "cat", "dog", "cat", "the"]) + "\n")
    return path


def reload_as_vocab(tokenizer, directory):
    tokenizer.save_pretrained(directory)
    (directory / "tokenizer.json").unlink()
    return BertTokenizer.from_pretrained(directory)


# Ids are never shared


def test_added_tokens_take_the_next_free_id_where_the_vocabulary_has_gaps(vocab_file, tmp_path):
    ours, theirs = BertTokenizer(vocab_file), transformers.BertTokenizer(str(vocab_file))
    assert ours.get_vocab() == theirs.get_vocab()
    text = "the cat dog"
    assert ours(text)["input_ids"] == theirs(text)["input_ids"]
    assert len(ours) == 9  # one row for each id
    assert ours.add_tokens(["newtok", "other"]) == 2
    assert ours.convert_tokens_to_ids(["newtok", "other", "the"]) == [9, 10, 8]
    assert ours("the newtok other")["input_ids"] == [2, 8, 9, 10, 3]
    assert len(set(ours.get_vocab().values())) == len(ours.get_vocab())
    assert len(ours) == 11
    ours.save_pretrained(tmp_path / "saved")
    again = BertTokenizer.from_pretrained(tmp_path / "saved")
    assert again.get_vocab() == ours.get_vocab()
    assert again("the newtok other")["input_ids"] == [2, 8, 9, 10, 3]


def test_an_id_without_a_token_stands_for_nothing(vocab_file):
    tokenizer = BertTokenizer(vocab_file)
    assert tokenizer.convert_ids_to_tokens([4, 5, 6]) == ["[MASK]", None, "dog"]
    assert tokenizer.decode([6, 5, 8]) == "dog the"
    assert tokenizer.decode([5]) == ""
    with pytest.raises(ValueError, match="mask_token_id=5: the vocabulary has no token of this id"):
        tokenizer.mask_token_id = 5


@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4, 9], [0, 1, 2, 3, 4, 700]])
def test_gaps_in_a_dict(ids):
    tokenizer = BertTokenizer(dict(zip([*WORDS[:5], "cat"], ids, strict=True)))
    assert tokenizer("cat")["input_ids"] == [2, ids[-1], 3]
    tokenizer.add_tokens("newtok")
    assert tokenizer.convert_tokens_to_ids("newtok") == ids[-1] + 1 == len(tokenizer) - 1


def test_gaps_in_a_tokenizer_json(vocab_file, tmp_path):
    transformers.BertTokenizer(str(vocab_file)).save_pretrained(tmp_path)
    vocab_file.unlink()
    tokenizer = BertTokenizer.from_pretrained(tmp_path)
    tokenizer.add_tokens("newtok")
    assert tokenizer("the newtok")["input_ids"] == [2, 8, 9, 3]
    with_shared = transformers.BertTokenizer.from_pretrained(tmp_path)
    with_shared.add_tokens("newtok")  # gets the id of "the"
    backend = Tokenizer.from_str(with_shared.backend_tokenizer.to_str())
    with pytest.raises(ValueError, match="added token 'newtok' has id 8, which is that of 'the'"):
        BertTokenizer(tokenizer_object=backend)


def test_tokens_of_one_id_are_refused():
    vocab = {token: index for index, token in enumerate(WORDS)}
    with pytest.raises(ValueError, match="vocab: 'cat' and 'kitten' have the same id 5"):
        BertTokenizer(vocab | {"kitten": 5})
    with pytest.raises(ValueError, match="ids must be numbered from 0 on"):
        BertTokenizer(vocab | {"far": 1 << 40})


# Added tokens


def test_tokens_added_one_at_a_time_and_together():
    one, together = made(), made()
    names = [f"tok{i}" for i in range(50)]
    assert sum(one.add_tokens(name) for name in names) == together.add_tokens(names) == 50
    assert one.get_vocab() == together.get_vocab()
    text = "the tok7 cats tok49"
    assert one(text)["input_ids"] == together(text)["input_ids"]


def test_adding_copies_no_vocabulary(monkeypatch):
    tokenizer = made()
    monkeypatch.setattr(Tokenizer, "__getstate__", None)  # what a copy would need
    monkeypatch.setattr(Tokenizer, "to_str", None)
    assert tokenizer.add_tokens("tok") == 1
    assert tokenizer("tok", truncation=True, max_length=4)["input_ids"] == [2, 9, 3]


def test_what_is_known_of_added_tokens(minilm_dir):
    ours, theirs = (kind.from_pretrained(minilm_dir) for kind in (BertTokenizer, transformers.BertTokenizer))
    for tokenizer in (ours, theirs):
        tokenizer.add_tokens(["Quux", AddedToken("solo", single_word=True)])
        tokenizer.add_special_tokens({"extra_special_tokens": ["[E1]"]})
        tokenizer.add_special_tokens({"extra_special_tokens": ["[E2]"]}, replace_extra_special_tokens=False)
        tokenizer.add_special_tokens({"eos_token": "</s>"})
    for name in ("added_tokens_encoder", "extra_special_tokens", "extra_special_tokens_ids", "eos_token_id",
                 "all_special_tokens", "all_special_ids", "special_tokens_map"):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.get_added_vocab() == theirs.get_added_vocab()
    assert {i: str(t) for i, t in ours.added_tokens_decoder.items()} == {
        i: str(t) for i, t in theirs.added_tokens_decoder.items()
    }
    with pytest.raises(ValueError, match="extra_special_tokens must be a list of tokens, got str 'x'"):
        ours.add_special_tokens({"extra_special_tokens": "x"})
    with pytest.raises(ValueError, match="new_tokens must be a str or an AddedToken, got int 5"):
        ours.add_tokens([5])


# Special tokens


@pytest.mark.parametrize("name", NAMES)
def test_special_tokens_can_be_set_by_token_and_by_id(name):
    tokenizer = made()
    setattr(tokenizer, f"{name}_token_id", 6)
    assert getattr(tokenizer, f"{name}_token") == "dog"
    assert getattr(tokenizer, f"{name}_token_id") == 6
    setattr(tokenizer, f"{name}_token", "cat")
    assert getattr(tokenizer, f"{name}_token_id") == 5
    setattr(tokenizer, f"{name}_token", None)
    assert getattr(tokenizer, f"{name}_token_id") is None
    assert None not in tokenizer.all_special_ids
    with pytest.raises(ValueError, match=f"{name}_token_id must be a whole number"):
        setattr(tokenizer, f"{name}_token_id", -1)
    with pytest.raises(ValueError, match=f"{name}_token must be a str or an AddedToken"):
        setattr(tokenizer, f"{name}_token", 5)


def test_a_special_token_that_does_not_exist_is_added():
    tokenizer = made()
    tokenizer.mask_token = "<mask>"
    tokenizer.extra_special_tokens = ["<e1>", "dog"]
    assert (tokenizer.mask_token_id, tokenizer.extra_special_tokens_ids) == (9, [10, 6])
    assert None not in tokenizer.all_special_ids
    assert tokenizer("the <mask>")["input_ids"] == [2, 7, 9, 3]
    assert tokenizer.decode([7, 9], skip_special_tokens=True) == "the"
    assert tokenizer.additional_special_tokens == ["<e1>", "dog"]
    tokenizer.unk_token = None
    assert tokenizer.convert_tokens_to_ids("nowhere") == 1


def test_the_frame_of_a_row_follows_its_tokens():
    tokenizer = made()
    before = tokenizer("cat")
    tokenizer.cls_token = "dog"
    assert tokenizer("cat")["input_ids"] == [6, 5, 3]
    assert before.tokens() == ["[CLS]", "cat", "[SEP]"]  # of the call, not of now
    tokenizer.sep_token = None
    assert tokenizer("cat", "the")["input_ids"] == [6, 5, 7]
    assert tokenizer.num_special_tokens_to_add(pair=True) == 1


def test_padding_without_a_pad_token_is_refused():
    tokenizer = made()
    tokenizer.pad_token = None
    assert tokenizer(["cat", "the cat"])["input_ids"] == [[2, 5, 3], [2, 7, 5, 3]]
    with pytest.raises(ValueError, match="this tokenizer has no pad_token"):
        tokenizer(["cat", "the cat"], padding=True)


def test_masks_of_special_tokens(minilm_dir):
    ours, theirs = (kind.from_pretrained(minilm_dir) for kind in (BertTokenizer, transformers.BertTokenizer))
    ids = ours("one text", "and another")["input_ids"]
    expected = theirs.get_special_tokens_mask(ids, already_has_special_tokens=True)
    assert ours.get_special_tokens_mask(ids, already_has_special_tokens=True) == expected
    assert ours.get_special_tokens_mask(ids) == expected
    first, second = (ours.encode(text, add_special_tokens=False) for text in ("one text", "and another"))
    assert ours.get_special_tokens_mask(first, second, already_has_special_tokens=False) == expected
    with pytest.raises(ValueError, match="token_ids_1 must be None"):
        ours.get_special_tokens_mask(first, second, already_has_special_tokens=True)


def test_special_tokens_can_be_split(minilm_dir):
    ours, theirs = (kind.from_pretrained(minilm_dir) for kind in (BertTokenizer, transformers.BertTokenizer))
    texts = ["a [MASK] b", "[CLS] [SEP]"]
    plain = ours(texts)["input_ids"]
    for options in ({"split_special_tokens": True}, {"split_special_tokens": True, "max_length": 4}):
        assert ours(texts, **options)["input_ids"] == theirs(texts, **options)["input_ids"]
    assert ours(texts)["input_ids"] == plain
    ours.split_special_tokens = True
    assert ours(texts)["input_ids"] == theirs(texts, split_special_tokens=True)["input_ids"] != plain


# What else transformers' tokenizer has


def test_lengths_and_names(minilm_dir, tmp_path):
    kinds = (BertTokenizer, transformers.BertTokenizer)
    ours, theirs = (kind.from_pretrained(minilm_dir, model_max_length=64) for kind in kinds)
    for name in ("max_len_single_sentence", "max_len_sentences_pair", "vocab_files_names", "backend", "is_fast",
                 "pad_token_type_id", "bos_token", "bos_token_id", "extra_special_tokens"):  # fmt: skip
        assert getattr(ours, name) == getattr(theirs, name), name
    (path,) = ours.save_vocabulary(str(tmp_path), filename_prefix="x")
    assert path == str(tmp_path / "x-vocab.txt")
    assert BertTokenizer(path).get_vocab() == ours.get_vocab()
    with pytest.raises(ValueError, match="save_directory must be a directory"):
        ours.save_vocabulary(tmp_path / "nowhere")


def test_a_vocabulary_is_learnt_anew(minilm_dir):
    kinds = (BertTokenizer, transformers.BertTokenizer)
    ours, theirs = (kind.from_pretrained(minilm_dir, model_max_length=64) for kind in kinds)
    texts = [["The cat sat on the mat.", "The dog sat."], ["A cat and a dog [MASK]."]] * 5
    options = {"new_special_tokens": ["<q>"], "special_tokens_map": {"[MASK]": "<mask>"}, "show_progress": False}
    mine, reference = (each.train_new_from_iterator(texts, 60, **options) for each in (ours, theirs))
    assert mine.vocab_size == reference.vocab_size == len(mine)
    for name in ("special_tokens_map", "mask_token_id", "cls_token_id", "extra_special_tokens_ids"):
        assert getattr(mine, name) == getattr(reference, name), name
    assert mine.model_max_length == 64
    assert mine.decode(mine("the cat <mask> <q>")["input_ids"]) == "[CLS] the cat <mask> <q> [SEP]"
    assert ours.mask_token == "[MASK]"  # the old one is as it was


def test_a_tokenizer_json_by_name(minilm_dir, tmp_path):
    ours = BertTokenizer.from_pretrained(minilm_dir)
    ours.save_pretrained(tmp_path)
    again = BertTokenizer(tokenizer_file=tmp_path / "tokenizer.json")
    assert again("Unbelievable!")["input_ids"] == ours("Unbelievable!")["input_ids"]


@pytest.mark.parametrize(
    "options",
    [{"use_fast": True}, {"trust_remote_code": True}, {"verbose": False}, {"do_basic_tokenize": True},
     {"never_split": None}, {"add_prefix_space": False}, {"from_slow": False}, {"force_download": False}],
    ids=str,
)  # fmt: skip
def test_arguments_that_change_nothing(minilm_dir, options, recwarn):
    tokenizer = BertTokenizer.from_pretrained(pretrained_model_name_or_path=minilm_dir, **options)
    assert tokenizer("a b")["input_ids"] == [101, 1037, 1038, 102]
    assert not recwarn.list


def test_arguments_that_would_change_something_or_nobody_knows(minilm_dir, tmp_path):
    with pytest.raises(ValueError, match=r"never_split=\['x'\] is not supported"):
        BertTokenizer.from_pretrained(minilm_dir, never_split=["x"])
    with pytest.raises(TypeError, match="BertTokenizer has no argument 'do_lowercase'"):
        BertTokenizer.from_pretrained(minilm_dir, do_lowercase=False)
    with pytest.raises(ValueError, match="push_to_hub=True is not supported"):
        made().save_pretrained(tmp_path, push_to_hub=True)


def test_targets_become_labels():
    tokenizer = made()
    both = tokenizer(["the cat"], text_target=["dog the cat"], max_length=4, max_target_length=3)
    assert both["labels"] == [[2, 6, 3]]
    assert both["input_ids"] == tokenizer(text_target=["the cat"])["input_ids"] == [[2, 7, 5, 3]]
    assert tokenizer("the cat", tokenizer_kwargs={"add_special_tokens": False})["input_ids"] == [7, 5]


# The batch


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, dict.copy, BatchEncoding.copy])
def test_copies_keep_the_alignment(copied):
    batch = made()("the cats", return_tensors="pt")
    other = copied(batch)
    assert all((other[name] == batch[name]).all() for name in batch)
    if copied is not dict.copy:
        assert other.word_ids() == [None, 0, 1, 1, None]
        assert other.n_sequences == 1
        other["new"] = 1
        assert "new" not in batch


def test_batches_are_joined():
    batch = made()("the cats")
    joined = batch | {"labels": 1, "input_ids": [9]}
    assert type(joined) is BatchEncoding
    assert joined.word_ids() == batch.word_ids()
    assert (joined["labels"], joined["input_ids"]) == (1, [9])
    assert batch["input_ids"] != [9]
    batch |= {"labels": 2}
    assert batch["labels"] == 2
    assert type(batch) is BatchEncoding


def test_a_batch_is_its_own_data():
    batch = made()(["the cat", "dog"])
    assert batch.data == dict(batch)
    batch.data["labels"] = [0, 1]
    assert batch["labels"] == [0, 1]
    assert BatchEncoding(dict(batch))[:1] == {name: value[:1] for name, value in batch.items()}
    assert made()("cat", "dog").n_sequences == 2
    assert pickle.loads(pickle.dumps(BatchEncoding({"x": [1]}, n_sequences=2))).n_sequences == 2


@pytest.mark.parametrize("kind", ["pt", "np"])
def test_lists_become_tensors(kind):
    ours, theirs = (
        cls({"input_ids": [[1, 2], [3, 4]], "labels": [0.5, 1]}, tensor_type=kind)
        for cls in (BatchEncoding, transformers.BatchEncoding)
    )
    one = BatchEncoding({"input_ids": [1, 2], "none": []}).convert_to_tensors(kind, prepend_batch_axis=True)
    assert one["input_ids"].shape == (1, 2)
    assert "int64" in str(one["none"].dtype)
    for name in ours:
        assert type(ours[name]) is type(theirs[name])
        assert ours[name].tolist() == theirs[name].tolist()
    with pytest.raises(ValueError, match="input_ids cannot become a tensor"):
        BatchEncoding({"input_ids": [[1], [2, 3]]}, tensor_type=kind)
    with pytest.raises(ValueError, match="tensor_type must be one of None, 'pt', 'np'; got 'tf'"):
        ours.convert_to_tensors("tf")


@pytest.mark.parametrize("kind", ["pt", "np"])
def test_pad_gives_back_what_it_got(kind, minilm_dir):
    ours, theirs = (made_of.from_pretrained(minilm_dir) for made_of in (BertTokenizer, transformers.BertTokenizer))
    rows = [BatchEncoding({"input_ids": row}, tensor_type=kind) for row in ([1, 2, 3], [4])]
    mine, reference = ours.pad(rows), theirs.pad([dict(row) for row in rows])
    assert {name: value.tolist() for name, value in mine.items()} == {
        name: value.tolist() for name, value in reference.items()
    }
    assert type(mine["input_ids"]) is type(reference["input_ids"])
    assert isinstance(ours.pad({"input_ids": [[1], [2, 3]]}, verbose=False)["input_ids"], list)


def test_decode_takes_a_batch():
    tokenizer = made()
    assert tokenizer.decode(tokenizer("the cat"), use_source_tokenizer=False) == "[CLS] the cat [SEP]"
    assert tokenizer.decode(tokenizer(["the", "cat"]), skip_special_tokens=True) == ["the", "cat"]
