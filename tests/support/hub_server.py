"""A small model hub on loopback for tests: the routes that huggingface_hub really asks.

It serves ``/api/models/{id}[/revision/{rev}]``, ``/api/models/{id}/tree/{rev}`` and
``/{id}/resolve/{rev}/{file}`` (HEAD, GET, Range; ETag, X-Repo-Commit). Safetensors are "LFS":
they answer with a redirect and X-Linked-Etag, as on the real hub. Every request is recorded,
every byte of a body counted. A `Sparse` file has any size and costs no memory. The id of a
dataset begins with ``datasets/``.

    with HubServer() as hub:
        commit = hub.add("org/tiny", {"config.json": b"{}", "model.safetensors": data})
        subprocess.run([...], env=hub.env(tmp_path))
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

_CHUNK = 1 << 16
_API = r"/api/(?:models/|(?=datasets/))((?:datasets/)?[^/]+/[^/]+)"


@dataclass(frozen=True)
class Sparse:
    """A file of ``size`` bytes that starts with ``head``; the rest is zeros."""

    head: bytes
    size: int

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, part: slice) -> bytes:
        start, stop, _ = part.indices(self.size)
        return self.head[start:stop].ljust(stop - start, b"\0")


File = bytes | Sparse


@dataclass
class Request:
    """One request as it came; header names in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    status: int = 0


