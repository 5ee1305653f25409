"""Writing a file: the old one or the new one, whatever happens."""

from __future__ import annotations

import errno
import os
import stat
import threading

import pytest

from minibert.weights import files


def names(directory) -> list[str]:
    return sorted(os.listdir(directory))


def test_a_file_is_replaced_whole(tmp_path):
    path = tmp_path / "file"
    files.write(path, "old")
    with files.replacing(path) as partial:
        partial.write_text("ne")
        assert path.read_text() == "old"
        partial.write_text("new")
    assert path.read_text() == "new"
    assert names(tmp_path) == ["file"]


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    files.write(path, b"old")
    with pytest.raises(KeyboardInterrupt), files.replacing(path) as partial:
        partial.write_text("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert names(tmp_path) == ["file"]


def test_an_error_of_writing_names_the_file(tmp_path):
    """Python names none where an open file cannot be written any more."""
    path = tmp_path / "file"
    with pytest.raises(OSError, match=r"No space left on device: '.*/file'") as raised, files.replacing(path):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert raised.value.errno == errno.ENOSPC
    with pytest.raises(OSError, match="elsewhere"), files.replacing(path):
        raise OSError(errno.EIO, "Input/output error", "elsewhere")
    assert names(tmp_path) == []


def test_a_full_disk(small_disk):
    disk = small_disk(1 << 16)
    files.write(disk / "file", "old")
    with pytest.raises(OSError, match=r"No space left on device: '.*/file'"):
        files.write(disk / "file", b"x" * (1 << 17))
    assert (disk / "file").read_text() == "old"
    assert names(disk) == ["file"]


def test_the_content_is_on_disk_before_it_counts_and_its_name_after(tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(files.os, "fsync", lambda descriptor: done.append(os.readlink(f"/proc/self/fd/{descriptor}")))
    replace = os.replace
    monkeypatch.setattr(files.os, "replace", lambda *paths: (done.append("replace"), replace(*paths)))
    files.write(tmp_path / "file", "new")
    partial, replaced, directory = done
    assert partial.startswith(str(tmp_path.resolve() / "."))
    assert (replaced, directory) == ("replace", str(tmp_path.resolve()))


def test_a_pipe_is_written_to_and_stays_one(tmp_path):
    """As /dev/stdout and /dev/null are, which must not become files."""
    os.mkfifo(tmp_path / "pipe")
    read = []
    thread = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    thread.start()
    files.write(tmp_path / "pipe", "content")
    thread.join()
    assert read == ["content"]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_device_is_named():
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        files.write("/dev/full", "content")


def test_a_directory_is_no_place_for_content(tmp_path):
    with pytest.raises(IsADirectoryError, match=tmp_path.name):
        files.write(tmp_path, "content")
    assert names(tmp_path) == []


def test_two_writers_do_not_share_a_file(tmp_path):
    contents = [letter * 100_000 for letter in "ab"]

    def write(content: str) -> None:
        for _ in range(20):
            files.write(tmp_path / "file", content)
            assert (tmp_path / "file").read_text() in contents

    threads = [threading.Thread(target=write, args=(content,)) for content in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names(tmp_path) == ["file"]


@pytest.mark.skipif(os.name == "nt", reason="permissions and links of Unix")
def test_permissions_and_links_stay(tmp_path):
    target, link = tmp_path / "target", tmp_path / "link"
    umask = os.umask(0o027)
    try:
        files.write(target, "old")
    finally:
        os.umask(umask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    target.chmod(0o600)
    link.symlink_to(target)
    files.write(link, "new")
    assert link.is_symlink()
    assert target.read_text() == "new"
    assert stat.S_IMODE(target.stat().st_mode) == 0o600


def test_a_long_name(tmp_path):
    files.write(tmp_path / ("n" * 255), "content")
    assert names(tmp_path) == ["n" * 255]


def test_leftovers_of_killed_writers_are_removed_and_nothing_else(tmp_path):
    kept = [".hidden.partial", "vectors.npy.partial", "file"]
    for name in [*kept, ".0123456789abcdef.partial"]:
        (tmp_path / name).touch()
    files.remove_partials(tmp_path)
    assert names(tmp_path) == sorted(kept)


def test_a_pointer_of_git_lfs_is_refused(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 17\n")
    with pytest.raises(ValueError, match=r"model\.safetensors is a pointer of Git LFS"):
        files.refuse_pointer(path)
    path.write_text("something else")
    files.refuse_pointer(path)
