"""Files of texts: what people bring, read as it stands or refused with FILE:LINE."""

from __future__ import annotations

import csv
import json

import finetune_case as case
import pytest
from finetune_case import MULTI, NUMBER, SINGLE, run, weather

from minibert.finetuning.examples import Columns, read_pairs, read_texts
from minibert.finetuning.files import Layout, as_delimiter
from minibert.finetuning.tasks import Classification


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def texts(path, problem=SINGLE, **columns):
    return [(each.text, each.text_pair, each.label) for each in read_texts(path, problem, Columns(**columns))]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "a.csv:1: the first line must name the columns text and label; got []"),
        ("a.csv", "text,class\na,b\n", "a.csv:1: the first line must name the columns text and label"),
        ("a.csv", "text,class\na,b\n", "or say what they are called: --text-column, --label-column"),
        ("a.csv", "text,label\n", "a.csv: no examples"),
        ("a.csv", "\ufefftext,label\r\n\r\n  \r\n", "a.csv: no examples"),
        ("a.csv", "text,label\na,b\nc\n", "a.csv:3: 1 fields, the first line names 2"),
        ("a.csv", "text,label\na,b,c\n", "a.csv:2: 3 fields, the first line names 2"),
        ("a.csv", 'text,label\n"a\nb",c\n" ",d\n', "a.csv:4: the text is empty"),
        ("a.csv", "text,label\na, \n", "a.csv:2: the label must be one name, got ' '"),
        ("a.csv", 'text,label\nx,y\n"a,b\n', "a.csv:3: unexpected end of data"),
        ("a.csv", 'text,label\n"a"b,c\n', "a.csv:2: ',' expected after '\"'"),
        ("a.csv", "text,label\ra,b\r", "a.csv:1: new-line character seen in unquoted field"),
        ("a.csv", b"text,label\n\xff,b\n", "a.csv:2: not UTF-8"),
        ("a.csv", "text,label\na,b\n".encode("utf-16"), "a.csv:1: the file is text in UTF-16"),
        ("a.csv", "text,label\na,b\n".encode("utf-16-le"), "a.csv:1: a NUL byte"),
        ("a.csv", "text,label\na,b\n".encode("utf-32"), "a.csv:1: the file is text in UTF-32"),
        ("a.csv", "text,label\na,b\nc\0d,b\n", "a.csv:3: a NUL byte"),
        ("a.csv", b"PK\x03\x04rest", "a.csv:1: the file is a zip archive (such as .xlsx)"),
        ("a.csv", b"\x1f\x8brest", "a.csv:1: the file is compressed (gzip)"),
        ("a.csv", "version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS, not the file itself"),
        ("a.csv", "text;label\na;b\n", "split at ';' it does: give --delimiter"),
        ("a.tsv", "text,label\na,b\n", "split at ',' it does: give --delimiter"),
        ("a.csv", "text,label,label\na,b,c\n", "a.csv:1: named more than once: 'label'"),
        ("a.csv", "id,id,text,label\n1,2,a,c\n", "a.csv:1: named more than once: 'id'"),
        ("a.csv", "text,label, Label\na,b,c\n", "a.csv:1: the columns 'label' and 'Label' differ only in spelling"),
        ("a.csv", "text,TEXT,label\na,b,c\n", "a.csv:1: the columns 'text' and 'TEXT' differ only in spelling"),
        ("a.csv", "text,ｔext,label\na,b,c\n", "differ only in spelling"),
        ("a.csv", "text,label\na,b\nc,nan\n", "a.csv:3: the label must be one name, got 'nan'"),
        ("a.csv", "text,label\na,b\nc,b\n", "a.csv: 1 different labels (b), nothing to tell apart"),
        ("a.csv", "text,label\na,b\n\u200b\u00a0,c\n", "a.csv:3: the text is empty"),
        ("a.csv", "text,label\na,b\n\x01\u200e,c\n", "a.csv:3: the text is empty"),
        ("a.csv", "text,label\na,b\nc,#N/A\n", "a.csv:3: 'label' is '#N/A', a spreadsheet's mark of a formula"),
        ("a.csv", "text,label\na,b\n #DIV/0! ,c\n", "a.csv:3: 'text' is '#DIV/0!', a spreadsheet's mark"),
        ("a.csv", "text,label\na,#BUSY!\n", "a.csv:2: 'label' is '#BUSY!', a spreadsheet's mark"),
        ("a.csv", "text,label\na,b\n#GETTING_DATA,c\n", "a.csv:3: 'text' is '#GETTING_DATA', a spreadsheet's mark"),
        ("a.csv", "text,text_pair,label\na,#NAME?,c\n", "a.csv:2: 'text_pair' is '#NAME?', a spreadsheet's mark"),
        ("a.csv", "text,label\na,b\nErr:522,c\n", "a.csv:3: 'text' is 'Err:522', a spreadsheet's mark"),
        ("a.tsv", '"text"\t"label"\n"a"\tb\n', "columns text and label; got ['\"text\"', '\"label\"']"),
        ("a.jsonl", "", "a.jsonl: no examples"),
        ("a.json", "[]", "a.json: no examples"),
        ("a.json", " [ ]\n", "a.json: no examples"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "a"\n', "a.jsonl:2: not JSON, one object a line"),
        ("a.jsonl", '\n["a"]\n', "a.jsonl:2: must be an object with named fields"),
        ("a.json", '[\n{"text": "a", "label": 1},\n\n 5]', "a.json:4: must be an object with named fields, got 5"),
        ("a.json", '[\n{"text": "a", "label": 1}\n{"text"', "a.json:2: not JSON: neither a comma nor the end"),
        ("a.json", '[{"text": "a", "label": 1},\n]', "a.json:2: not JSON"),
        ("a.json", '[{"text": "a", "label": 1}]\n[]', "a.json:1: not JSON: something follows the array"),
        ("a.jsonl", '{"text": "a"}\n', "a.jsonl:1: no 'label'; there are 'text'"),
        ("a.jsonl", '{"text": 5, "label": 1}\n', "a.jsonl:1: 'text' must be a text, got 5"),
        ("a.jsonl", '{"text": null, "label": 1}\n', "a.jsonl:1: 'text' must be a text, got None"),
        ("a.jsonl", '{"text": "a", "text_pair": 7, "label": 1}\n', "a.jsonl:1: 'text_pair' must be a text, got 7"),
        *(
            ("a.jsonl", f'{{"text": "a", "label": "x"}}\n{{"text": "a", "label": {label}}}\n',
             f"a.jsonl:2: the label must be one name, got {shown}")
            for label, shown in (("[1]", "[1]"), ("NaN", "nan"), ("null", "None"), ("true", "True"), ("1.5", "1.5"),
                                 ("1.0", "1.0"), ('{"a": 1}', "{'a': 1}"), ('""', "''"), ("[[]]", "[[]]"),
                                 ("Infinity", "inf"))
        ),
        ("a.jsonl", '{"text": "a", "label": "b", "label": "c"}\n', "a.jsonl:1: not JSON, one object a line"),
        ("a.jsonl", '{"text": "a", "label": "b", "label": "c"}\n', "named more than once: 'label'"),
        ("a.jsonl", '{"text": "a", "label": "b", "l\\u0061bel": "c"}\n', "named more than once: 'label'"),
        ("a.json", '[{"text": "a", "text": "c", "label": "b"}]', "a.json:1: not JSON: named more than once: 'text'"),
        ("a.jsonl", '{"text": "a", "label": "b", "Label": "c"}\n', "'label' and 'Label' differ only in spelling"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "\\ud83d", "label": 2}\n', "a.jsonl:2: 'text' is not Unicode"),
        ("a.jsonl", '{"text": "a", "text_pair": "\\udc00", "label": 2}\n', "a.jsonl:1: 'text_pair' is not Unicode"),
        ("a.jsonl", '{"text": "a", "label": "\\ud83d"}\n', "a.jsonl:1: 'label' is not Unicode"),
        ("a.jsonl", '{"text": "a", "label": ' + "[" * 99_999 + "}\n", "a.jsonl:1: not JSON"),
        ("a.txt", "x", "a.txt: must be a file of type .csv"),
    ],
)  # fmt: skip
def test_errors_in_texts(tmp_path, name, content, message, start, capsys):
    """In the training file as in the validation file, and before anything is written."""
    path, good = write(tmp_path / name, content), weather(tmp_path / "good.csv", 5, 0)
    for files in ((path, good), (good, path)):
        if "nothing to tell apart" in message and files[0] == good:
            continue
        assert run(start, tmp_path / "run", *files) == 1
        assert message in capsys.readouterr().err
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("problem", "content", "message"),
    [
        (NUMBER, '{"text": "a", "label": NaN}', "must be a number, got nan"),
        (NUMBER, '{"text": "a", "label": true}', "must be a number, got True"),
        (NUMBER, '{"text": "a", "label": 1e999}', "must be a number, got inf"),
        (NUMBER, '{"text": "a", "label": 1e39}', "must be a number, got 1e+39"),
        (NUMBER, '{"text": "a", "label": null}', "must be a number, got None"),
        (NUMBER, '{"text": "a", "label": [1]}', "must be a number, got [1]"),
        (NUMBER, '{"text": "a", "label": "1,5"}', "must be a number, got '1,5'"),
        (MULTI, '{"text": "a", "label": [null, "x"]}', "must be one name, got None"),
        (MULTI, '{"text": "a", "label": ["x", true]}', "must be one name, got True"),
        (MULTI, '{"text": "a", "label": ["x", ["y"]]}', "must be one name, got ['y']"),
        (MULTI, '{"text": "a", "label": ["x", ""]}', "must be one name, got ''"),
        (MULTI, '{"text": "a", "label": {"x": 1}}', "labels must be a list"),
        (MULTI, '{"text": "a", "label": 3.5}', "labels must be a list"),
    ],
)
def test_labels_that_are_none(tmp_path, problem, content, message):
    path = write(tmp_path / "a.jsonl", content)
    with pytest.raises(ValueError, match=r"a\.jsonl:1: .*" + message.replace("[", r"\[").replace("+", r"\+")):
        read_texts(path, problem)


