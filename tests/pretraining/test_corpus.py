"""Text files to token ids: the same ids as the tokenizer, the same files after an interruption, clear refusals."""

from __future__ import annotations

import gzip
import json
import lzma
import pickle
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from minibert.pretraining import corpus as corpus_module
from minibert.pretraining.batches import BatchMaker
from minibert.pretraining.corpus import Corpus, build_corpus
from minibert.pretraining.pairs import PairRules
from minibert.pretraining.sentences import split_sentences
from minibert.pretraining.vocabulary import train_vocab
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


JOIN = """
import sys
from pathlib import Path
from minibert.pretraining import corpus
corpus._join(Path(sys.argv[1]), "lengths", 1, "sentences.npy")
"""


def test_a_full_disk_is_an_error_and_no_crash(small_disk):
    """In a process of its own: a memory map on a full disk would end it with a signal."""
    disk = small_disk(1 << 17)
    np.save(disk / "lengths-00000.npy", np.ones(10_000, np.int64))
    done = subprocess.run([sys.executable, "-c", JOIN, disk], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "No space left on device" in done.stderr
    assert not (disk / "sentences.npy").exists()
    small_disk(1 << 20)
    subprocess.run([sys.executable, "-c", JOIN, disk], check=True)
    assert np.array_equal(np.load(disk / "sentences.npy"), np.arange(10_001))


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_a_corpus_is_built_when_there_is_room_again(share, text, vocab, small_disk, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "BLOCK_BYTES", 20_000)
    text.write_text((TEXT + "\n") * 500, encoding="utf-8")
    whole = build(text, tmp_path / "whole", vocab)
    pages = sum(-(-path.stat().st_size // 4096) for path in whole.directory.iterdir())
    disk = small_disk(4096 * int(share * pages))
    with pytest.raises(OSError, match=r"No space left on device: '.*/corpus/"):
        build(text, disk / "corpus", vocab)
    with pytest.raises(FileNotFoundError, match="no finished corpus"):
        Corpus(disk / "corpus")
    small_disk(1 << 22)
    assert build(text, disk / "corpus", vocab).fingerprint == whole.fingerprint


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
    (tmp_path / "pointer.txt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(ValueError, match=r"pointer\.txt is a pointer of Git LFS"):
        build(text, tmp_path / "corpus", tmp_path / "pointer.txt")
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


# --- what others' files bring


def documents_of(corpus: Corpus) -> list[int]:
    return np.diff(corpus.documents).tolist()


def test_a_long_document_is_cut_between_lines_and_nowhere_else(vocab, tmp_path, monkeypatch):
    """One without a blank line for many blocks, with characters of several bytes at every place."""
    path = tmp_path / "long.txt"
    lines = [f"{'é' * (i % 7)}the c{'ï' * (i % 5)}at 東京 {i}." for i in range(300)]
    path.write_text("\n".join(lines) + "\n\nA second.\nWith two.\n", encoding="utf-8")
    whole = build(path, tmp_path / "whole", vocab, max_unknown=1.0)
    for size in (32, 37, 61):
        monkeypatch.setattr(corpus_module, "BLOCK_BYTES", size)
        cut = build(path, tmp_path / str(size), vocab, max_unknown=1.0)
        assert sentences_of(cut) == sentences_of(whole)
        assert len(documents_of(cut)) > 5


@pytest.mark.parametrize(
    "content", [b"\xef\xbb\xbf", b"\xef\xbb\xbf\n\n", "\u00a0\n\u2003\n".encode(), b"\x01\x02\n", b"\r\r"]
)
def test_a_file_without_a_sentence_is_named(content, text, vocab, tmp_path):
    path = tmp_path / "nothing.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"nothing\.txt holds no text"):
        build([text, path], tmp_path / "corpus", vocab)


def test_a_block_without_a_sentence_is_passed_over(text, vocab, tmp_path, monkeypatch):
    path = tmp_path / "gap.txt"
    gap = "\u00a0\n\n\x01\n\n" * 40
    path.write_text(text.read_text(encoding="utf-8") + "\n" + gap + "The last.\nHas two.\n", encoding="utf-8")
    plain = build(text, tmp_path / "plain", vocab)
    monkeypatch.setattr(corpus_module, "BLOCK_BYTES", 16)
    gapped = build(path, tmp_path / "gapped", vocab)
    assert sentences_of(gapped)[: len(sentences_of(plain))] == sentences_of(plain)
    assert documents_of(gapped)[-1] == 2


@pytest.mark.parametrize("suffix", [".gz", ".xz", ".GZ", ".Xz"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "no such thing"])
def test_damaged_archives_are_named(suffix, damage, text, vocab, tmp_path):
    packed = (gzip if suffix.lower() == ".gz" else lzma).compress(text.read_bytes() * 20)
    middle = len(packed) // 2
    flipped = packed[:middle] + bytes(255 - b for b in packed[middle : middle + 8]) + packed[middle + 8 :]
    path = tmp_path / f"text.txt{suffix}"
    path.write_bytes({"flipped": flipped, "cut": packed[:-9], "no such thing": text.read_bytes()}[damage])
    with pytest.raises(ValueError, match=rf"text\.txt\{suffix} is damaged or cut short"):
        build(path, tmp_path / "corpus", vocab)
    assert not (tmp_path / "corpus").exists()  # seen before anything was made


def test_what_is_no_text_is_seen_before_any_work(text, vocab, tmp_path):
    bad = tmp_path / "bad.txt"
    for content, message in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "a pointer of Git LFS"),
        ("a\n\nb\n".encode("utf-16"), "a NUL byte"),
        (b"one\ntw\xff\n", "line 2: byte 0xff is not UTF-8"),
        (b"x" * 70_000 + b"\n" + b"\xff\n", None),  # beyond what is looked at: seen later
    ):
        bad.write_bytes(content)
        with pytest.raises(ValueError, match=message or "line 2: byte 0xff"):
            build([text, bad], tmp_path / "corpus", vocab, max_unknown=1.0)
        assert (tmp_path / "corpus").exists() == (message is None)


def test_a_character_at_the_edge_of_the_first_look(text, vocab, tmp_path):
    path = tmp_path / "edge.txt"
    path.write_text("the cat\n" * 10 + "\n" + "é" * 40_000 + "\nthe cat\n", encoding="utf-8")
    assert documents_of(build(path, tmp_path / "corpus", vocab, max_unknown=1.0)) == [10, 2]


def test_a_vocabulary_that_does_not_know_the_text_is_refused(text, vocab, tmp_path):
    path = tmp_path / "cyrillic.txt"
    path.write_text("кот сидит\nна окне\n\nпес лежит\nна полу\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"100\.0% of the tokens are unknown to the vocabulary, more than 5\.0%"):
        build(path, tmp_path / "corpus", vocab)
    with pytest.raises(FileNotFoundError):
        Corpus(tmp_path / "corpus")
    assert build(path, tmp_path / "corpus", vocab, max_unknown=1.0).report.unknown_tokens == 8
    with pytest.raises(ValueError, match="max_unknown is 2, but must be from 0 to 1"):
        build(text, tmp_path / "corpus", vocab, max_unknown=2)


def chinese(tmp_path: Path, characters: int) -> Path:
    """Each of so many characters, the most frequent ones much more often, as in any text."""
    counts = [max(2, 3000 // (i + 1)) for i in range(characters)]
    letters = [chr(0x4E00 + i) for i, count in enumerate(counts) for _ in range(count)]
    np.random.default_rng(0).shuffle(letters)
    lines = ["".join(letters[i : i + 20]) for i in range(0, len(letters), 20)]
    path = tmp_path / "chinese.txt"
    path.write_text("\n".join(line + ("\n" if i % 10 == 9 else "") for i, line in enumerate(lines)), encoding="utf-8")
    return path


def test_a_script_of_thousands_of_characters(tmp_path):
    path = chinese(tmp_path, 3000)
    vocab = train_vocab(path, tmp_path / "vocab.txt", vocab_size=8000, progress=False)
    report = build(path, tmp_path / "corpus", vocab).report
    assert report.unknown_tokens < 0.001 * report.tokens
    limited = train_vocab(path, tmp_path / "limited.txt", vocab_size=8000, limit_alphabet=1000, progress=False)
    with pytest.raises(ValueError, match=r"unknown to the vocabulary.*limit_alphabet"):
        build(path, tmp_path / "limited", limited)


@pytest.mark.parametrize("lowercase", [True, False])
def test_the_same_text_gives_the_same_vocabulary(text, tmp_path, lowercase):
    """Many words are as frequent as others: ties must not be broken by chance, or a run begun anew would be another."""
    draw = np.random.default_rng(0)
    words = ["".join(draw.choice(list("abcdefghijAÉß中文-")) for _ in range(6)) for _ in range(300)]
    text.write_text("\n".join(" ".join(words[i : i + 10]) for i in range(0, 300, 10)) * 2, encoding="utf-8")
    options = {"vocab_size": 150, "lowercase": lowercase, "progress": False}
    vocabularies = {train_vocab(text, tmp_path / str(i), **options).read_bytes() for i in range(6)}
    assert len(vocabularies) == 1
    pieces = vocabularies.pop().decode().split("\n")[:-1]
    assert len(pieces) == len(set(pieces)) == 150
    assert not {"##中", "##-"} & set(pieces)
    assert ("##É" in pieces) == (not lowercase)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"vocab_size": 3}, "vocab_size is 3"),
        ({"vocab_size": 1e4}, "vocab_size is 10000.0"),
        ({"limit_alphabet": 0}, "limit_alphabet is 0"),
    ],
)
def test_impossible_vocabularies(text, tmp_path, sizes, message):
    with pytest.raises(ValueError, match=message):
        train_vocab(text, tmp_path / "vocab.txt", **sizes)


@pytest.mark.parametrize("space", ["\u2028", "\x85", "\x1c", "\u00a0", "\x0b"])
def test_a_piece_that_other_readers_take_for_a_line_break(space, text, tmp_path):
    """bert-base-chinese has U+2028 among its pieces: the ids after it must not slip."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", f"x{space}y", *letters, *(f"##{c}" for c in letters)]
    vocab = tmp_path / "vocab.txt"
    vocab.write_text("\n".join(pieces) + "\n", encoding="utf-8")
    corpus = build(text, tmp_path / "corpus", vocab, max_unknown=1.0)
    assert corpus.vocab_size == len(pieces)
    maker = BatchMaker(corpus, PairRules(max_length=16))
    assert maker.ordinary.tolist() == list(range(5, len(pieces)))
    assert np.flatnonzero(maker.continues).tolist() == [i for i, piece in enumerate(pieces) if piece.startswith("##")]


def odd_tokenizers(vocab: Path) -> list[BertTokenizer]:
    accents = BertTokenizer(vocab, strip_accents=False)
    joined = BertTokenizer(vocab, tokenize_chinese_chars=False)
    words = BertTokenizer(vocab)
    words.add_tokens(["catmat", "1,024"])
    spaced = BertTokenizer(vocab)
    spaced.add_tokens(["black cat", "sat on"])
    return [accents, joined, words, spaced]


@pytest.mark.parametrize("which", range(4), ids=["accents", "chinese", "added words", "added words with a blank"])
def test_the_tokenizer_itself_tokenizes(which, text, vocab, tmp_path):
    tokenizer = odd_tokenizers(vocab)[which]
    corpus = build(text, tmp_path / "corpus", tokenizer, max_unknown=1.0)
    lines = [line.strip() for line in text.read_text(encoding="utf-8").splitlines() if line.strip()]
    assert sentences_of(corpus) == [tokenizer(line, add_special_tokens=False)["input_ids"] for line in lines]
    again = corpus.tokenizer
    assert again.get_vocab() == tokenizer.get_vocab()
    assert (again.strip_accents, again.tokenize_chinese_chars) == (
        tokenizer.strip_accents,
        tokenizer.tokenize_chinese_chars,
    )


@pytest.mark.parametrize("chinese", [True, False])
def test_scripts_without_blanks_have_the_ids_of_the_tokenizer(chinese, tmp_path):
    """Chinese is looked up character by character, if the tokenizer takes it so."""
    lines = ["我们今天去东京。", "東京タワーは高い", "a中́b 㐀𠀀豈 x中", "中 中", "ไทย中ไทย", "中"]
    path = tmp_path / "text.txt"
    path.write_text("\n".join(lines) + "\n\n" + "\n".join(reversed(lines)) + "\n", encoding="utf-8")
    characters = sorted(set("".join(lines)) - {" "})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *characters, *(f"##{c}" for c in characters)]
    tokenizer = BertTokenizer({piece: i for i, piece in enumerate(pieces)}, tokenize_chinese_chars=chinese)
    corpus = build(path, tmp_path / "corpus", tokenizer, max_unknown=1.0)
    expected = [tokenizer(line, add_special_tokens=False)["input_ids"] for line in lines]
    assert sentences_of(corpus) == expected + expected[::-1]


def test_a_mask_in_the_text_is_text(vocab, tmp_path):
    path = tmp_path / "masks.txt"
    path.write_text("the [MASK] sat.\n[SEP] on [CLS]\n\nthe cat\nsat on\n")
    ids = [i for sentence in sentences_of(build(path, tmp_path / "corpus", vocab, max_unknown=1.0)) for i in sentence]
    assert not {0, 2, 3, 4} & set(ids)


def test_a_corpus_goes_to_another_process_by_its_name(text, vocab, tmp_path):
    corpus = build(text, tmp_path / "corpus", vocab)
    pickled = pickle.dumps(corpus)
    assert len(pickled) < 1000
    again = pickle.loads(pickled)
    assert sentences_of(again) == sentences_of(corpus)


def test_what_a_longer_text_left_is_removed(text, vocab, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_module, "BLOCK_BYTES", 64)
    build(text, tmp_path / "corpus", vocab)
    assert len(list((tmp_path / "corpus").glob("tokens-*"))) > 3
    text.write_text("The cat.\nSat on.\n\nThe mat.\nSat too.\n")
    build(text, tmp_path / "corpus", vocab)
    for kind in ("tokens", "lengths", "sizes", "shard"):
        assert len(list((tmp_path / "corpus").glob(f"{kind}-*"))) == 2  # one a document


def test_prose_of_another_language_is_refused_with_the_reason(vocab, tmp_path):
    path = tmp_path / "prose.txt"
    path.write_text("今日は。東京へ行く。\n\n猫がいる。犬もいる。\n\n雨だ。雪だ。\n", encoding="utf-8")
    with pytest.raises(ValueError, match="the rules for prose know English sentences only"):
        build(path, tmp_path / "corpus", vocab, prose=True)


def test_a_corpus_of_another_format_is_named(text, vocab, tmp_path):
    build(text, tmp_path / "corpus", vocab)
    manifest = tmp_path / "corpus" / "corpus.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"format": 1}))
    with pytest.raises(ValueError, match="has format 1, this version reads format 2"):
        Corpus(tmp_path / "corpus")
