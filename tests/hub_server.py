"""A small Hugging Face Hub on this machine: the requests that the huggingface_hub client makes to load a model.

Two servers, as in reality: the Hub answers for names and revisions and holds small files; large ones it redirects to
a second one, which stands for the storage network. Faults can be ordered: `hub.faults.append(Fault(...))`.
"""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

LARGE = 4096  # bytes; from here on files lie in the storage, as with Git LFS


@dataclass
class Repo:
    """Files at each commit; branches and tags name commits."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    gated: bool = False
    private: bool = False

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        """Make `files` the content of a branch or tag; returns the commit's hash."""
        sha = hashlib.sha1(repr((ref, sorted(files.items()))).encode()).hexdigest()
        self.commits[sha] = files
        self.refs[ref] = sha
        return sha


@dataclass
class Fault:
    """Something goes wrong with the next `times` requests of a method whose path ends so.

    status: answer with this error. cut: send only so many bytes of the body. flip: spoil the body's last byte. reset:
    close the connection without an answer.
    """

    path: str = ""
    method: str = "GET"
    times: int = 1
    status: int | None = None
    cut: int | None = None
    flip: bool = False
    reset: bool = False


class LocalHub:
    """`url` is its address, `requests` lists what was asked for: (method, path, authorization, range)."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.aliases: dict[str, str] = {}  # old name -> new name
        self.token = "hf_right"
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str, str | None, str | None]] = []
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), self._handler(kind)) for kind in (_Hub, _Storage)]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_port}" for server in self._servers)
        for server in self._servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()

    def _handler(self, kind: type[_Handler]) -> type[_Handler]:
        return type(kind.__name__, (kind,), {"hub": self})

    def repo(self, name: str, files: dict[str, bytes] | None = None, **properties: Any) -> Repo:
        """Make a repository, with a first commit if there are files."""
        self.repos[name] = Repo(**properties)
        if files is not None:
            self.repos[name].commit(files)
        return self.repos[name]

    def fault(self, method: str, path: str) -> Fault:
        for fault in self.faults:
            if fault.times and fault.method == method and path.endswith(fault.path):
                fault.times -= 1
                return fault
        return Fault()

    def bodies(self, method: str = "GET") -> list[str]:
        """The file names asked for with a method."""
        return [path.rsplit("/", 1)[-1] for verb, path, _, _ in self.requests if verb == method]

    def stop(self) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._handle()

    def do_GET(self) -> None:
        self._handle()

    def _handle(self) -> None:
        path = self.path
        self.hub.requests.append((self.command, path, self.headers.get("Authorization"), self.headers.get("Range")))
        self._fault = self.hub.fault(self.command, path)
        if self._fault.reset:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
        elif self._fault.status:
            self._error(self._fault.status)
        else:
            self.answer(path)

    def answer(self, path: str) -> None:
        raise NotImplementedError

    def _error(self, status: int, code: str = "", commit: str = "") -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": code or f"status {status}", "X-Repo-Commit": commit}
        self._send(status, b"", {name: value for name, value in headers.items() if value})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        """Answer a request; a GET of a file may ask for the rest of it."""
        wanted = self.headers.get("Range", "")
        if status == 200 and self.command == "GET" and wanted.startswith("bytes="):
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            headers = {**headers, "Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"}
            status, body = 206, body[start:]
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self._fault.flip:
            body = body[:-1] + bytes([body[-1] ^ 1])
        self.wfile.write(body[: self._fault.cut])
        if self._fault.cut is not None:
            self.close_connection = True

    def log_message(self, *args: Any) -> None:
        pass


class _Hub(_Handler):
    """/{repo}/resolve/{revision}/{file} and /api/models/{repo}[/revision/{revision}]."""

    def answer(self, path: str) -> None:
        if path.startswith("/api/models/"):
            name, _, revision = path.removeprefix("/api/models/").partition("/revision/")
            kind, filename = "info", ""
        else:
            name, _, rest = path.lstrip("/").partition("/resolve/")
            revision, _, filename = rest.partition("/")
            kind = "file"
        name, revision, filename = unquote(name), unquote(revision), unquote(filename)
        if name in self.hub.aliases:
            return self._send(307, b"", {"Location": self.path.replace(name, self.hub.aliases[name], 1)})
        repo = self.hub.repos.get(name)
        authorized = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if repo is None or (repo.private and not authorized):
            return self._error(401 if not authorized else 404, "RepoNotFound")
        if repo.gated and not authorized:
            return self._error(403 if self.headers.get("Authorization") else 401, "GatedRepo")
        commit = repo.refs.get(revision or "main", revision)
        if commit not in repo.commits:
            return self._error(404, "RevisionNotFound")
        files = repo.commits[commit]
        if kind == "info":
            return self._info(name, commit, files)
        if filename not in files:
            return self._error(404, "EntryNotFound", commit)
        return self._file(files[filename], commit)

    def _info(self, name: str, commit: str, files: dict[str, bytes]) -> None:
        info = {"id": name, "sha": commit, "siblings": [{"rfilename": filename} for filename in sorted(files)]}
        self._send(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _file(self, body: bytes, commit: str) -> None:
        if len(body) < LARGE:
            etag = hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()
            return self._send(200, body, {"ETag": f'"{etag}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"})
        sha = hashlib.sha256(body).hexdigest()
        headers = {
            "Location": f"{self.hub.storage_url}/{sha}",
            "X-Linked-ETag": f'"{sha}"',
            "X-Linked-Size": str(len(body)),
            "X-Repo-Commit": commit,
        }
        return self._send(302, b"", headers)


class _Storage(_Handler):
    """/{sha256 of the content}"""

    def answer(self, path: str) -> None:
        for repo in self.hub.repos.values():
            for files in repo.commits.values():
                for body in files.values():
                    if hashlib.sha256(body).hexdigest() == path.lstrip("/"):
                        return self._send(200, body, {"ETag": f'"{path}"', "Accept-Ranges": "bytes"})
        return self._error(404)
