"""All files of a model written as one: a crash at any moment leaves the old set or the new one, never a mixture."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PureWindowsPath

from minibert.weights.files import locked, naming, sync

_SAVED = ".saved"  # in a model's directory: a whole set of files that are taking their places
_LIST = "files.json"  # in there: their names, and those that they make stale
_LOCK = ".saving-lock"  # beside it while that happens: held by the one process that moves them


@contextmanager
def replacing(directory: str | os.PathLike, stale: Callable[[str], bool] = lambda name: False) -> Iterator[Path]:
    """Write files of a model all or none: a crash at any moment leaves the old set or the new one.

    Yields an empty directory to write the files into, on the same file system. When the block ends, they are forced
    to disk, and one renaming of that directory makes the set count; then the files are moved to `directory`, one
    renaming each. If that is interrupted, it is completed when the directory is next opened or written. If the block
    fails, nothing has changed.

    Args:
        stale: says which other files of `directory`, by name, the new ones supersede.

    Raises NotADirectoryError if `directory` is a file; OSError if it cannot be written.
    """
    directory = Path(directory).expanduser()
    if directory.exists() and not directory.is_dir():
        raise NotADirectoryError(f"{directory} is a file: pass a directory to save in")
    is_new = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    for left in directory.glob(".saving-*"):  # by a process that was killed
        with suppress(OSError):
            if left.is_dir() and left.stat().st_mtime < time.time() - 3600:
                shutil.rmtree(left, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=".saving-", dir=directory))
    try:
        with naming(directory):
            yield staging
            names = sorted(path.relative_to(staging).as_posix() for path in staging.rglob("*") if path.is_file())
            for path in staging.rglob("*"):
                sync(path)
            with locked(directory / _LOCK):
                _move(directory)  # a set that another process has finished goes first
                others = {path.name for path in directory.iterdir() if path.is_file()} - {*names, _LOCK}
                old = sorted(name for name in others if stale(name))
                (staging / _LIST).write_text(json.dumps({"files": names, "stale": old}), encoding="utf-8")
                for path in (staging / _LIST, staging):
                    sync(path)
                os.rename(staging, directory / _SAVED)
                _move(directory)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        if is_new:
            with suppress(OSError):  # not empty: someone else has written there
                directory.rmdir()
        raise


def put_in_place(directory: Path) -> bool:
    """Complete a save that was interrupted, or wait for the process that is at it; whether there was one."""
    saved = directory / _SAVED
    if not saved.is_dir() or saved.is_symlink():
        return False
    with locked(directory / _LOCK):
        _move(directory)
    return True


def _move(directory: Path) -> None:
    """Move a whole set of saved files to their places; does nothing when there is none. Only within its lock.

    Raises ValueError if the set is not one that `replacing` made: a directory may come from anyone.
    """
    saved = directory / _SAVED
    if not saved.is_dir() or saved.is_symlink():
        return
    try:
        listed = json.loads((saved / _LIST).read_text(encoding="utf-8"))
        moves = [(_inside(saved, name), _inside(directory, name)) for name in listed["files"]]
        stale = [_inside(directory, name) for name in listed["stale"]]
    except FileNotFoundError:  # all has been done but this
        shutil.rmtree(saved, ignore_errors=True)
        return
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{saved} is no interrupted save, delete it: {error!r}") from None
    sync(directory)
    for source, target in moves:
        target.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):
            os.replace(source, target)
    for path in stale:
        path.unlink(missing_ok=True)
    sync(directory)
    (saved / _LIST).unlink(missing_ok=True)
    shutil.rmtree(saved, ignore_errors=True)


def _inside(directory: Path, name: str) -> Path:
    """A file in a directory. Raises ValueError if its name or a symbolic link leads out of it."""
    check_relative(name, "files.json")
    path = directory / name
    if not path.parent.resolve().is_relative_to(directory.resolve()):
        raise ValueError(f"{path} leads out of {directory}")
    return path


def check_relative(filename: str, what: str) -> None:
    """Refuse a file name that leads out of the model's directory, on any operating system."""
    windows = PureWindowsPath(filename)
    if not filename or windows.is_absolute() or windows.drive or windows.root or ".." in windows.parts:
        raise ValueError(f"{what}: {filename!r} must be a file inside the model")
