"""A Hugging Face hub on this machine: the routes that huggingface_hub's file system asks, with their bad days.

Source of routes, headers and answers: huggingface_hub 1.3, hf_api.py (`repo_info`, `list_repo_tree`,
`get_paths_info`), utils/_http.py (`hf_raise_for_status`), utils/_pagination.py. Files are served as the hub serves
large ones: `resolve` redirects to another host, which answers ranges.
"""

from __future__ import annotations

import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Dataset:
    """One dataset repository."""

    branches: dict[str, dict[str, bytes]]
    """Revision -> path -> contents."""
    token: str | None = None
    """Who wants its files needs this token (a gated dataset: everybody may list it)."""


@dataclass
class HubServer:
    """Serves `datasets` at `url` while it is entered."""

    datasets: dict[str, Dataset] = field(default_factory=dict)
    """owner/name -> dataset."""
    page_size: int = 2
    """Entries of a listing per answer."""
    drops: list[str] = field(default_factory=list)
    """Parts of paths: the next answer to a request whose path holds one breaks off half-way, once for each."""
    busy: list[str] = field(default_factory=list)
    """Likewise: answered with 503."""
    gone_after: int | None = None
    """So many requests for contents are answered, and every later one breaks off."""
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    """(method, path, range) of everything asked for."""

    def __enter__(self):
        hub = self

        class Handler(_Handler):
            server_hub = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        # Another name of the same machine: a client must not send its token there, and must keep the range.
        self.storage_url = f"http://localhost:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_hub: HubServer

    def log_message(self, *_):
        """Say nothing: what was asked stands in `requests`."""

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        self._form = self.rfile.read(int(self.headers["Content-Length"]))
        self.do_GET()

    def do_GET(self):
        hub, split = self.server_hub, urlsplit(self.path)
        hub.requests.append((self.command, unquote(split.path), self.headers.get("Range")))
        for part in hub.busy:
            if part in unquote(split.path):
                hub.busy.remove(part)
                return self._answer(503, b"busy", {})
        parts = [unquote(part) for part in split.path.strip("/").split("/")]
        if parts[0] == "storage":
            return self._file(parts)
        place = 2 if parts[0] == "api" else 1
        name = "/".join(parts[place : place + 2])
        dataset, rest = hub.datasets.get(name), parts[place + 2 :]
        if dataset is None:  # the hub does not tell strangers whether a dataset is missing or private
            code = 404 if self.headers.get("Authorization") else 401
            return self._refuse(code, "RepoNotFound", "Repository not found")
        if rest[:1] == ["resolve"]:
            return self._resolve(name, dataset, rest[1:])
        revision = rest[1] if len(rest) > 1 else "main"
        if revision not in dataset.branches:
            return self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        files = dataset.branches[revision]
        if rest[:1] == ["tree"]:
            return self._tree(files, "/".join(rest[2:]), parse_qs(split.query))
        if rest[:1] == ["paths-info"]:
            wanted = parse_qs(self._form.decode())["paths"]
            return self._json([_entry(path, files[path]) for path in wanted if path in files])
        return self._json({"_id": "1", "id": name, "sha": COMMIT, "private": False, "gated": bool(dataset.token)})

    def _tree(self, files, folder, query):
        prefix = f"{folder}/" if folder else ""
        below = sorted(path for path in files if path.startswith(prefix))
        if not below:
            return self._refuse(404, "EntryNotFound", f"{folder} does not exist")
        recursive = query.get("recursive") == ["True"] or query.get("recursive") == ["true"]
        entries = {}
        for path in below:
            parts = path.removeprefix(prefix).split("/")
            for depth in range(1, len(parts)) if recursive else range(1, min(2, len(parts))):
                inner = prefix + "/".join(parts[:depth])
                entries[inner] = {"type": "directory", "oid": COMMIT, "size": 0, "path": inner}
            if recursive or len(parts) == 1:
                entries[path] = _entry(path, files[path])
        start = int(query.get("cursor", ["0"])[0])
        stop = start + self.server_hub.page_size
        headers = {}
        if stop < len(entries):
            more = f"{urlsplit(self.path).path}?recursive={recursive}&cursor={stop}"
            headers["Link"] = f'<{self.server_hub.url}{more}>; rel="next"'
        return self._json(list(entries.values())[start:stop], headers)

    def _resolve(self, name, dataset, rest):
        """hf/xet: `resolve` sends everybody who may on to the storage."""
        # A revision may hold slashes, escaped or not.
        path = "/".join(rest)
        revision = next((r for r in dataset.branches if path.startswith(r + "/")), None)
        if revision is None:
            return self._refuse(404, "RevisionNotFound", "Invalid rev id")
        inner = path.removeprefix(revision + "/")
        if dataset.token is not None and self.headers.get("Authorization") != f"Bearer {dataset.token}":
            code = 403 if self.headers.get("Authorization") else 401
            return self._refuse(code, "GatedRepo", f"Access to dataset {name} is restricted.")
        if inner not in dataset.branches[revision]:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        target = f"{self.server_hub.storage_url}/storage/{quote(name)}/{quote(revision, safe='')}/{quote(inner)}"
        return self._answer(302, b"", {"Location": target, "X-Repo-Commit": COMMIT})

    def _file(self, parts):
        if self.headers.get("Authorization"):
            return self._answer(400, b"a token was sent to a stranger", {})
        name, revision, inner = "/".join(parts[1:3]), parts[3], "/".join(parts[4:])
        data = self.server_hub.datasets[name].branches[revision][inner]
        wanted = self.headers.get("Range")
        if wanted is None:
            return self._answer(200, data, {"Accept-Ranges": "bytes"})
        first, last = wanted.removeprefix("bytes=").split("-")
        start, stop = int(first), min(int(last) + 1 if last else len(data), len(data))
        if start >= len(data):
            return self._answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
        return self._answer(206, data[start:stop], {"Content-Range": f"bytes {start}-{stop - 1}/{len(data)}"})

    def _refuse(self, status, code, message):
        return self._answer(status, message.encode(), {"X-Error-Code": code, "X-Error-Message": message})

    def _json(self, value, headers=None):
        return self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _answer(self, status, body, headers):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        hub, path = self.server_hub, unquote(self.path)
        drop = next((part for part in hub.drops if part in path and len(body) > 1), None)
        if drop is not None:
            hub.drops.remove(drop)
        fetched = sum(asked.startswith("/storage/") for _, asked, _ in hub.requests)
        gone = path.startswith("/storage/") and hub.gone_after is not None and fetched > hub.gone_after
        if drop is not None or gone:
            body = body[: len(body) // 2]
            self.close_connection = True
        self.wfile.write(body)


def _entry(path, data):
    digest = hashlib.sha256(data).hexdigest()
    lfs = {"oid": digest, "size": len(data), "pointerSize": 130}
    return {"type": "file", "oid": digest[:40], "size": len(data), "lfs": lfs, "path": path}
