"""Text files to token ids: the same ids as the tokenizer, the same files after an interruption, clear refusals."""

from __future__ import annotations

import gzip
import lzma
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from minibert.pretraining import corpus as corpus_module
from minibert.pretraining.corpus import Corpus, build_corpus, train_vocab
from minibert.pretraining.sentences import split_sentences
from minibert.text.tokenizer import BertTokenizer

TEXT = """The cat sat on the mat. Élan vital!
It was  a black\tcat, 1,024 years old.
A third sentence — with a dash.

Second document: 東京 is a city.
\x00-free, but "naïve" and ﬁne.
""".replace("\x00", "nul")


@pytest.fixture
def text(tmp_path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text((TEXT + "\n") * 5 + "The third.\nHas two.\n", encoding="utf-8")
    return path


@pytest.fixture
def vocab(text) -> Path:
    return train_vocab(text, text.parent / "vocab.txt", vocab_size=120, progress=False)


def build(files, directory, vocab, **options) -> Corpus:
    return build_corpus(files, directory, vocab, num_workers=1, progress=False, **options)


def sentences_of(corpus: Corpus) -> list[list[int]]:
    return [corpus.tokens(a, b - a).tolist() for a, b in pairwise(corpus.sentences.tolist())]


def test_ids_are_those_of_the_tokenizer(text, vocab, tmp_path):
    corpus = build(text, tmp_path / "corpus", vocab)
    tokenizer = BertTokenizer(vocab)
    lines = [line for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
    assert sentences_of(corpus) == [tokenizer(line, add_special_tokens=False)["input_ids"] for line in lines]
    assert np.diff(corpus.documents).tolist() == [3, 2] * 5 + [2]
    assert corpus.report.tokens == sum(map(len, sentences_of(corpus)))


def test_forgetting_words_changes_nothing(text, vocab, tmp_path, monkeypatch):
    pieces = corpus_module._WordPieces(
        corpus_module._bert_tokenizer(corpus_module.models.WordPiece.from_file(str(vocab), unk_token="[UNK]"), True)
    )
    lines = [line for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
    known = pieces(lines)
    monkeypatch.setattr(corpus_module, "CACHED_WORDS", 3)
    for line in lines:
        pieces([line])
    again = pieces(lines)
    assert np.array_equal(known[0], again[0])
    assert np.array_equal(known[1], again[1])


@pytest.mark.parametrize(("suffix", "compress"), [(".txt.gz", gzip.compress), (".txt.xz", lzma.compress)])
def test_compressed_files(text, vocab, tmp_path, suffix, compress):
    packed = tmp_path / f"packed{suffix}"
    packed.write_bytes(compress(text.read_bytes()))
    plain = build(text, tmp_path / "plain", vocab)
    assert sentences_of(build(packed, tmp_path / "packed", vocab)) == sentences_of(plain)


def test_blocks_and_workers_do_not_matter(text, vocab, tmp_path, monkeypatch):
    whole = build(text, tmp_path / "whole", vocab)
    monkeypatch.setattr(corpus_module, "BLOCK_BYTES", 64)
    cut = build_corpus(text, tmp_path / "cut", vocab, num_workers=2, progress=False)
    assert len(list((tmp_path / "cut").glob("tokens-*.npy"))) > 3
    assert sentences_of(cut) == sentences_of(whole)
    assert np.array_equal(cut.documents, whole.documents)
    assert (cut.report, cut.fingerprint) == (whole.report, whole.fingerprint)


def test_an_interrupted_build_goes_on(text, vocab, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "BLOCK_BYTES", 64)
    whole = build(text, tmp_path / "corpus", vocab)
    before = sentences_of(whole)
    parts = sorted((tmp_path / "corpus").glob("tokens-*.npy"))
    times = {path: path.stat().st_mtime_ns for path in parts}
    (tmp_path / "corpus" / "corpus.json").unlink()
    (tmp_path / "corpus" / "shard-00002.json").unlink()
    with pytest.raises(FileNotFoundError, match="no finished corpus"):
        Corpus(tmp_path / "corpus")
    assert sentences_of(build(text, tmp_path / "corpus", vocab)) == before
    rewritten = [path.name for path in parts if path.stat().st_mtime_ns != times[path]]
    assert rewritten == ["tokens-00002.npy"]


def test_other_text_or_vocabulary_is_built_anew(text, vocab, tmp_path):
    first = build(text, tmp_path / "corpus", vocab)
    text.write_text("Only this.\nAnd that.\n\nOne more.\nTwo more.\n")
    second = build(text, tmp_path / "corpus", vocab)
    assert second.report.sentences == 4
    assert second.fingerprint != first.fingerprint


def test_prose_is_split_into_sentences(vocab, tmp_path):
    path = tmp_path / "prose.txt"
    path.write_text('Dr. Cat sat. "Why?" he\nasked. So it was.\n\nA second one. It ends.\n')
    corpus = build(path, tmp_path / "corpus", vocab, prose=True)
    assert np.diff(corpus.documents).tolist() == [3, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b" \n\n \n", "holds no text"),
        (b"one\ntwo\nthree\n", "one document in all"),
        (b"one\n\ntwo\n\nthree\n\nfour\n", "4 of 4 documents have a single sentence"),
        (b"one\ntwo\n\nthree\nf\xfcnf\n", r"bad\.txt, line 5: byte 0xfc is not UTF-8"),
        ("one\ntwo\n\nthree\n".encode("utf-16"), r"bad\.txt, line 1: a NUL byte"),
    ],
)
def test_refusals(content, message, vocab, tmp_path):
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        build(path, tmp_path / "corpus", vocab)
    assert not (tmp_path / "corpus" / "corpus.json").exists()


def test_damaged_and_missing_files(text, vocab, tmp_path):
    path = tmp_path / "cut.txt.xz"
    path.write_bytes(lzma.compress(text.read_bytes())[:-20])
    with pytest.raises(ValueError, match=r"cut\.txt\.xz is damaged"):
        build(path, tmp_path / "corpus", vocab)
    with pytest.raises(FileNotFoundError, match=r"none\.txt is not a file"):
        build(tmp_path / "none.txt", tmp_path / "corpus", vocab)
    (tmp_path / "other.txt").write_text("a\nb\n")
    with pytest.raises(ValueError, match=r"lacks the special tokens \[PAD\]"):
        build(text, tmp_path / "corpus", tmp_path / "other.txt")


def test_the_vocabulary_has_the_special_tokens_first(vocab):
    pieces = vocab.read_text(encoding="utf-8").splitlines()
    assert pieces[:5] == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    assert len(pieces) == len(set(pieces)) <= 120


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("One. Two! Three? Four", ["One.", "Two!", "Three?", "Four"]),
        ("Mr. J. R. Smith paid $3.50 to St. Paul.", ["Mr. J. R. Smith paid $3.50 to St. Paul."]),
        ('"Stop." He did. (He had to.) So I left.', ['"Stop."', "He did.", "(He had to.)", "So I left."]),
        ("", []),
        ("  \n ", []),
    ],
)  # fmt: skip
def test_sentences(text, sentences):
    assert split_sentences(text) == sentences