def test_a_vocabulary_of_another_language_is_said(tmp_path, start, capsys):
    path = write(tmp_path / "a.csv", "text,label\n\u0441\u043e\u043d,x\n\u0434\u0434,y\nsun sun sun,x\n")
    assert run(start, tmp_path / "run", path, path, "classification", "--epochs", "1") == 0
    assert "a.csv: 3 examples; 40.0% of their tokens are unknown to the model's vocabulary" in capsys.readouterr().out
    path = write(tmp_path / "b.csv", "text,label\nsun,x\nrain,y\n")
    assert run(start, tmp_path / "other", path, path, "classification", "--epochs", "1") == 0
    assert "unknown" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("labels", "one", "other"),
    [
        (["1", "0", "1.0"], "1", "1.0"),
        (["-1.0", "0", "-1"], "-1", "-1.0"),
        (["caf\u00e9", "b", "cafe\u0301"], "cafe\u0301", "caf\u00e9"),
        (["good", "good\u200b", "b"], "good", "good\u200b"),
        (["a b", "a\u00a0b", "b"], "a b", "a\u00a0b"),
    ],
)
@pytest.mark.parametrize("task", ["classification", "tagging"])
def test_one_label_in_two_spellings(tmp_path, task, labels, one, other, start, capsys):
    """They would be two classes, which nobody can tell apart by looking at them."""
    if task == "tagging":
        path = write(tmp_path / "a.conll", "".join(f"a\t{label}\n" for label in labels))
    else:
        path = write(tmp_path / "a.csv", "text,label\n" + "".join(f"a,{label}\n" for label in labels))
    assert run(start, tmp_path / "run", path, path, task) == 1
    assert f"{path}: the labels {one!r} and {other!r} are spelled in two ways" in capsys.readouterr().err


