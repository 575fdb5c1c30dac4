"""A small model hub on loopback for tests: the routes that huggingface_hub really asks.

It serves ``/api/models/{id}[/revision/{rev}]``, ``/api/models/{id}/tree/{rev}`` and
``/{id}/resolve/{rev}/{file}`` (HEAD, GET, Range; ETag, X-Repo-Commit). Safetensors are "LFS":
they answer with a redirect and X-Linked-Etag, as on the real hub. Every request is recorded.

    with HubServer() as hub:
        commit = hub.add("org/tiny", {"config.json": b"{}", "model.safetensors": data})
        subprocess.run([...], env=hub.env(tmp_path))
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


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

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    token: str | None = None
    gated: bool = False


class HubServer:
    """The hub; `requests` is what it was asked, `url` is what HF_ENDPOINT must be.

    ``fail_with`` answers everything with that status; ``cut_next`` breaks the connection in
    the middle of the next LFS file.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.requests: list[Request] = []
        self.fail_with: int | None = None
        self.cut_next = False
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
        files: Mapping[str, bytes] | Path,
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
            digest.update(name.encode() + hashlib.sha256(data).digest())
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
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self._info(match[1], match[2] or "main")
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?", path):
            return self._tree(match[1], match[2])
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve(match[1], match[2], match[3])
        if match := re.fullmatch(r"/lfs/([^/]+/[^/]+)/([^/]+)/(.+)", path):
            return self._file(self.hub.repos[match[1]].commits[match[2]][match[3]], {})
        return self._error(404, "EntryNotFound")

    def _find(self, repo_id: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
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

    def _info(self, repo_id: str, revision: str) -> None:
        if found := self._find(repo_id, revision):
            commit, files = found
            siblings = [{"rfilename": name} for name in files]
            self._json({"_id": "0", "id": repo_id, "sha": commit, "siblings": siblings})

    def _tree(self, repo_id: str, revision: str) -> None:
        if found := self._find(repo_id, revision):
            tree = []
            for name, data in found[1].items():
                entry: dict[str, object] = {"type": "file", "path": name, "size": len(data)}
                entry["oid"] = hashlib.sha1(data).hexdigest()
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
            etag = f'"{hashlib.sha1(data).hexdigest()}"'
            return self._file(data, {"ETag": etag, "X-Repo-Commit": commit})
        headers = {
            "X-Repo-Commit": commit,
            "X-Linked-Etag": f'"{_sha256(data)}"',
            "X-Linked-Size": str(len(data)),
            "Location": f"{self.hub.storage}/lfs/{repo_id}/{commit}/{name}",
        }
        return self._send(302, b"", headers)

    def _file(self, data: bytes, headers: dict[str, str]) -> None:
        headers["Accept-Ranges"] = "bytes"
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None:
            return self._send(200, data, headers)
        start, end = int(match[1]), int(match[2] or len(data) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
        return self._send(206, data[start : end + 1], headers)

    def _json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _error(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": code, **(headers or {})})

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
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
        self.wfile.write(data)


def _lfs(name: str) -> bool:
    return name.endswith((".safetensors", ".bin", ".pt", ".gguf"))


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
