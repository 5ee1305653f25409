"""embed_file and `minibert embed`: whole results, after any interruption too."""

from __future__ import annotations

import gzip
import io
import json
import lzma
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from reference import rounding

import minibert
from minibert import SentenceEncoder, cli
from minibert.embedding import embed_file, files

TINY = {"vocab_size": 30522, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": 64, "initializer_range": 0.3}  # fmt: skip
LINES = [f"line {i} {'of many words ' * (i % 13)}" for i in range(1000)] + ["", "the last, without a line's end"]


@pytest.fixture(scope="module")
def model_dir(minilm_dir, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    minibert.BertModel(minibert.BertConfig(**TINY)).save_pretrained(directory)
    minibert.BertTokenizer(minilm_dir / "vocab.txt").save_pretrained(directory)
    return directory


@pytest.fixture
def encoder(model_dir) -> SentenceEncoder:
    return SentenceEncoder.from_pretrained(model_dir)


@pytest.fixture
def source(tmp_path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_bytes("\n".join(LINES).encode())
    return path


@pytest.fixture(autouse=True)
def save_at_once(monkeypatch):
    monkeypatch.setattr(files, "_SAVE_EVERY", 0)


def left(output: Path) -> list[str]:
    """What an unfinished run has left behind."""
    return sorted(path.name for path in output.parent.glob(f"{output.name}.*"))


def check(output: Path, encoder: SentenceEncoder, lines: list[str], **options) -> None:
    rows = np.load(output, mmap_mode="r")
    assert rows.dtype == np.float32
    assert rows.shape == (len(lines), 32)
    within = 4 * rounding(encoder.plain)  # of a token's state, of which a row is a mean: batches differ in size
    assert np.abs(rows - encoder.encode(lines, **options)).max() <= within
    assert not left(output)


def stop_at(encoder: SentenceEncoder, call: int, error: BaseException) -> None:
    """Let the encoder raise in its call of this number, and work again afterwards."""
    whole, calls = encoder.embed, []

    def embed(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            encoder.embed = whole
            raise error
        return whole(*arguments)

    encoder.embed = embed


def test_a_row_for_each_line(encoder, source, tmp_path):
    done = embed_file(encoder, source, tmp_path / "out.npy")
    assert (done.texts, done.dimension, done.resumed, done.truncated) == (len(LINES), 32, 0, 0)
    check(tmp_path / "out.npy", encoder, LINES)
    embed_file(encoder, source, tmp_path / "out.npy", normalize=True, prompt="a ")  # takes the place of the first
    check(tmp_path / "out.npy", encoder, LINES, normalize=True, prompt="a ")


def test_windows_lines_and_a_mark_at_the_beginning(encoder, tmp_path):
    (tmp_path / "texts.txt").write_bytes("\ufeffone\r\ntwo\r\n".encode())
    embed_file(encoder, tmp_path / "texts.txt", tmp_path / "out.npy")
    check(tmp_path / "out.npy", encoder, ["one", "two"])


def test_an_empty_file(encoder, tmp_path):
    (tmp_path / "texts.txt").touch()
    assert embed_file(encoder, tmp_path / "texts.txt", tmp_path / "out.npy").texts == 0
    assert np.load(tmp_path / "out.npy").shape == (0, 32)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_run_goes_on(error, encoder, source, tmp_path):
    output = tmp_path / "out.npy"
    output.write_bytes(b"what was there before")
    stop_at(encoder, 3, error())
    with pytest.raises(error):
        embed_file(encoder, source, output)
    assert output.read_bytes() == b"what was there before"
    assert left(output) == ["out.npy.partial", "out.npy.progress"]
    assert np.load(tmp_path / "out.npy.partial").shape == (512, 32)
    assert embed_file(encoder, source, output).resumed == 512
    check(output, encoder, LINES)


def test_rows_that_no_state_speaks_of_are_computed_again(encoder, source, tmp_path):
    """A kill between the writing of rows and of the state."""
    stop_at(encoder, 2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        embed_file(encoder, source, tmp_path / "out.npy")
    with open(tmp_path / "out.npy.partial", "ab") as partial:
        partial.write(b"half a row")
    assert embed_file(encoder, source, tmp_path / "out.npy").resumed == 256
    check(tmp_path / "out.npy", encoder, LINES)


@pytest.mark.slow
def test_a_killed_command_goes_on(encoder, model_dir, tmp_path):
    source, output = tmp_path / "texts.txt", tmp_path / "out.npy"
    lines = LINES * 25
    source.write_text("\n".join(lines))
    command = [sys.executable, "-m", "minibert", "embed", source, "--model", model_dir, "-o", output]
    process = subprocess.Popen(command, cwd=Path(minibert.__file__).parents[1])
    state = tmp_path / "out.npy.progress"
    while process.poll() is None and not (state.exists() and json.loads(state.read_text())["lines"]):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not output.exists()
    assert 0 < embed_file(encoder, source, output).resumed < len(lines)
    check(output, encoder, lines)


def interrupted(encoder: SentenceEncoder, source: Path, output: Path) -> None:
    stop_at(encoder, 2, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        embed_file(encoder, source, output)


def test_unfinished_work_of_other_settings_is_refused(encoder, source, tmp_path):
    output = tmp_path / "out.npy"
    interrupted(encoder, source, output)
    with pytest.raises(ValueError, match=r"another prompt and normalize: delete .*out.npy.progress"):
        embed_file(encoder, source, output, normalize=True, prompt="a")
    encoder.max_seq_length = 9
    with pytest.raises(ValueError, match="another max_seq_length"):
        embed_file(encoder, source, output)
    encoder.max_seq_length = 64
    assert embed_file(encoder, source, output, batch_size=5).resumed == 256


def test_unfinished_work_of_another_model_is_refused(encoder, source, tmp_path):
    interrupted(encoder, source, tmp_path / "out.npy")
    other = minibert.BertModel(minibert.BertConfig(**TINY))
    with pytest.raises(ValueError, match="another model"):
        embed_file(SentenceEncoder(minibert.optimize(other), encoder.tokenizer), source, tmp_path / "out.npy")


def test_unfinished_work_of_another_input_is_refused(encoder, source, tmp_path):
    interrupted(encoder, source, tmp_path / "out.npy")
    source.write_text("\n".join(["changed", *LINES[1:]]))
    with pytest.raises(ValueError, match="first 256 lines of the input are not those"):
        embed_file(encoder, source, tmp_path / "out.npy")
    source.write_text("\n".join([*LINES, "one more"]))  # behind what was read: fine
    embed_file(encoder, source, tmp_path / "out.npy")
    check(tmp_path / "out.npy", encoder, [*LINES, "one more"])


@pytest.mark.parametrize("damage", ["{", "{}", '{"lines": 99999, "settings": {}}'])
def test_a_damaged_state_is_told(damage, encoder, source, tmp_path):
    interrupted(encoder, source, tmp_path / "out.npy")
    (tmp_path / "out.npy.progress").write_text(damage)
    with pytest.raises(ValueError, match=r"out.npy.progress is damaged .*: delete it to begin anew"):
        embed_file(encoder, source, tmp_path / "out.npy")


@pytest.mark.parametrize("packed", [gzip, lzma])
def test_packed_files(packed, encoder, tmp_path):
    source, output = tmp_path / ("texts.GZ" if packed is gzip else "texts.xz"), tmp_path / "out.npy"
    content = packed.compress("\n".join(LINES).encode())
    source.write_bytes(content[:-20])
    with pytest.raises(ValueError, match="what is packed is damaged after line"):
        embed_file(encoder, source, output)
    source.write_bytes(content)
    assert embed_file(encoder, source, output).texts == len(LINES)
    check(output, encoder, LINES)
    interrupted(encoder, source, output)
    assert embed_file(encoder, source, output).resumed == 256
    check(output, encoder, LINES)


@pytest.mark.slow
def test_processes_and_an_interruption(encoder, source, tmp_path):
    """Rows in order, and what was cut is counted in the processes too; a line that is no text loses nothing."""
    output = tmp_path / "out.npy"
    source.write_bytes(source.read_bytes() + b"\n" + b"long " * 100 + b"\ncaf\xe9")
    with pytest.raises(ValueError, match=f"line {len(LINES) + 2} is not UTF-8"):
        embed_file(encoder, source, output, processes=2, batch_size=16)
    source.write_bytes(source.read_bytes()[:-4])
    done = embed_file(encoder, source, output, processes=2)
    assert (done.resumed, done.truncated) == (len(LINES) + 1, 1)
    check(output, encoder, [*LINES, "long " * 100])
    with pytest.raises(ValueError, match="processes must be a whole number"):
        embed_file(encoder, source, output, processes=0)


@pytest.mark.parametrize("bytes_left", [0, 100, 128, 128 + 4 * 32 * 255, 128 + 4 * 32 * 256 - 1])
def test_rows_that_were_cut_are_not_taken_for_zeros(bytes_left, encoder, source, tmp_path):
    interrupted(encoder, source, tmp_path / "out.npy")
    os.truncate(tmp_path / "out.npy.partial", bytes_left)
    with pytest.raises(ValueError, match=r"out.npy.progress is damaged .*: delete it to begin anew"):
        embed_file(encoder, source, tmp_path / "out.npy")
    (tmp_path / "out.npy.progress").unlink()
    embed_file(encoder, source, tmp_path / "out.npy")
    check(tmp_path / "out.npy", encoder, LINES)


def test_rows_of_another_array_are_not_gone_on_with(encoder, source, tmp_path):
    interrupted(encoder, source, tmp_path / "out.npy")
    for other in (np.zeros((256, 31), np.float32), np.zeros((255, 40), np.float32), np.zeros((999, 32), np.float64)):
        np.save(tmp_path / "other.npy", other)
        os.replace(tmp_path / "other.npy", tmp_path / "out.npy.partial")
        with pytest.raises(ValueError, match="does not hold rows of 32 numbers"):
            embed_file(encoder, source, tmp_path / "out.npy")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_other_encodings_are_refused(encoding, encoder, tmp_path):
    (tmp_path / "texts.txt").write_bytes("one\ntwo\n".encode(encoding))
    with pytest.raises(ValueError, match="line 1 is not UTF-8"):
        embed_file(encoder, tmp_path / "texts.txt", tmp_path / "out.npy")


@pytest.mark.parametrize("ending", ["\n", "\r\n", "\r\r\n"])
def test_lines_are_the_same_whoever_counts_them(ending, encoder, tmp_path):
    """Others take a carriage return for a line's end: from there on their lines would not be our rows."""
    source, output = tmp_path / "texts.txt", tmp_path / "out.npy"
    source.write_bytes(ending.join(["one", "two", "three"]).encode())
    assert embed_file(encoder, source, output).texts == 3
    check(output, encoder, ["one", "two", "three"])
    source.write_bytes(ending.join(["one", "two\rthree", "four"]).encode())
    with pytest.raises(ValueError, match="line 2 has a carriage return in it"):
        embed_file(encoder, source, output)


def test_a_line_that_is_no_text_loses_nothing(encoder, tmp_path):
    source, output = tmp_path / "texts.txt", tmp_path / "out.npy"
    lines = [line.encode() for line in LINES[:600]]
    source.write_bytes(b"\n".join([*lines, b"caf\xe9", b"more"]))
    with pytest.raises(ValueError, match="line 601 is not UTF-8"):
        embed_file(encoder, source, output)
    source.write_bytes(b"\n".join([*lines, "café".encode(), b"more"]))
    assert embed_file(encoder, source, output).resumed == 600
    check(output, encoder, [*LINES[:600], "café", "more"])


def test_one_process_at_a_time(encoder, source, tmp_path):
    """Each would cut off what the other has written."""
    output = tmp_path / "out.npy"
    whole, refused = encoder.embed, []

    def embed(*arguments):
        with pytest.raises(ValueError, match="is being written by another process") as raised:
            embed_file(encoder, source, output)
        refused.append(raised)
        return whole(*arguments)

    encoder.embed = embed
    embed_file(encoder, source, output)
    encoder.embed = whole
    assert refused
    check(output, encoder, LINES)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.npy", "texts.txt"]


def test_a_link_stays_one(encoder, source, tmp_path):
    output, target = tmp_path / "out.npy", tmp_path / "elsewhere" / "vectors.npy"
    target.parent.mkdir()
    output.symlink_to(target)
    stop_at(encoder, 3, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        embed_file(encoder, source, output)
    assert left(target) == ["vectors.npy.partial", "vectors.npy.progress"]
    assert embed_file(encoder, source, output).resumed > 0
    assert output.is_symlink()
    check(target, encoder, LINES)
    assert [path.name for path in target.parent.iterdir()] == ["vectors.npy"]


@pytest.mark.parametrize("size", [4096, 8192, 65536, 1 << 17])
def test_a_full_disk_costs_what_was_not_written(size, encoder, source, small_disk):
    output = small_disk(size) / "out.npy"
    with pytest.raises(OSError, match=r"No space left on device: '.*/out\.npy\.(partial|progress)'"):
        embed_file(encoder, source, output)
    assert not output.exists()
    small_disk(1 << 20)
    done = embed_file(encoder, source, output)
    assert (done.resumed > 0) == (size > 40_000)
    check(output, encoder, LINES)


def test_wrong_places(encoder, source, tmp_path):
    with pytest.raises(ValueError, match="is the input"):
        embed_file(encoder, source, source)
    with pytest.raises(ValueError, match="is a directory"):
        embed_file(encoder, source, tmp_path)
    os.mkfifo(tmp_path / "pipe")  # or a device, whose place the finished file would take
    with pytest.raises(ValueError, match="pipe is no ordinary file"):
        embed_file(encoder, source, tmp_path / "pipe")
    assert (tmp_path / "pipe").is_fifo()
    with pytest.raises(FileNotFoundError, match="nobody"):
        embed_file(encoder, tmp_path / "nobody.txt", tmp_path / "out.npy")
    for nowhere in ("none", "texts.txt"):
        with pytest.raises(FileNotFoundError, match=f"there is no directory .*{nowhere}"):
            embed_file(encoder, source, tmp_path / nowhere / "out.npy")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pipe", "texts.txt"]


# The command


def embed(*arguments: object) -> int:
    return cli.main(["embed", *map(str, arguments)])


def test_the_command_says_what_was_cut(encoder, model_dir, tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("short\n" + "long " * 100 + "\n")
    assert embed(tmp_path / "texts.txt", "--model", model_dir, "-o", tmp_path / "out.npy", "--normalize") == 0
    output = capsys.readouterr()
    assert "2 texts, 32 numbers each" in output.out
    assert "1 text had more than 64 tokens and was cut" in output.err
    check(tmp_path / "out.npy", encoder, ["short", "long " * 100], normalize=True)


def test_the_command_on_standard_input(encoder, model_dir, source, tmp_path, capsys, monkeypatch):
    def standard_input(content: bytes) -> None:
        read, write = os.pipe()
        os.write(write, content)
        os.close(write)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(os.fdopen(read, "rb")))

    standard_input(b"one\ntwo\n")
    assert embed("-", "--model", model_dir, "-o", tmp_path / "out.npy") == 0
    assert "cannot be resumed" in capsys.readouterr().err
    check(tmp_path / "out.npy", encoder, ["one", "two"])
    interrupted(encoder, source, tmp_path / "out.npy")
    standard_input(b"one\ntwo\n")
    assert embed("-", "--model", model_dir, "-o", tmp_path / "out.npy") == 1
    assert "unfinished work on a file" in capsys.readouterr().err


def test_the_command_after_an_interruption(encoder, model_dir, source, tmp_path, capsys, monkeypatch):
    stop_at(encoder, 2, KeyboardInterrupt())
    monkeypatch.setattr(files.SentenceEncoder, "from_pretrained", lambda *_, **__: encoder)
    arguments = (source, "--model", model_dir, "-o", tmp_path / "out.npy")
    assert embed(*arguments) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    assert embed(*arguments) == 0
    output = capsys.readouterr()
    assert "going on" in output.err
    assert f"{len(LINES)} texts, 256 of them from before" in output.out


def test_the_command_by_default_and_in_json(tmp_path, capsys):
    (tmp_path / "texts.txt").write_text("one\ntwo\n")
    options = ("-o", tmp_path / "out.npy", "--json", "--quiet", "--batch-size", "1", "--device", "cpu")
    assert embed(tmp_path / "texts.txt", *options) == 0
    output = capsys.readouterr()
    result = json.loads(output.out)
    rows = np.load(tmp_path / "out.npy")
    assert (result["output"], result["texts"], result["dimension"]) == (str(tmp_path / "out.npy"), *rows.shape)
    assert "minibert-english" in result["model"]
    assert "not to tell texts apart" in output.err
    encoder = SentenceEncoder.from_pretrained(result["model"], device="cpu")
    assert np.abs(rows - encoder.encode(["one", "two"])).max() <= 4 * rounding(encoder.plain)


def test_the_command_names_what_is_wrong(model_dir, source, tmp_path, capsys):
    assert embed(source, "--model", model_dir, "-o", tmp_path / "out.npy", "--prompt-name", "nobody") == 1
    assert "prompt_name='nobody'" in capsys.readouterr().err
    assert embed(source, "--model", tmp_path / "nothing", "-o", tmp_path / "out.npy") == 1
    assert "no such directory" in capsys.readouterr().err
    for option, value, said in [
        ("--device", "gpu", "device='gpu'"),
        ("--batch-size", "0", "batch_size must be a whole number"),
        ("--processes", "-1", "processes must be a whole number"),
    ]:
        assert embed(source, "--model", model_dir, "-o", tmp_path / "out.npy", option, value) == 1
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith("minibert: ")
        assert said in line