@pytest.mark.parametrize("labels", [("1.1", "1.10"), ("01", "1"), ("A", "a"), ("m2", "m\u00b2"), ("v1.0.0", "v1.0")])
def test_labels_that_are_two(tmp_path, labels):
    rows = "".join(f"a,{label}\n" for label in labels)
    found = read_texts(write(tmp_path / "a.csv", f"text,label\n{rows}"), SINGLE)
    assert set(Classification().labels(found)) == set(labels)


def test_labels_that_differ_in_case_are_said(tmp_path, start, capsys):
    path = write(tmp_path / "a.csv", "text,label\na,Good\nb,good\nc,bad\n")
    assert run(start, tmp_path / "run", path, path, "classification", "--epochs", "1") == 0
    assert "labels that differ in case alone, and count as different ones: 'Good' and 'good'" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", 'text,label\na,"x,y"\nb,x\nc,y\n', "a.csv: the label 'x,y' seems to be several"),
        ("a.csv", "text,label\na,x | y\nb,x\nc,y\n", "a.csv: the label 'x | y' seems to be several"),
        ("a.jsonl", '{"text": "a", "label": "x/y"}\n{"text": "a", "label": ["x", "y"]}\n', "the label 'x/y' seems"),
        ("a.csv", "text,label\na,\"['x', 'y']\"\nb,x\n", "a.csv:2: .* is one that was written as text"),
        ("a.csv", "text,label\nb,x\na,[]\n", "a.csv:3: .* is one that was written as text"),
        ("a.jsonl", '{"text": "a", "label": "[\\"x\\"]"}\n', "a.jsonl:1: .* is one that was written as text"),
    ],
)
def test_several_labels_in_one(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        Classification(MULTI).labels(read_texts(path, MULTI))


def test_a_comma_may_be_part_of_a_name(tmp_path):
    path = write(tmp_path / "a.csv", 'text,label\na,"Paris, France"\nb,Berlin; London/Dover\n')
    assert Classification(MULTI).labels(read_texts(path, MULTI)) == ["Berlin", "London/Dover", "Paris, France"]


def test_numbers_that_do_not_differ(tmp_path):
    found = read_texts(write(tmp_path / "a.csv", "text,label\na,2\nb,2.0\n"), NUMBER)
    with pytest.raises(ValueError, match=r"a\.csv: the label is 2\.0 everywhere, nothing to learn"):
        Classification(NUMBER).labels(found)


@pytest.mark.parametrize("before", ["\n", "   \n", "\r\n \r\n"])
def test_blank_lines_before_the_names_of_the_columns(tmp_path, before):
    assert texts(write(tmp_path / "a.csv", f"{before}text,label\na,b\n")) == [("a", None, "b")]


def test_quotes_are_characters_between_tabs(tmp_path):
    path = write(tmp_path / "a.tsv", 'text\tlabel\n5" nail\tx\n"a" or "b\ty\nc"\tx\r\n"d"\ty\n')
    assert texts(path) == [('5" nail', None, "x"), ('"a" or "b', None, "y"), ('c"', None, "x"), ('"d"', None, "y")]
    assert texts(write(tmp_path / "a.csv", 'text,label\n"a ""b"", c",x\n')) == [('a "b", c', None, "x")]


def test_fields_of_any_length(tmp_path):
    long, limit = "word " * 50_000, csv.field_size_limit()
    for name in ("a.csv", "a.tsv"):
        path = write(tmp_path / name, f"text,label\n{long},x\nb,y\n".replace(",", "\t" if name == "a.tsv" else ","))
        assert [text for text, *_ in texts(path)] == [long, "b"]
    assert csv.field_size_limit() == limit  # the process's own


def test_names_of_files_and_columns(tmp_path):
    for name in ("a.CSV", "a.Csv"):
        assert texts(write(tmp_path / name, "\ufeffLabel, Text \nx,a\n")) == [("a", None, "x")]
    assert texts(write(tmp_path / "a.TSV", "label\ttext\nx\ta\n")) == [("a", None, "x")]
    given = {"text": "review body", "label": "stars", "pair": "title"}
    path = write(tmp_path / "a.csv", "id,stars,title,review body,text,,\n1,5,good,very good,other,,\n")
    assert texts(path, **given) == [("very good", "good", "5")]
    path = write(tmp_path / "a.jsonl", '{"stars": 5, "title": null, "review body": "very good", "text": 7}')
    assert texts(path, **given) == [("very good", None, "5")]
    with pytest.raises(ValueError, match="must name the columns text and nothing; got"):
        texts(write(tmp_path / "a.csv", "text,label\na,x\n"), label="nothing")
    with pytest.raises(ValueError, match="must name the columns text and text_b and label; got"):
        texts(tmp_path / "a.csv", pair="text_b")
    with pytest.raises(ValueError, match="two of the columns are the same: 'a', 'a'"):
        Columns("a", "a")


@pytest.mark.parametrize("delimiter", [";", "|", "\t", ",", ":"])
def test_delimiters(tmp_path, delimiter):
    quoted = "a b" if delimiter == "\t" else f'"a{delimiter}b"'
    path = write(tmp_path / "a.txt", f"text{delimiter}label\n{quoted}{delimiter}x\nc{delimiter}y\n")
    found = read_texts(path, SINGLE, layout=Layout(delimiter))
    assert [(each.text, each.label) for each in found] == [(quoted.strip('"'), "x"), ("c", "y")]


def test_names_of_delimiters():
    names = {"tab": "\t", "TAB": "\t", "\\t": "\t", "\t": "\t", "semicolon": ";", ";": ";", "pipe": "|"}
    assert {name: as_delimiter(name) for name in names} == names
    for wrong in ("", ";;", '"', "\n", "x", "7", "colons"):
        with pytest.raises(ValueError, match="must be one character other than a quote"):
            as_delimiter(wrong)


def test_files_without_a_header(tmp_path):
    path = write(tmp_path / "a.csv", "x,a text\ny,another\n")
    found = read_texts(path, SINGLE, Columns("2", "1"), Layout(header=False))
    assert [(each.text, each.label, each.place) for each in found] == [
        ("a text", "x", f"{path}:1"), ("another", "y", f"{path}:2")]  # fmt: skip
    with pytest.raises(
        ValueError, match=r"a\.csv:1: the columns have numbers, there must be 3 and 1; got \['1', '2'\]"
    ):
        read_texts(path, SINGLE, Columns("3", "1"), Layout(header=False))


def test_json_as_lines_and_as_an_array(tmp_path):
    records = [
        {"text": f"text {i}\u2028", "label": "ab"[i % 2], "text_pair": None, "id": {"n": [i, None]}} for i in range(5)
    ]
    lines = write(tmp_path / "a.jsonl", "\n\n".join(json.dumps(record, ensure_ascii=False) for record in records))
    arrays = [write(tmp_path / f"{i}.json", json.dumps(records, indent=i or None)) for i in (0, 2)]
    arrays.append(write(tmp_path / "c.json", "\ufeff" + lines.read_text()))
    for path in (lines, *arrays):
        assert texts(path) == [(record["text"], None, record["label"]) for record in records]
    assert read_texts(arrays[1], SINGLE)[1].place == f"{arrays[1]}:13"


def test_text_pairs_may_be_missing(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a", "text_pair": null, "label": 1}\n{"text": "b", "label": 2}\n'
                 '{"text": "c", "text_pair": "d", "label": 0}\n')  # fmt: skip
    assert texts(path) == [("a", None, "1"), ("b", None, "2"), ("c", "d", "0")]
    assert texts(write(tmp_path / "a.csv", "text,text_pair,label\na,,1\nc,d,0\n")) == [
        ("a", None, "1"),
        ("c", "d", "0"),
    ]


def test_places_and_labels(tmp_path):
    path = write(tmp_path / "a.csv", '\ufefftext,label\r\n"a\r\nb",x\r\n\r\nc,y\r\n')
    assert [(each.text, each.place) for each in read_texts(path, SINGLE)] == [
        ("a\r\nb", f"{path}:2"),
        ("c", f"{path}:5"),
    ]
    path = write(tmp_path / "a.jsonl", '{"text": "a", "label": ["x", "y", "x"], "id": 7}\n{"text": "b", "label": ""}\n')
    assert [each.label for each in read_texts(path, MULTI)] == [("x", "y"), ()]
    assert [each.label for each in read_texts(write(tmp_path / "a.csv", "text,label\na,x; y;;\n"), MULTI)] == [
        ("x", "y")
    ]
    path = write(tmp_path / "a.jsonl", '{"text": "a", "label": "1e-3"}\n{"text": "b", "label": -2}\n')
    assert [each.label for each in read_texts(path, NUMBER)] == [0.001, -2.0]


def test_unknown_labels_in_the_validation_file(start, trained, tmp_path, capsys):
    strange = write(tmp_path / "dev.csv", "text,label\na,good\nb,fine\n")
    assert run(start, tmp_path / "run", trained / "train.csv", strange) == 1
    assert "dev.csv:3: the label 'fine' is not among those of the training data: bad, good" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "anchor,text\na,b\n", "the first line must name the columns anchor and positive"),
        ("a.csv", "text,text_pair\na,\n", "a.csv:2: the text is empty ('text_pair')"),
        ("a.csv", "text,text_pair,label\na,b,0\n", "the column 'label': sentence pairs have no labels"),
        (
            "a.jsonl",
            '{"anchor": "a", "positive": "b", "Score": 0.5}',
            "the column 'Score': sentence pairs have no labels",
        ),
        ("a.jsonl", '{"anchor": "a", "positive": null}', "a.jsonl:1: 'positive' must be a text, got None"),
        (
            "a.jsonl",
            '{"anchor": "a", "positive": "b"}\n{"anchor": "a"}',
            "a.jsonl:2: no 'positive'; there are 'anchor'",
        ),
        ("a.jsonl", "", "a.jsonl: no examples"),
        ("a.csv", "anchor,positive,negative\na,b,b\n", "a.csv:2: the negative is the text that belongs to it"),
    ],
)
def test_errors_in_pairs(tmp_path, name, content, message):
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError) as error:
        read_pairs(path)
    assert message in str(error.value)