@dataclass
class Repo:
    """A model: its commits, the names of some, and who may read it."""

    commits: dict[str, dict[str, File]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    gated: bool = False


class HubServer:
    """The hub; `requests` is what it was asked, `url` is what HF_ENDPOINT must be.

    ``fail_with`` answers everything with that status; ``cut_next`` breaks the connection in
    the middle of the next LFS file; ``ranges`` says what becomes of a Range header: honoured
    (``yes``), ``ignored``, answered with other bytes than those asked (``shifted``) or of a file
    of another size (``resized``). LFS files wait ``delay`` seconds. ``sent`` is how many bytes
    of bodies were handed to the network.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.fail_with: int | None = None
        self.cut_next = False
        self.ranges = "yes"
        self.delay = 0.0
        self.sent = 0
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(
            target=lambda: self._server.serve_forever(poll_interval=0.02), daemon=True
        )
        self._thread.start()
        port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{port}"
        # Another host name, as the real hub's storage is: the client then keeps the hub's
        # headers of the redirect and sends the token to nobody else.
        self.storage = f"http://localhost:{port}"

    def add(
        self,
        repo_id: str,
        files: Mapping[str, File] | Path,
        *,
        refs: tuple[str, ...] = ("main",),
        token: str | None = None,
        gated: bool = False,
    ) -> str:
        """Commit files (or a folder) to a model, point ``refs`` at it; returns the commit."""
        if isinstance(files, Path):
            found = sorted(p for p in files.rglob("*") if p.is_file())
            files = {str(p.relative_to(files)): p.read_bytes() for p in found}
        repo = self.repos.setdefault(repo_id, Repo())
        repo.token, repo.gated = token, gated
        digest = hashlib.sha1(repo_id.encode())
        for name, data in sorted(files.items()):
            digest.update(name.encode() + _sha256(data).encode())
        commit = digest.hexdigest()
        repo.commits[commit] = dict(files)
        repo.refs.update(dict.fromkeys(refs, commit))
        return commit

    def env(self, home: Path, **more: str) -> dict[str, str]:
        """Environment in which the real client talks to this hub and to nothing else."""
        env = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
        env |= {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }
        return env | more

    def asked(self, method: str | None = None, part: str = "") -> list[str]:
        """Paths that were asked, of one method, holding ``part``."""
        return [r.path for r in self.requests if method in (None, r.method) and part in r.path]

    def close(self) -> None:
        """Stop answering; the port refuses connections from now on."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> HubServer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@dataclass
class Client:
    """The real client in a process of its own, with its own cache; ``code`` is what it runs."""

    hub: HubServer
    home: Path
    code: str

    def __call__(self, model: str, **env: str) -> dict[str, object]:
        """The one JSON line that the code prints; nothing else may come on either stream."""
        self.hub.requests.clear()
        self.hub.sent = 0
        done = subprocess.run(
            [sys.executable, "-c", self.code, model],
            env=self.hub.env(self.home, **env),
            capture_output=True,
            text=True,
            timeout=60,
            cwd=self.home.parent,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == "", "no bar and no warning where there is no terminal"
        (line,) = done.stdout.splitlines()
        answer: dict[str, object] = json.loads(line)
        assert answer.pop("heavy") == []
        return answer


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(body=True)

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.body = body
        self.record = Request(self.command, path, {k.lower(): v for k, v in self.headers.items()})
        self.hub.requests.append(self.record)
        if self.hub.fail_with is not None:
            return self._send(self.hub.fail_with, b"")
        if match := re.fullmatch(_API + r"(?:/revision/(.+))?", path):
            sizes = "blobs" in parse_qs(urlsplit(self.path).query)
            return self._info(match[1], match[2] or "main", sizes)
        if match := re.fullmatch(_API + r"/tree/([^/]+)/?", path):
            return self._tree(match[1], match[2])
        if match := re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(match[1], match[2], match[3])
        if match := re.fullmatch(r"/lfs/((?:datasets/)?[^/]+/[^/]+)/([^/]+)/(.+)", path):
            time.sleep(self.hub.delay)
            return self._file(self.hub.repos[match[1]].commits[match[2]][match[3]], {})
        return self._error(404, "EntryNotFound")

    def _find(self, repo_id: str, revision: str) -> tuple[str, dict[str, File]] | None:
        """The commit, or ``None`` after an error was sent."""
        repo = self.hub.repos.get(repo_id)
        sent = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repo is None or (repo.token and not repo.gated and sent != repo.token):
            self._error(404 if sent else 401, "RepoNotFound")
        elif repo.gated and sent != repo.token:
            self._error(403 if sent else 401, "GatedRepo")
        else:
            commit = repo.refs.get(revision, revision)
            if commit in repo.commits:
                return commit, repo.commits[commit]
            self._error(404, "RevisionNotFound")
        return None

    def _info(self, repo_id: str, revision: str, sizes: bool) -> None:
        if found := self._find(repo_id, revision):
            commit, files = found
            siblings: list[dict[str, object]] = [{"rfilename": name} for name in files]
            if sizes:
                for sibling, data in zip(siblings, files.values(), strict=True):
                    sibling["size"] = len(data)
            self._json({"_id": "0", "id": repo_id, "sha": commit, "siblings": siblings})

    def _tree(self, repo_id: str, revision: str) -> None:
        if found := self._find(repo_id, revision):
            tree = []
            for name, data in found[1].items():
                entry: dict[str, object] = {"type": "file", "path": name, "size": len(data)}
                entry["oid"] = _sha1(data)
                if _lfs(name):
                    entry["lfs"] = {"oid": _sha256(data), "size": len(data), "pointerSize": 134}
                tree.append(entry)
            self._json(tree)

    def _resolve(self, repo_id: str, revision: str, name: str) -> None:
        found = self._find(repo_id, revision)
        if found is None:
            return
        commit, files = found
        if name not in files:
            return self._error(404, "EntryNotFound", {"X-Repo-Commit": commit})
        data = files[name]
        if not _lfs(name):
            etag = f'"{_sha1(data)}"'
            return self._file(data, {"ETag": etag, "X-Repo-Commit": commit})
        headers = {
            "X-Repo-Commit": commit,
            "X-Linked-Etag": f'"{_sha256(data)}"',
            "X-Linked-Size": str(len(data)),
            "Location": f"{self.hub.storage}/lfs/{repo_id}/{commit}/{quote(name)}",
        }
        return self._send(302, b"", headers)

    def _file(self, data: File, headers: dict[str, str]) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None or self.hub.ranges == "ignored":
            return self._send(200, data, headers)
        headers["Accept-Ranges"] = "bytes"
        start, end = int(match[1]), min(int(match[2] or len(data)), len(data) - 1)
        if start > end:
            return self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        if self.hub.ranges == "shifted":
            start, end = start + 1, end + 1
        size = len(data) + (self.hub.ranges == "resized")
        headers["Content-Range"] = f"bytes {start}-{end}/{size}"
        return self._send(206, data[start : end + 1], headers)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})

    def _send(self, status: int, data: File, headers: dict[str, str] | None = None) -> None:
        self.record.status = status
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not self.body:
            return
        if self.hub.cut_next and self.record.path.startswith("/lfs/"):
            self.hub.cut_next = False
            self.close_connection = True
            data = data[: len(data) // 2]
        for at in range(0, len(data), _CHUNK):
            part = data[at : at + _CHUNK]
            try:
                self.wfile.write(part)
            except OSError:  # the client has enough
                self.close_connection = True
                return
            with self.hub.lock:
                self.hub.sent += len(part)


def _lfs(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".pt", ".gguf"))


def _sha256(data: File) -> str:
    return hashlib.sha256(_stand_in(data)).hexdigest()


def _sha1(data: File) -> str:
    return hashlib.sha1(_stand_in(data)).hexdigest()


def _stand_in(data: File) -> bytes:
    return data if isinstance(data, bytes) else data.head + b"%d" % data.size
