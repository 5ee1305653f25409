"""CoNLL and its cousins: words and labels as they stand, or refused with FILE:LINE."""

from __future__ import annotations

import finetune_case as case
import pytest
from finetune_case import metrics_of, run

from minibert.finetuning.conll import read_sentences

CONLL_U = """# sent_id = 1
# text = Vámonos al mar
1-2\tVámonos\t_\t_\t_\t_\t_\t_\t_\t_
1\tVamos\tir\tVERB\t_\t_\t0\troot\t_\t_
2\tnos\tnosotros\tPRON\t_\t_\t1\tobj\t_\tSpaceAfter=No
2.1\tx\t_\t_\t_\t_\t_\t_\t_\t_
3\tmar\tmar\tNOUN\t_\t_\t1\tobl\t_\t_

# sent_id = 2
1\tSi\tsí\tINTJ\t_\t_\t0\troot\t_\t_
"""


def sentences(path, content, *columns):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [(each.words, each.labels) for each in read_sentences(path, *columns)]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("a B-X\nb I-X\n\n\nc O\n", [(("a", "b"), ("B-X", "I-X")), (("c",), ("O",))]),
        ("New York\tB-LOC\n10\u00a0000\tO\n", [(("New York", "10\u00a0000"), ("B-LOC", "O"))]),
        ("10\u00a0000 O\nx\u2003y O\n", [(("10\u00a0000", "x\u2003y"), ("O", "O"))]),
        ("\u00a0\tO\na\u2028b\tX\n", [(("\u00a0", "a\u2028b"), ("O", "X"))]),
        ("\ufeffa   NN  B-X\r\n  b NN O \r\n \t\r\nc NN O", [(("a", "b"), ("B-X", "O")), (("c",), ("O",))]),
        ("-DOCSTART- -X- O\na O\n-DOCSTART-\nb O\n-DOCSTART-\t-X-\nc O\n", [((w,), ("O",)) for w in "abc"]),
        ("# id 17 domain=train\na O\nb B-X\n", [(("a", "b"), ("O", "B-X"))]),
        # As many columns in the comment as in the other lines (MultiCoNER)
        ("# id 17 domain=train\na _ _ O\n\n# id 18 domain=train\nb _ _ B-X\n", [(("a",), ("O",)), (("b",), ("B-X",))]),
        ("# a\tb\nx\tO\n\n## note\ny\tB-X\n#begin document (c); part 0\nz\tO\n#end document\n",
         [(("x",), ("O",)), (("y", "z"), ("B-X", "O"))]),
        # "#" as a word: where its label is one of the others', and within a sentence
        ("# O\n1 O\n\nup B-X\n# O\n", [(("#", "1"), ("O", "O")), (("up", "#"), ("B-X", "O"))]),
        ("#\tO\n1\tO\nup\tB-X\n", [(("#", "1", "up"), ("O", "O", "B-X"))]),
        ("pay NN\n# #\n5 CD\n", [(("pay", "#", "5"), ("NN", "#", "CD"))]),
        ("#tag O\n#end B-X\n", [(("#tag", "#end"), ("O", "B-X"))]),
        ('" O\n"a O\n\'\' B-X\n', [(('"', '"a', "''"), ("O", "O", "B-X"))]),
    ],
)  # fmt: skip
def test_what_is_read(tmp_path, content, expected):
    assert sentences(tmp_path / "a.conll", content) == expected