def test_pairs(tmp_path):
    for header in ("text,text_pair,negative", "anchor,positive,negative"):
        path = write(tmp_path / "a.csv", f"{header}\na,b,\nc,d,e\n")
        assert [(p.text, p.text_pair, p.negative) for p in read_pairs(path)] == [("a", "b", None), ("c", "d", "e")]
    path = write(tmp_path / "a.tsv", "q\td\tscore\na\tb\t1\n")
    with pytest.raises(ValueError, match="'score'"):
        read_pairs(path, Columns(text="q", pair="d"))


def test_the_whole_way_with_other_columns(start, tmp_path, capsys):
    """A spreadsheet's export: semicolons, a BOM, capitals, other names."""
    lines = weather(tmp_path / "train.csv", 60, 0).read_text().splitlines()[1:]
    rows = [line.rsplit(",", 1) for line in lines]
    path = write(tmp_path / "export.csv", "\ufeffKommentar;Urteil\r\n" + "".join(f"{a};{b}\r\n" for a, b in rows))
    options = ("--text-column", "kommentar", "--label-column", "urteil", "--delimiter", "semicolon", "--epochs", 1)
    assert run(start, tmp_path / "run", path, path, "text-classification", *options) == 0
    assert case.metrics_of(tmp_path / "run")[0]["epoch"] == 1
    assert "60 examples" in capsys.readouterr().out
