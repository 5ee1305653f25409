"""hub.py: the real huggingface_hub client against a Hub on this machine; directories; all-or-nothing saving."""

from __future__ import annotations

import fcntl
import json
import os
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import huggingface_hub
import pytest
import torch
from hub_server import Fault, LocalHub
from huggingface_hub import constants

from minibert import BertConfig, BertModel
from minibert.weights import hub, saving
from minibert.weights.files import locked

WEIGHTS = bytes(range(256)) * 64  # large enough for the storage server
FILES = {"config.json": b'{"model_type": "bert"}', "model.safetensors": WEIGHTS, "pytorch_model.bin": b"never" * 2000}


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[LocalHub]:
    """A Hub with one model, and a client that knows no other and has an empty cache."""
    local = LocalHub()
    local.repo("google-bert/bert-base-uncased", FILES)
    local.aliases["bert-base-uncased"] = "google-bert/bert-base-uncased"
    monkeypatch.setattr(constants, "ENDPOINT", local.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", local.url + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)  # between attempts
    huggingface_hub.close_session()
    yield local
    local.stop()


def in_cache(tmp_path: Path) -> set[str]:
    """Names of all files in the cache, without what marks locks, references and absent files."""
    snapshots = (tmp_path / "cache").glob("models--*/snapshots/*/*")
    blobs = (tmp_path / "cache").glob("models--*/blobs/*")
    return {path.name for path in snapshots} | {f"blob of {path.stat().st_size}" for path in blobs}


def test_one_format_is_downloaded(server: LocalHub, tmp_path: Path) -> None:
    (weights,) = hub.fetch_weights("google-bert/bert-base-uncased")
    assert weights.name == "model.safetensors"
    assert weights.read_bytes() == WEIGHTS
    assert in_cache(tmp_path) == {"model.safetensors", f"blob of {len(WEIGHTS)}"}


def test_an_alias_is_followed(server: LocalHub) -> None:
    path = hub.fetch("bert-base-uncased", "config.json")
    assert path is not None
    assert path.read_bytes() == FILES["config.json"]


def test_absent_file_is_none(server: LocalHub) -> None:
    assert hub.fetch("bert-base-uncased", "vocab.txt") is None


def test_bin_where_there_is_nothing_else(server: LocalHub) -> None:
    server.repo("old/model", {"config.json": b"{}", "pytorch_model.bin": WEIGHTS})
    assert [path.name for path in hub.fetch_weights("old/model")] == ["pytorch_model.bin"]


def test_shards(server: LocalHub) -> None:
    index = {"weight_map": {"a": "model-00002-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"}}
    files = {"model.safetensors.index.json": json.dumps(index).encode()}
    repo = server.repo("big/model", {**files, **dict.fromkeys(index["weight_map"].values(), WEIGHTS)})
    assert [path.name[:11] for path in hub.fetch_weights("big/model")] == ["model-00001", "model-00002"]
    repo.commit({**files, "model-00001-of-00002.safetensors": WEIGHTS})
    with pytest.raises(FileNotFoundError, match="model-00002-of-00002"):
        hub.fetch_weights("big/model")


def load(name: str, **where: object) -> None:
    """What from_pretrained asks for, and a file that is not there."""
    source = hub.Source(name, **where)
    assert source.file("config.json") is not None
    assert source.weights()
    assert source.file("vocab.txt") is None


def test_second_load_makes_one_request(server: LocalHub) -> None:
    load("google-bert/bert-base-uncased")
    server.requests.clear()
    load("google-bert/bert-base-uncased")
    assert server.bodies("HEAD") == ["config.json"]  # is there a newer commit?
    assert server.bodies("GET") == []


@pytest.mark.parametrize("how", ["local_files_only", "HF_HUB_OFFLINE", "commit"])
def test_second_load_without_requests(server: LocalHub, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    load("bert-base-uncased", revision=None)
    commit = server.repos["google-bert/bert-base-uncased"].refs["main"]
    server.requests.clear()
    if how == "HF_HUB_OFFLINE":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    load("bert-base-uncased", local_files_only=how == "local_files_only", revision=commit if how == "commit" else None)
    assert server.requests == []


def test_offline_without_a_cache(server: LocalHub) -> None:
    with pytest.raises(FileNotFoundError, match=r"'bert-base-uncased' is not in the cache.*offline"):
        hub.fetch("bert-base-uncased", "config.json", local_files_only=True)
    assert server.requests == []


def test_revision(server: LocalHub) -> None:
    repo = server.repos["google-bert/bert-base-uncased"]
    first = repo.refs["main"]
    repo.commit({"config.json": b"newer"})
    repo.commit({"config.json": b"tagged"}, ref="v1")
    repo.commit({"config.json": b"proposed"}, ref="refs/pr/1")

    def content(revision: str | None) -> bytes:
        return hub.fetch("bert-base-uncased", "config.json", revision=revision).read_bytes()

    assert content(None) == b"newer"
    assert content("v1") == b"tagged"
    assert content("refs/pr/1") == b"proposed"
    assert content(first) == FILES["config.json"]
    with pytest.raises(FileNotFoundError, match="no revision 'v9'"):
        content("v9")


def test_all_files_are_of_one_commit(server: LocalHub) -> None:
    source = hub.Source("bert-base-uncased")
    config = source.file("config.json")
    server.repos["google-bert/bert-base-uncased"].commit({"config.json": b"newer", "model.safetensors": b"newer"})
    (weights,) = source.weights()
    assert weights.parent == config.parent
    assert weights.read_bytes() == WEIGHTS


def test_token_goes_to_the_hub_and_nowhere_else(server: LocalHub) -> None:
    server.repo("my/private", FILES, private=True)
    with pytest.raises(FileNotFoundError, match="'my/private' is neither a directory here nor a model.*private"):
        hub.fetch_weights("my/private", token=False)
    server.requests.clear()
    hub.fetch_weights("my/private", token=server.token)
    seen = {("storage" if path.count("/") == 1 else "hub", auth) for _, path, auth, _ in server.requests}
    assert seen == {("hub", f"Bearer {server.token}"), ("storage", None)}


@pytest.mark.parametrize("token", [False, "hf_wrong"])
def test_gated(server: LocalHub, token: str | bool) -> None:
    server.repo("meta/gated", FILES, gated=True)
    with pytest.raises(PermissionError, match="'meta/gated'.*gated.*ask for access"):
        hub.fetch("meta/gated", "config.json", token=token)
    assert hub.fetch("meta/gated", "config.json", token=server.token) is not None


def test_no_such_model(server: LocalHub) -> None:
    with pytest.raises(FileNotFoundError, match="'bert-bsae' is neither a directory here nor a model"):
        hub.fetch("bert-bsae", "config.json", token=False)


@pytest.mark.parametrize("status", [429, 500, 503])
@pytest.mark.parametrize("method", ["HEAD", "GET"])
def test_server_errors(server: LocalHub, tmp_path: Path, method: str, status: int) -> None:
    server.faults.append(Fault(method=method, times=1000, status=status))
    with pytest.raises(ConnectionError, match=rf"'bert-base-uncased'.*could not be fetched.*{status}"):
        hub.fetch_weights("bert-base-uncased")
    assert in_cache(tmp_path) == set()
    server.faults.clear()
    assert hub.fetch_weights("bert-base-uncased")[0].read_bytes() == WEIGHTS


def test_server_errors_that_pass(server: LocalHub) -> None:
    server.faults += [Fault(method="HEAD", status=500, times=2), Fault(status=429)]
    assert hub.fetch_weights("bert-base-uncased")[0].read_bytes() == WEIGHTS


def test_server_down(server: LocalHub) -> None:
    load("bert-base-uncased")
    server.stop()
    huggingface_hub.close_session()
    load("bert-base-uncased")  # from the cache
    with pytest.raises(ConnectionError, match="'bert-large-uncased'.*could not be fetched"):
        hub.fetch("bert-large-uncased", "config.json")


@pytest.mark.parametrize("name", ["bert-base-uncased", "google-bert/bert-base-uncased"])
def test_a_cached_model_while_connections_break(server: LocalHub, name: str) -> None:
    """As when no connection can be made at all, and as when the Hub answers with status 500."""
    load(name)
    server.faults += [Fault(method=method, times=1000, reset=True) for method in ("HEAD", "GET")]
    load(name)
    with pytest.raises(ConnectionError, match="'bert-large-uncased' is no directory here.*could not be fetched"):
        hub.fetch("bert-large-uncased", "config.json")


def test_a_name_that_cannot_be_asked_for(server: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both facts, and at once: no attempt is repeated."""
    (tmp_path / "reviews" / "model").mkdir(parents=True)
    (tmp_path / "reviews" / "model" / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    server.stop()
    huggingface_hub.close_session()
    slept: list[float] = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", slept.append)
    expected = r"'revews/model' is no directory here \(did you mean 'reviews/model'\?\).*could not be fetched from http"
    with pytest.raises(ConnectionError, match=expected):
        hub.fetch("revews/model", "config.json")
    with pytest.raises(FileNotFoundError, match=r"offline.*nor is it a directory here \(did you mean 'reviews/model'"):
        hub.fetch("reviews/modle", "config.json", local_files_only=True)
    with pytest.raises(FileNotFoundError, match=r"no such directory: .*did you mean 'reviews/model'"):
        hub.fetch("./reviws/model", "config.json")
    assert slept == []


def test_a_folder_of_models_hints_at_them(tmp_path: Path) -> None:
    (tmp_path / "rv" / "model").mkdir(parents=True)
    (tmp_path / "rv" / "model" / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"has no weights.*did you mean '.*rv/model'\?"):
        hub.fetch_weights(tmp_path / "rv")
    with pytest.raises(ValueError, match=r"has no config.json.*did you mean '.*rv/model'\?"):
        BertModel.from_pretrained(tmp_path / "rv")


def test_interrupted_download_is_resumed(server: LocalHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    server.faults.append(Fault(cut=10_000))
    assert hub.fetch_weights("bert-base-uncased")[0].read_bytes() == WEIGHTS
    assert "bytes=10000-" in [wanted for *_, wanted in server.requests]


def test_truncated_download(server: LocalHub, tmp_path: Path) -> None:
    server.faults.append(Fault(cut=0, times=1000))
    with pytest.raises(ConnectionError, match=r"model\.safetensors.*could not be fetched"):
        hub.fetch_weights("bert-base-uncased")
    assert in_cache(tmp_path) == set()


@pytest.mark.parametrize("filename", ["config.json", "model.safetensors"])
def test_damaged_download(server: LocalHub, tmp_path: Path, filename: str) -> None:
    server.faults.append(Fault(flip=True))
    with pytest.raises(OSError, match=rf"{filename} arrived damaged.*try again"):
        hub.fetch("bert-base-uncased", filename)
    assert in_cache(tmp_path) == set()
    assert hub.fetch("bert-base-uncased", filename).read_bytes() == FILES[filename]


def test_environment(tmp_path: Path) -> None:
    """HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE, which are read when a process starts; progress on a terminal."""
    local = LocalHub()
    local.repo("google-bert/bert-base-uncased", FILES)
    code = "from minibert.weights import hub; print(*hub.fetch_weights('google-bert/bert-base-uncased'))"

    def run(**variables: str) -> tuple[str, str]:
        home = {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": local.url, "NO_PROXY": "*"}
        master, terminal = os.openpty()
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 25, 100, 0, 0))
        command, env = [sys.executable, "-c", code], {**os.environ, **home, **variables}
        output = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=terminal, text=True).stdout
        os.close(terminal)
        shown = b""
        with suppress(OSError):  # how Linux says that nobody writes to the terminal any more
            while chunk := os.read(master, 65536):
                shown += chunk
        return output, shown.decode()

    assert run(HF_HUB_OFFLINE="1")[0] == ""
    assert local.requests == []
    first, shown = run()
    assert str(tmp_path / "home" / "hub") in first
    assert "100%" in shown
    local.stop()
    assert run(HF_HUB_OFFLINE="1")[0] == first


# Directories and bundled models


def test_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert hub.fetch(tmp_path, "config.json") == tmp_path / "config.json"
    assert hub.fetch(str(tmp_path), "vocab.txt") is None
    with pytest.raises(FileNotFoundError, match=r"no weights: looked for model.safetensors.*\['config.json'\]"):
        hub.fetch_weights(tmp_path)


def test_bundled_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "_MODELS", tmp_path)
    with pytest.raises(ValueError, match="no model is bundled"):
        hub.default_model()
    (tmp_path / "minibert-tiny").mkdir()
    (tmp_path / "minibert-tiny" / "config.json").write_text("{}")
    assert hub.bundled_models() == ["minibert-tiny"]
    assert hub.fetch("minibert-tiny", "config.json") == tmp_path / "minibert-tiny" / "config.json"
    assert hub.fetch(hub.default_model(), "config.json") == tmp_path / "minibert-tiny" / "config.json"


def test_bundled_model_is_stored_in_half_precision_and_opened_in_single(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(hub, "_MODELS", tmp_path)
    model = BertModel(BertConfig.named("tiny", vocab_size=50)).half()
    for directory in (tmp_path / "bundled", tmp_path / "elsewhere" / "own"):
        model.save_pretrained(directory)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere" / "link").symlink_to(tmp_path / "bundled")
    spellings = ("bundled", hub.default_model(), "./bundled", "elsewhere/../bundled", "elsewhere/link", Path("bundled"))
    for name in spellings:
        assert BertModel.from_pretrained(name).dtype == torch.float32
        assert BertModel.from_pretrained(name, dtype="auto").dtype == torch.float16
    assert BertModel.from_pretrained(tmp_path / "elsewhere" / "own").dtype == torch.float16


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("", ValueError, "empty"),
        (None, TypeError, "string or a path"),
        ("./nowhere", FileNotFoundError, "no such directory"),
        (Path("nowhere"), FileNotFoundError, "no such directory"),
        ("a/b/c", FileNotFoundError, "no such directory"),
        ("white space", ValueError, "cannot be a name on the Hub"),
        (__file__, NotADirectoryError, "is a file"),
    ],
)
def test_wrong_names(name: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        hub.fetch(name, "config.json")


@pytest.mark.parametrize("shard", ["../../x", "/etc/passwd", "a/../../x", "C:\\x", "\\\\host\\x", "..", ""])
def test_index_that_leads_out_of_the_model(tmp_path: Path, shard: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ValueError, match="index.json: .* must be a file inside the model"):
        hub.fetch_weights(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', "[" * 100_000])
def test_index_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json is no index of weights"):
        hub.fetch_weights(tmp_path)


# Saving


def files(directory: Path) -> dict[str, str]:
    """Content of a directory, without what a killed process left half-written."""
    return {path.name: path.read_text() for path in directory.iterdir() if not path.name.startswith(".saving-")}


OLD, NEW = {"a": "old", "b": "old", "c": "old"}, {"a": "new", "b": "new"}


def save_new(directory: Path) -> None:
    with hub.replacing(directory, stale=lambda name: name == "c") as staging:
        for name, text in NEW.items():
            (staging / name).write_text(text)


def test_replacing(tmp_path: Path) -> None:
    for name, text in {**OLD, "d": "other"}.items():
        (tmp_path / name).write_text(text)
    save_new(tmp_path)
    assert files(tmp_path) == {**NEW, "d": "other"}


def test_leftovers_of_killed_saves_are_removed_when_they_are_old(tmp_path: Path) -> None:
    old, fresh, foreign = (tmp_path / name for name in (".saving-old", ".saving-fresh", "saving-by-hand"))
    for directory in (old, fresh, foreign):
        directory.mkdir()
        (directory / "model.safetensors").write_text("half")
    hours_ago = time.time() - 2 * 3600
    for directory in (old, foreign):
        os.utime(directory, (hours_ago, hours_ago))
    save_new(tmp_path)
    assert not old.exists()
    assert fresh.exists()  # another process may be at it
    assert foreign.exists()


def test_failure_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(RuntimeError), hub.replacing(tmp_path) as staging:
        (staging / "a").write_text("half")
        raise RuntimeError
    assert files(tmp_path) == {"a": "old"}
    with pytest.raises(RuntimeError), hub.replacing(tmp_path / "fresh" / "one"):
        raise RuntimeError
    assert not (tmp_path / "fresh" / "one").exists()


SAVING = """
import sys
from minibert.weights import hub
for i in range(16):
    with hub.replacing(sys.argv[1], stale=lambda name: True) as staging:
        for part in range(1 + i % 3):
            (staging / f"{sys.argv[2]}-{part}").write_text(f"{sys.argv[2]}-{i}")
"""


def test_saves_and_openings_at_once(tmp_path: Path) -> None:
    """Two processes save sets of different names, others open: what is there in the end is one of the last sets."""
    directory = tmp_path / "model"
    savers = [subprocess.Popen([sys.executable, "-c", SAVING, directory, name]) for name in ("a", "b")]
    while any(saver.poll() is None for saver in savers):
        if directory.is_dir():
            hub.Source(directory)
    assert [saver.returncode for saver in savers] == [0, 0]
    hub.Source(directory)
    left = files(directory)
    assert set(left.values()) in ({"a-15"}, {"b-15"})
    assert sorted(left) == [f"{next(iter(left))[0]}-0"]  # the last set has one file


def test_a_save_waits_for_the_process_that_puts_files_in_place(tmp_path: Path) -> None:
    save_new(tmp_path)
    with locked(tmp_path / saving._LOCK):
        thread = threading.Thread(target=save_new, args=(tmp_path,))
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        assert not (tmp_path / ".saved").exists()
    thread.join()
    assert files(tmp_path) == NEW
    assert not list(tmp_path.glob(".sav*"))


# Dies at the n-th call that changes the directory or opens a file in it, while it saves a new set of files
DYING_SAVE = """
import json, os, sys
from minibert.weights import hub
directory, left, new = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
events = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}
def die(event, args):
    global left
    if event in events and directory in str(args):
        left -= 1
        if left < 0:
            os._exit(7)
sys.addaudithook(die)
with hub.replacing(directory, stale=lambda name: name == "c") as staging:
    for name, text in new.items():
        (staging / name).write_text(text)
"""


def test_crash_at_every_step(tmp_path: Path) -> None:
    """A process that dies leaves all old files or, once the directory is opened again, all new ones."""
    is_new, step, died = [], 0, True
    while died:
        directory = tmp_path / str(step)
        directory.mkdir()
        for name, text in OLD.items():
            (directory / name).write_text(text)
        died = subprocess.run([sys.executable, "-c", DYING_SAVE, directory, str(step), json.dumps(NEW)]).returncode != 0
        hub.Source(directory)  # opening completes what was begun
        assert files(directory) in (OLD, NEW)
        is_new.append(files(directory) == NEW)
        step += 1
    assert is_new == sorted(is_new)  # old up to some step, new from then on
    assert is_new.count(False) > 5
    assert is_new.count(True) > 5


@pytest.mark.parametrize(
    "listed",
    [
        {"files": [], "stale": ["../secret"]},
        {"files": ["../secret"], "stale": []},
        {"files": ["link/secret"], "stale": []},
        {"files": ["out/a"], "stale": []},
        {"files": [], "stale": ["out/secret"]},
        {"files": [3], "stale": []},
        {},
        [],
    ],
)
def test_hostile_interrupted_save(tmp_path: Path, listed: object) -> None:
    """A directory from someone else must not make us move or delete what is outside of it."""
    secret, directory = tmp_path / "secret", tmp_path / "model"
    secret.write_text("secret")
    (directory / ".saved").mkdir(parents=True)
    (directory / ".saved" / "files.json").write_text(json.dumps(listed))
    (directory / ".saved" / "link").symlink_to(tmp_path)  # a way to take
    (directory / "out").symlink_to(tmp_path)  # a way to put
    with pytest.raises(ValueError, match="is no interrupted save, delete it"):
        hub.Source(directory)
    assert secret.read_text() == "secret"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "secret"]


def test_weights_that_are_not_cached(server: LocalHub) -> None:
    hub.fetch("bert-base-uncased", "config.json")
    with pytest.raises(FileNotFoundError, match="no weights.*offline, only what is in the cache counts"):
        hub.fetch_weights("bert-base-uncased", local_files_only=True)