def test_columns_by_number(tmp_path):
    content = "1 a NN B-X\n2 b NN O\n"
    assert sentences(tmp_path / "a.txt", content, 2) == [(("a", "b"), ("B-X", "O"))]
    assert sentences(tmp_path / "a.txt", content, 2, 3) == [(("a", "b"), ("NN", "NN"))]
    assert sentences(tmp_path / "a.txt", content, -3, -1) == [(("a", "b"), ("B-X", "O"))]
    found = sentences(tmp_path / "a.conllu", CONLL_U, 2, 4)
    assert found == [(("Vamos", "nos", "mar"), ("VERB", "PRON", "NOUN")), (("Si",), ("INTJ",))]
    assert sentences(tmp_path / "a.bio", "B-X\ta\nO\tb\n", 2, 1) == [(("a", "b"), ("B-X", "O"))]
    for columns, message in [
        ((5, None), "--text-column 5: .* has columns 1 to 4"),
        ((0, None), "--text-column 0: .* has columns 1 to 4"),
        ((2, -5), "--label-column -5: .* has columns 1 to 4"),
        ((4, None), "words and labels are both in column 4 of 4"),
    ]:
        with pytest.raises(ValueError, match=message):
            sentences(tmp_path / "a.txt", content, *columns)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "a.conll: no sentences"),
        ("\n\n", "a.conll: no sentences"),
        ("# only\n\n# comments\n", "a.conll: no sentences"),
        ("-DOCSTART- -X- O\n\n", "a.conll: no sentences"),
        ("a\n", "a.conll:1: a word and its label are needed, got 'a'"),
        ("a O\nb\n", "a.conll:2: columns: 1 (a word and its label are needed), but"),
        ("a O\n\nNew York B-LOC\n", "a.conll:3: columns: 3, but"),
        ("a\tO\nb O\n", "a.conll:2: columns: 1 (a word and its label are needed)"),
        ("a\tO\nb\tO\tx\n", "a.conll:2: columns: 3, but"),
        ("a O\nb\tO\n", "a.conll:2: columns: 1"),
        ("a\tO\n\tO\n", "a.conll:2: the word is empty"),
        ("a\tO\nb\t\n", "a.conll:2: the label is empty"),
        ("a\tO\nb\t \n", "a.conll:2: the label is empty"),
        ("#tag a O\nb O\n", "a.conll:2: columns: 2, but"),
        ("a O\nb O\n", "a.conll: every word has the label O, nothing to tell apart"),
        ("a O\rb B-X\r", "a.conll:1: a carriage return within the line"),
        ('{"tokens": ["a", "b"], "tags": ["O", "B-X"]}\n', "a.conll:1: this looks like JSON"),
        ('[{"tokens": ["a"]}]\n', "a.conll:1: this looks like JSON"),
        ("<?xml version='1.0'?>\n<a b/>\n", "a.conll:1: this looks like XML"),
        ("word,label\nLondon,B-LOC\n", "a.conll:1: a word and its label are needed, got 'word,label'"),
        ("Paris|B-LOC is|O\n", "a.conll: every word has the label is|O"),
        (CONLL_U, "a.conll: the first of 10 columns counts the words, as in CoNLL-U; say where"),
        ("0\ta\tO\n1\tb\tB-X\n", "the first of 3 columns counts the words"),
        ("bc/a 0 w O\n" * 5 + "\n" + "bc/a 0 v B-X\n" * 5, "the first of 4 columns is the same everywhere"),
        ("B-X\tfive\nO\tstars\n", "the labels seem to stand in column 1, where words should be"),
        ("token\tlabel\nthe\tDT\nsun\tNN\n", "a.conll:1: this line seems to name the columns"),
        ("Word POS Tag\nthe DT O\nsun NN B-X\n", "a.conll:1: this line seems to name the columns"),
        ("a B-X\nb MISC\nc O\n", "a.conll: labels: B-X has a letter that places it in an entity, but MISC have none"),
        ("a B-X\nb L-X\nc S-X\n", "no scheme has B, L, S"),
        (b"a O\n\xff O\n", "a.conll:2: not UTF-8"),
        ("a O\nb B-X\n".encode("utf-16"), "a.conll:1: the file is text in UTF-16"),
        ("a O\n\nb\0 B-X\n", "a.conll:3: a NUL byte"),
    ],
)
def test_errors_in_sentences(start, tmp_path, content, message, capsys):
    path = tmp_path / "a.conll"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert run(start, tmp_path / "run", path, path, "tagging") == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl", ".XML"])
def test_other_formats_by_their_name(start, tmp_path, suffix, capsys):
    path = tmp_path / f"a{suffix}"
    path.write_text("a O\nb B-X\n")
    assert run(start, tmp_path / "run", path, path, "tagging") == 1
    assert "tagging reads CoNLL" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "scheme"), [(("B", "L"), "BILOU"), (("B", "E"), "IOBES"), (("I", "E"), "IOE"), (("I", "I"), "IOB")]
)
def test_the_best_epoch_is_chosen_by_entities(start, tmp_path, names, scheme, capsys):
    train = case.places(tmp_path / "train.conll", 30, 0, names)
    assert run(start, tmp_path / "run", train, train, "tagging", "--epochs", 1) == 0
    assert f"scored as entities in {scheme}: f1" in capsys.readouterr().out
    assert {"precision", "recall", "f1", "accuracy"} <= metrics_of(tmp_path / "run")[0].keys()


def test_parts_of_speech_are_scored_by_words(start, tmp_path, capsys):
    path = tmp_path / "a.conll"
    path.write_text("the DT\nsun NN\n\nnice JJ\nday NN\n" * 4)
    assert run(start, tmp_path / "run", path, path, "tagging", "--epochs", 1) == 0
    assert "scored as words: accuracy" in capsys.readouterr().out
    assert {"accuracy", "macro_f1"} <= metrics_of(tmp_path / "run")[0].keys()
    assert "f1" not in metrics_of(tmp_path / "run")[0]


def test_columns_and_schemes_by_option(start, tmp_path, capsys):
    path = tmp_path / "a.conllu"
    path.write_text(CONLL_U)
    options = ("--text-column", 2, "--label-column", 4, "--epochs", 1)
    assert run(start, tmp_path / "run", path, path, "tagging", *options) == 0
    assert "labels: INTJ, NOUN, PRON, VERB" in capsys.readouterr().out
    path.write_text("a B-X\nb MISC\nc O\n")
    for scheme in ("none", "IO"):
        assert run(start, tmp_path / scheme, path, path, "tagging", "--scheme", scheme, "--epochs", 1) == 0
    assert run(start, tmp_path / "no", path, path, "tagging", "--scheme", "BILOU") == 1
    assert "--scheme BILOU: the labels MISC are not of it" in capsys.readouterr().err
