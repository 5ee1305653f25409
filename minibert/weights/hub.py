"""Where a checkpoint lives: a directory, a model bundled with the package, or the Hugging Face Hub and its cache."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from minibert.weights.files import of_variant
from minibert.weights.saving import check_relative, put_in_place
from minibert.weights.saving import replacing as replacing

_MODELS = Path(__file__).parents[1] / "models"
_COMMIT = re.compile(r"[0-9a-f]{40}")

# One checkpoint is one of these, in this order of preference; an index names the files it is split into.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_WEIGHT_ENDS = (".safetensors", ".bin", ".index.json")


class Replaced(OSError):
    """A model was saved anew while it was being opened, so that what was read does not belong together."""


def identity(status: os.stat_result) -> tuple[int, int, int, int]:
    """What tells a file from another that takes its place, and from itself before it was written to."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def bundled_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(config.parent.name for config in _MODELS.glob("*/config.json"))


def default_model() -> str:
    """Path of the bundled model that is used when none is named.

    Raises ValueError if the package carries none.
    """
    names = bundled_models()
    if not names:
        raise ValueError("no model is bundled with minibert: pass the name of one on the Hub, or a directory")
    return str(_MODELS / names[0])


def is_reachable(seconds: float = 5.0) -> bool:
    """Whether the Hub answers now; one request, and none when huggingface_hub is told to be offline."""
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return False
    try:
        get_session().head(constants.ENDPOINT, timeout=seconds)
    except Exception:  # of whichever HTTP library huggingface_hub uses
        return False
    return True


def fetch(name_or_path: str | os.PathLike | Source, filename: str, **where: Any) -> Path | None:
    """Local path of one file of a model, downloaded if need be; None when the model has no such file.

    `where` is the keyword arguments of `Source`, which lists the errors.
    """
    return as_source(name_or_path, **where).file(filename)


def fetch_weights(name_or_path: str | os.PathLike | Source, **where: Any) -> list[Path]:
    """Local paths of the files that hold the weights of a model, in one format (see `Source.weights`)."""
    return as_source(name_or_path, **where).weights()


def as_source(name_or_path: str | os.PathLike | Source, **where: Any) -> Source:
    """A Source as it is, anything else as the Source of that name."""
    return name_or_path if isinstance(name_or_path, Source) else Source(name_or_path, **where)


