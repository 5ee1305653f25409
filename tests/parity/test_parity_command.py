"""`minibert parity` from the outside: exit statuses, the certificate, golden files, verification."""

from __future__ import annotations

import errno
import json
import sys

import jsonschema
import pytest
import torch
from reference import TINY, twins
from safetensors.torch import load_file, save_file

from minibert.cli import main
from minibert.parity import certificate

WORDS = ["the", "cat", "sat", "on", "mat", "rain", "streets", "were", "wet", "a", "no", "yes", ".", "!", "##s"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny pretraining model with a vocabulary, as a directory."""
    directory = tmp_path_factory.mktemp("tiny")
    twins("BertForPreTraining")[1].save_pretrained(directory)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    words += [f"[unused{i}]" for i in range(TINY["vocab_size"] - len(words))]
    (directory / "vocab.txt").write_text("\n".join(words) + "\n")
    return directory


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    file = tmp_path_factory.mktemp("texts") / "texts.txt"
    file.write_text("the cat sat on the [MASK].\nrain\tthe streets were wet\nno!\n")
    return file


@pytest.fixture(scope="module")
def written(checkpoint, texts, tmp_path_factory):
    """A certificate's directory."""
    out = tmp_path_factory.mktemp("certificate")
    options = ["--path", "plain", "--texts", str(texts), "--steps", "2", "-o", str(out), "--quiet"]
    assert main(["parity", str(checkpoint), *options]) == 0
    return out


def changed(checkpoint, tmp_path, change):
    """A copy of the checkpoint with other tensors."""
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


def test_certificate_is_valid_and_says_what_was_done(written, checkpoint):
    found = json.loads((written / "certificate.json").read_text())
    jsonschema.validate(found, certificate.schema())
    predicate = found["predicate"]
    assert predicate["result"] == "PASSED"
    assert predicate["passedTests"] == [f"minibert plain float32 against transformers {_transformers()} float32: bits"]
    [each] = predicate["measurements"]["comparisons"]
    assert (each["verdict"], each["level"]) == ("same bits", "bits")
    assert {name: check["verdict"] for name, check in each["checks"].items()} == {
        "tokenizer": "same", "gradients": "same bits", "train": "same bits",
        "invariance": each["checks"]["invariance"]["verdict"],
        "invariance of the reference": each["checks"]["invariance of the reference"]["verdict"],
    }  # fmt: skip
    assert each["checks"]["invariance"]["verdict"] in ("rounding", "same bits")
    assert {"alone", "order", "twice", "padded to 41", "offset 2", "transposed"} <= set(
        each["checks"]["invariance"]["ulps"]
    )
    assert len(each["steps"]) > 40
    names = [subject["name"].partition("/")[2] for subject in found["subject"]]
    assert names == ["weights", "config.json", "vocab.txt"]
    assert str(checkpoint) in predicate["measurements"]["command"]["line"]


DELETED = object()


@pytest.mark.parametrize(
    ("where", "spoilt"),
    [
        ("_type", "https://in-toto.io/Statement/v0.1"),
        ("subject", []),
        ("subject/0/digest/sha256", "abc"),
        ("predicate", DELETED),
        ("predicate/result", "OK"),
        ("predicate/failedTests", ["that it PASSED in spite of"]),
        ("predicate/passedTests/0", 1),
        ("predicate/measurements/schema_version", 2),
        ("predicate/measurements/outputs", DELETED),
        ("predicate/measurements/command/path", DELETED),
        ("predicate/measurements/threads", {}),
        ("predicate/measurements/weights/bert.pooler.dense.bias", "A" * 64),
        ("predicate/measurements/comparisons/0/level", "same"),
        ("predicate/measurements/comparisons/0/passed", "yes"),
        ("predicate/measurements/comparisons/0/verdict", "fine"),
        ("predicate/measurements/comparisons/0/first", {}),
        ("predicate/measurements/comparisons/0/outputs/prediction_logits/max", "0"),
        ("predicate/measurements/comparisons/0/steps/5/local", DELETED),
        ("predicate/measurements/comparisons/0/steps/5/bits", None),
        ("predicate/measurements/comparisons/0/answers/prediction_logits/same", 0.5),
        ("predicate/measurements/comparisons/0/checks/train/passed", DELETED),
    ],
)
def test_a_spoilt_certificate_is_not_valid(written, where, spoilt):
    found = json.loads((written / "certificate.json").read_text())
    *path, last = (int(name) if name.isdigit() else name for name in where.split("/"))
    parent = found
    for name in path:
        parent = parent[name]
    assert last in parent or isinstance(parent, list)
    if spoilt is DELETED:
        del parent[last]
    else:
        parent[last] = spoilt
    with pytest.raises(jsonschema.ValidationError) as error:
        jsonschema.validate(found, certificate.schema())
    at = [str(each) for each in error.value.absolute_path]
    assert at == where.split("/")[: len(at)]


def test_what_a_later_version_may_add_is_valid(written):
    found = json.loads((written / "certificate.json").read_text())
    found["predicate"]["measurements"]["comparisons"][0]["steps"][0]["cosine"] = 1.0
    found["signature"] = found["predicate"]["measurements"]["weather"] = "fine"
    jsonschema.validate(found, certificate.schema())


def test_a_full_disk_leaves_what_was_there(checkpoint, texts, tmp_path, monkeypatch, capsys):
    def full(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    golden, written = tmp_path / "golden.safetensors", tmp_path / "certificate.json"
    options = ["parity", str(checkpoint), "--path", "plain", "--texts", str(texts), "--checks"]
    monkeypatch.setattr("minibert.weights.files.sync", full)
    for file, more in ((golden, ["--save", str(golden)]), (written, ["-o", str(tmp_path)])):
        file.write_text("as it was")
        assert main([*options, *more]) == 2
        assert str(file) in capsys.readouterr().err
        assert file.read_text() == "as it was"
    assert sorted(file.name for file in tmp_path.iterdir()) == [written.name, golden.name]


def _transformers():
    import transformers

    return transformers.__version__


def test_markdown_and_html_say_the_same(written):
    markdown, html = (written / "certificate.md").read_text(), (written / "certificate.html").read_text()
    for text in ("PASSED", "minibert/model.py:", "modeling_bert.py:", "attention.self.context", "none can flip"):
        assert text in markdown
        assert text in html
    assert "http://" not in html
    assert "default-src 'none'" in html.replace("&#x27;", "'")


def test_verify_says_the_same(written, capsys):
    assert main(["parity", "--verify", str(written / "certificate.json"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "holds": True, "why": "the same to the last bit", "differences": {}
    }  # fmt: skip


def test_verify_names_the_tensor_of_which_one_bit_was_flipped(written, checkpoint, tmp_path, capsys):
    name = "bert.encoder.layer.1.output.dense.weight"
    changed(checkpoint, tmp_path, lambda tensors: tensors[name].view(torch.int32)[0, 0].bitwise_xor_(1))
    assert main(["parity", str(tmp_path), "--verify", str(written / "certificate.json")]) == 1
    said = capsys.readouterr().out
    assert "weights changed" in said
    assert f"weights: {name}\n" in said


def test_verify_names_the_text_that_was_changed(written, texts, tmp_path, capsys):
    other = tmp_path / "texts.txt"
    other.write_text(texts.read_text().replace("streets", "street"))
    command = ["parity", "--verify", str(written / "certificate.json"), "--texts", str(other)]
    assert main(command) == 1
    assert "texts: text 2\n" in capsys.readouterr().out


def test_verify_names_one_thread_more(written, capsys):
    main(["parity", "--verify", str(written / "certificate.json"), "--threads", "2"])
    torch.set_num_threads(1)
    assert "threads: threads was 1, is 2" in capsys.readouterr().out


def test_what_differs_is_explained():
    measured = {group: {} for group in (*certificate.SUBJECTS, *certificate.FACTS)}
    measured |= {"outputs": {"plain, case": "0"}, "hardware": {"flags": ["avx", "avx2"]}}
    then = {"predicate": {"measurements": measured}}
    now = json.loads(json.dumps(then))
    now["predicate"]["measurements"]["outputs"]["plain, case"] = "1"
    found = certificate.differences(then, now)
    assert certificate.verdict(found) == (False, "results differ: nothing that is recorded explains it")
    now["predicate"]["measurements"]["hardware"]["flags"].append("avx512f")
    found = certificate.differences(then, now)
    assert found["hardware"] == ["flags was [], is ['avx512f']"]
    assert certificate.verdict(found) == (False, "results differ: hardware may explain it")


def test_golden_files_need_no_peer(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    golden = str(tmp_path / "golden.safetensors")
    base = ["parity", str(checkpoint), "--path", "plain"]
    assert main([*base, "--save", golden, "--against", golden]) == 0
    assert "same bits" in capsys.readouterr().out
    assert main([*base, "--against", "transformers"]) == 2
    assert "pip install 'minibert-torch[parity]'" in capsys.readouterr().err
    tensors = load_file(golden)
    tensors["3.prediction_logits"][0, 0] += 1e-3
    save_file(tensors, golden)
    assert main([*base, "--against", golden]) == 1
    assert "bug" in capsys.readouterr().out
    tensors["3.prediction_logits"][0, 0, 0] = float("nan")
    save_file(tensors, golden)
    assert main([*base, "--against", golden, "--require", "answers"]) == 1
    assert "NaN or Inf on one side only" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_golden_masks_of_any_type_are_inputs(checkpoint, tmp_path, dtype):
    import minibert

    ids = torch.tensor([[2, 5, 6, 3], [2, 7, 3, 0]])
    model = minibert.BertForPreTraining.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        found = model(ids, attention_mask=(ids > 0).long())
    tensors = {"0.input_ids": ids, "0.attention_mask": (ids > 0).to(dtype), "0.prediction_logits": found[0]}
    save_file({name: x.contiguous() for name, x in tensors.items()}, tmp_path / "golden.safetensors")
    command = ["parity", str(checkpoint), "--path", "plain", "--against", str(tmp_path / "golden.safetensors")]
    assert main([*command, "--require", "bits"]) == 0


def test_golden_lines_of_json(checkpoint, tmp_path):
    import minibert

    directory = tmp_path / "mlm"
    model = minibert.BertForMaskedLM.from_pretrained(checkpoint)
    model.save_pretrained(directory)
    file = tmp_path / "golden.jsonl"
    with torch.no_grad():
        rows = [{"prompt": "", "tokens": ids, "logits": model(torch.tensor([ids])).logits[0].tolist()}
                for ids in ([2, 5, 3], [2, 6, 7, 8, 9, 3])]  # fmt: skip
    file.write_text("\n".join(map(json.dumps, rows)))
    command = ["parity", str(directory), "--path", "plain", "--against", str(file), "--require", "bits"]
    assert main(command) == 0
    file.write_text('{"tokens": [1, 2]}')
    assert main(command) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([__file__], "test_parity_command.py"),
        (["--against", "nothing"], "--against nothing: is no file and none of transformers"),
        (["--texts", "absent.txt"], "absent.txt"),
        (["--threads", "0"], "--threads 0: must be 1 or more"),
        (["--path", "plain", "--dtype", "int8"], "--dtype int8 is computed by --path fast alone"),
        (["--head", "head"], "head='head': must be one of"),
        (["--head", "question-answering"], "qa_outputs"),
        (["--verify", "absent.json"], "absent.json"),
    ],
)
def test_trouble_is_status_2(checkpoint, options, said, capsys):
    model = [] if options[0] == __file__ else [str(checkpoint)]
    assert main(["parity", *model, *options]) == 2
    assert said in capsys.readouterr().err


def test_what_is_no_certificate_is_trouble(tmp_path, capsys):
    file = tmp_path / "certificate.json"
    measured = '{"predicate": {"measurements": {"schema_version": %d}}}'
    for content in ("{", "[]", "{}", measured % 99, measured % 1):
        file.write_text(content)
        assert main(["parity", "--verify", str(file)]) == 2
        assert str(file) in capsys.readouterr().err
    with pytest.raises(SystemExit) as status:
        main(["parity", "--dtype", "float13"])
    assert status.value.code == 2


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({}, ""),
        ({"do_lower_case": False}, "text 1 differs in input_ids at piece 1: ['[UNK]'] and ['a']"),
        ({"strip_accents": False}, "text 7 differs in input_ids"),
        ({"tokenize_chinese_chars": False}, "text 8 differs in input_ids"),
        ({"truncation_side": "left"}, "differs in input_ids at piece 1"),
        ({"sep_token": "[CLS]"}, "text 1 differs in input_ids at piece 2: ['[CLS]'] and ['[SEP]']"),
    ],
)
def test_a_fault_of_the_tokenizer_is_a_bug(tmp_path, fault, said):
    import transformers

    from minibert.parity import checks, inputs
    from minibert.text.tokenizer import BertTokenizer

    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz.!?é東京近"]
    pieces += [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyzé京"]
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n")
    theirs = transformers.BertTokenizer.from_pretrained(tmp_path)
    found = checks.tokenizers(BertTokenizer.from_pretrained(tmp_path, **fault), theirs, inputs.TEXTS, 512)
    assert found["verdict"] == ("bug" if fault else "same"), found
    assert said in found["summary"]
    assert found["passed"] is not bool(fault)