class Source:
    """The files of one model. After the first file from the Hub, all others are taken from the same commit.

    Args:
        name_or_path: a directory, else the name of a bundled model, else a name on the Hub ("bert-base-uncased").
        revision: branch, tag or commit on the Hub; default the main branch. A full commit hash or an offline load
            (`local_files_only`, HF_HUB_OFFLINE) of what the cache holds makes no request at all.
        cache_dir: instead of the cache that HF_HOME or HF_HUB_CACHE name.
        token: for private and gated models: a token, True to insist on the stored one, False for none.
        subfolder: a folder inside, which holds all the files.
        variant: part of the names of the weights' files: "fp16" for model.fp16.safetensors.
        formats: how the names of the weights' files may end.

    Raises:
        NotADirectoryError: it is a file.
        FileNotFoundError: no such directory, model or revision, or offline and not in the cache.
        PermissionError: the model is gated or private and the token does not open it.
        ConnectionError: the Hub cannot be reached and the cache does not hold the file.
        OSError: what was downloaded is damaged.
        ValueError, TypeError: the name cannot be one.
    """

    def __init__(
        self,
        name_or_path: str | os.PathLike,
        *,
        revision: str | None = None,
        cache_dir: str | os.PathLike | None = None,
        local_files_only: bool = False,
        token: str | bool | None = None,
        subfolder: str | None = None,
        variant: str | None = None,
        formats: tuple[str, ...] = (".safetensors", ".bin"),
    ):
        self.directory = _directory(name_or_path)
        self.name = str(name_or_path)
        self.revision = revision
        self.cache_dir = cache_dir
        self.local_files_only = local_files_only
        self.token = token
        self.subfolder = subfolder or ""
        self.variant = variant
        self.formats = formats
        self._reached = False
        self._given: dict[Path, tuple[int, ...]] = {}  # of a directory's files: what they were when they were asked for
        self.settle()

    @property
    def is_bundled(self) -> bool:
        """Whether it comes with the package."""
        return self.directory is not None and self.directory.resolve().parent == _MODELS.resolve()

    def file(self, filename: str) -> Path | None:
        """Local path of one file, None if the model has no such file. Offline, what is not cached does not exist."""
        filename = (PurePosixPath(self.subfolder) / filename).as_posix()
        check_relative(filename, "filename")
        if self.directory is not None:
            path = self.directory / filename
            if not path.is_file():
                return None
            if not filename.endswith(_WEIGHT_ENDS):  # of those, `open_weights` sees to it
                self._given.setdefault(path, identity(path.stat()))
            return path
        path = self._from_hub(filename)
        if path is not None:
            self.revision = path.parents[len(PurePosixPath(filename).parts) - 1].name  # .../snapshots/<commit>/<file>
        return path

    def weights(self) -> list[Path]:
        """The files of one weight format: safetensors if there are any, else PyTorch's .bin; never both.

        Raises FileNotFoundError if there are none or a shard is missing; ValueError if an index names a file
        outside of the model.
        """
        names = [
            of_variant(name, self.variant)
            for name in WEIGHTS
            if name.removesuffix(".index.json").endswith(self.formats)
        ]
        for filename in names:
            path = self.file(filename)
            if path is None:
                continue
            if not filename.endswith(".json"):
                return [path]
            shards = {shard: self.file(shard) for shard in _shards(path)}
            missing = [shard for shard, found in shards.items() if found is None]
            if missing:
                raise FileNotFoundError(f"{path} names files that {self.name} does not have: {', '.join(missing)}")
            return [found for found in shards.values() if found is not None]
        if self.directory is not None:
            there = f"; it holds {sorted(os.listdir(self.directory))[:20]}{self.hint()}"
        else:
            there = "; offline, only what is in the cache counts" if self._offline() else ""
        raise FileNotFoundError(f"{self.name} has no weights: looked for {', '.join(names)}{there}")

    def hint(self) -> str:
        """For errors about what a directory lacks: the models that lie in folders of it, if any."""
        models = [] if self.directory is None else _models_in(self.directory)
        others = [repr(str(path)) for path in models if path != self.directory]
        return f"; did you mean {' or '.join(others[:3])}?" if others else ""

    def settle(self) -> bool:
        """Wait for a save into the directory that is under way, or complete it; whether there was one."""
        if self.directory is None:
            return False
        places = {self.directory, self.directory / self.subfolder}
        return True in [put_in_place(place) for place in places]

    def check_unchanged(self) -> None:
        """Raises Replaced if a file of a directory is another one by now than when it was first asked for."""
        for path, then in self._given.items():
            if not path.exists() or identity(path.stat()) != then:
                raise Replaced(f"{path} was replaced while the model was opened: open it again")

    def _from_hub(self, filename: str) -> Path | None:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
        from huggingface_hub.errors import HFValidationError, RemoteEntryNotFoundError

        def in_cache(name: str) -> Any:  # a path, None, or a marker: known not to exist
            return try_to_load_from_cache(self.name, name, cache_dir=self.cache_dir, revision=self.revision)

        offline = self._offline()
        try:
            cached = in_cache(filename)
        except HFValidationError as error:
            raise ValueError(f"{self.name!r} is no directory and cannot be a name on the Hub: {error}") from None
        if cached is not None and (offline or _COMMIT.fullmatch(self.revision or "")):
            return Path(cached) if isinstance(cached, str) else None
        if offline:
            if filename != "config.json" and isinstance(in_cache("config.json"), str):
                return None
            raise FileNotFoundError(
                f"{self._described()} is not in the cache, and minibert is offline (local_files_only or "
                f"HF_HUB_OFFLINE); nor is it a directory here{_similar(self.name)}"
            )
        if cached is None and not self._reached:
            self._reach(filename)
        try:
            path = hf_hub_download(
                self.name,
                filename,
                revision=self.revision,
                cache_dir=self.cache_dir,
                token=self.token,
                library_name="minibert",
            )
        except RemoteEntryNotFoundError:
            return None
        except Exception as error:
            explained = self._explained(error, filename)
            # A connection that breaks says as little about the model as one that is never made
            if isinstance(explained, ConnectionError) and isinstance(cached, str):
                return Path(cached)
            raise explained from error
        if path != cached:
            _verify(Path(path), self._described())
        return Path(path)

    def _reach(self, filename: str) -> None:
        """Ask the Hub for anything, once. huggingface_hub itself would try for half a minute where there is none.

        Raises ConnectionError if no connection can be made.
        """
        from huggingface_hub import constants, get_session, hf_hub_url
        from huggingface_hub.utils import build_hf_headers

        url = hf_hub_url(self.name, filename, revision=self.revision)
        try:
            headers = build_hf_headers(token=self.token, library_name="minibert")
            get_session().head(url, headers=headers, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        except Exception as error:  # of whichever HTTP library huggingface_hub uses
            if {"ConnectError", "ConnectTimeout", "ProxyError"} & {kind.__name__ for kind in type(error).__mro__}:
                raise self._unreachable(error, filename) from error
        self._reached = True

    def _unreachable(self, error: BaseException, filename: str) -> ConnectionError:
        from huggingface_hub import constants

        reason = f"{type(error).__name__}: {error}".strip().splitlines()
        return ConnectionError(
            f"{self._described()} is no directory here{_similar(self.name)}, and as a name on the Hub it ({filename}) "
            f"could not be fetched from {constants.ENDPOINT} and is not in the cache "
            f"({' '.join(line.strip() for line in reason if line.strip())})"
        )

    def _offline(self) -> bool:
        from huggingface_hub import constants

        return self.local_files_only or constants.HF_HUB_OFFLINE

    def _described(self) -> str:
        return f"{self.name!r}" + (f" at revision {self.revision!r}" if self.revision else "")

    def _explained(self, error: Exception, filename: str) -> Exception:
        """What a failure of huggingface_hub means to the user."""
        from huggingface_hub import constants, errors

        what = f"{self._described()} ({filename})"
        status = getattr(getattr(error, "response", None), "status_code", None)
        if isinstance(error, errors.GatedRepoError):
            return PermissionError(
                f"{what} is gated: ask for access on its page at {constants.ENDPOINT}, then pass token=... or log in "
                "with `hf auth login`"
            )
        if isinstance(error, errors.RepositoryNotFoundError):
            return FileNotFoundError(
                f"{self.name!r} is neither a directory here{_similar(self.name)} nor a model at {constants.ENDPOINT} "
                "(if it is private, pass token=... or log in with `hf auth login`)"
            )
        if isinstance(error, errors.RevisionNotFoundError):
            return FileNotFoundError(f"{self.name!r} has no revision {self.revision!r}")
        if status in (401, 403):
            return PermissionError(f"{what}: the Hub refused access (HTTP {status}); check the token")
        if isinstance(error, (errors.LocalEntryNotFoundError, errors.HfHubHTTPError)) or not isinstance(error, OSError):
            return self._unreachable(error.__cause__ or error, filename)
        return OSError(f"{what} could not be downloaded: {error}")


def _directory(name_or_path: str | os.PathLike) -> Path | None:
    """The directory that a name means, None if it must be a name on the Hub."""
    if not isinstance(name_or_path, (str, os.PathLike)):
        raise TypeError(f"name_or_path={name_or_path!r}: must be a string or a path")
    name = os.fspath(name_or_path)
    if not name:
        raise ValueError("name_or_path is empty: must be a directory, or the name of a model")
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise NotADirectoryError(f"{path} is a file: pass the directory that holds config.json and the weights")
    if name in bundled_models():
        return _MODELS / name
    if not isinstance(name_or_path, str) or name.startswith((".", "/", "~")) or "\\" in name or name.count("/") > 1:
        raise FileNotFoundError(f"no such directory: {path}{_similar(name)}")
    return None


def _similar(name: str) -> str:
    """A hint at the directory that a misspelt path may mean."""
    found = Path()
    for part in Path(name).expanduser().parts:
        if (found / part).is_dir():
            found /= part
            continue
        try:
            there = [path.name for path in found.iterdir() if path.is_dir()]
        except OSError:
            return ""
        close = difflib.get_close_matches(part, there, n=1)
        if not close:
            return ""
        found /= close[0]
    models = _models_in(found)
    return f" (did you mean {str(models[0])!r}?)" if models else ""


def _models_in(directory: Path) -> list[Path]:
    """The directory, if it holds a model, else those of its folders that do."""
    if (directory / "config.json").is_file():
        return [directory]
    return sorted(path.parent for path in directory.glob("*/config.json"))


def _shards(index: Path) -> list[str]:
    """The files that a checkpoint's index names."""
    try:
        files = json.loads(index.read_bytes())["weight_map"].values()
        names = sorted(set(files))
        for name in names:
            check_relative(name, str(index))
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f'{index} is no index of weights {{"weight_map": {{tensor: file}}}}: {error!r}') from None
    return names


def _verify(path: Path, what: str) -> None:
    """Compare a fresh download with the hash the Hub gave for it, which the cache uses as the name of the file's blob.

    It is the SHA-256 of large files and git's SHA-1 of small ones (some mirrors: the plain SHA-1). huggingface_hub
    itself compares only the size. A damaged file is removed, so that the next attempt starts afresh.
    """
    blob = path.resolve()
    digests: dict[int, list[Callable[[], Any]]] = {
        64: [hashlib.sha256],
        40: [lambda: hashlib.sha1(f"blob {blob.stat().st_size}\0".encode()), hashlib.sha1],
    }
    expected = blob.name
    if not path.is_symlink() or not re.fullmatch(r"[0-9a-f]+", expected) or len(expected) not in digests:
        return  # the cache has no symbolic links here, or the server's tag is no hash
    for new in digests[len(expected)]:
        with open(blob, "rb") as file:
            if hashlib.file_digest(file, new).hexdigest() == expected:
                return
    path.unlink()
    blob.unlink()
    raise OSError(f"{what}: {path.name} arrived damaged (its hash is not {expected}) and was deleted; try again")
