"""A hub on this machine: what `huggingface_hub` and `datasets` ask the real one for, and its faults.

It serves repositories from memory as the real hub does: large files behind a redirection, with
their hash as ETag, in ranges. It does not speak Xet, which the clients use only if it is offered.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

LARGE = (".parquet", ".safetensors", ".bin", ".tar", ".zip")


@dataclass
class Repository:
    """A repository of the hub: `kind` is ``datasets`` or ``models``, files are bytes by path."""

    kind: str
    name: str
    files: dict[str, bytes]
    commit: str = "1" * 40
    gated: bool = False

    def is_revision(self, revision: str) -> bool:
        return revision in ("main", self.commit)

    def entry(self, path: str) -> dict[str, object]:
        content = self.files[path]
        found: dict[str, object] = {
            "type": "file",
            "path": path,
            "oid": hashlib.sha1(content).hexdigest(),
            "size": len(content),
        }
        if path.endswith(LARGE):
            lfs = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
            found["lfs"] = lfs
        return found

    def tree(self, folder: str, recursive: bool) -> list[dict[str, object]]:
        prefix = f"{folder}/" if folder else ""
        inside = [path for path in sorted(self.files) if path.startswith(prefix)]
        folders = sorted(
            {
                prefix + "/".join(parts[:depth])
                for path in inside
                for parts in [path.removeprefix(prefix).split("/")]
                for depth in range(1, len(parts))
            }
        )
        found = [{"type": "directory", "path": f, "oid": "0" * 40, "size": 0} for f in folders]
        found += [self.entry(path) for path in inside]
        if not recursive:
            found = [one for one in found if "/" not in str(one["path"]).removeprefix(prefix)]
        return found


@dataclass
class FakeHub:
    """What the server serves, what it was asked, and what goes wrong.

    `cut` has how many bytes of a file are sent before the connection breaks, once; of those
    in `broken` none is sent from then on; `busy` is how many questions about data sets are
    answered with 429.
    """

    repositories: dict[tuple[str, str], Repository] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    sent: dict[str, int] = field(default_factory=dict)  # bytes of files, by path
    cut: dict[str, int] = field(default_factory=dict)  # by path
    broken: set[str] = field(default_factory=set)
    busy: int = 0
    endpoint: str = ""
    store: str = ""

    def add(self, repository: Repository) -> None:
        self.repositories[repository.kind, repository.name] = repository

    @contextmanager
    def serving(self) -> Iterator[FakeHub]:
        servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(self)) for _ in range(2)]
        for server in servers:
            server.daemon_threads = True
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        # Large files come from another server, to which clients send no token.
        # Of another host, by its name: clients follow redirections within a host by themselves.
        hosts = ("127.0.0.1", "localhost")
        self.endpoint, self.store = (
            f"http://{host}:{server.server_address[1]}"
            for host, server in zip(hosts, servers, strict=True)
        )
        try:
            yield self
        finally:
            for server in servers:
                server.shutdown()
                server.server_close()


def use_hub(monkeypatch: pytest.MonkeyPatch, endpoint: str, cache: Path) -> None:
    """Let the clients of this process ask another hub, with caches of their own.

    They have read the environment when they were imported, older ones into several modules.
    """
    import datasets
    import huggingface_hub
    from huggingface_hub import constants

    values = {
        "ENDPOINT": endpoint,
        "HF_ENDPOINT": endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HUB_DATASETS_URL": endpoint + "/datasets/{repo_id}/resolve/{revision}/{path}",
        "HF_HUB_CACHE": str(cache / "hub"),
        "HUGGINGFACE_HUB_CACHE": str(cache / "hub"),
        "HF_HUB_ETAG_TIMEOUT": 5,
        "HF_DATASETS_CACHE": cache / "datasets",
        "DOWNLOADED_DATASETS_PATH": cache / "datasets" / "downloads",
    }
    clients = [
        module
        for name, module in list(sys.modules.items())
        if name.split(".")[0] == "huggingface_hub" or module in (constants, datasets.config)
    ]
    for module in clients:
        for name in values.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, values[name])
    set_offline(monkeypatch, False)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", endpoint)
    huggingface_hub.HfFileSystem.clear_instance_cache()


def set_offline(monkeypatch: pytest.MonkeyPatch, offline: bool = True) -> None:
    """Take the network away from the clients, as ``HF_HUB_OFFLINE`` does, or give it back."""
    import datasets
    from huggingface_hub import constants, utils

    for owner in (constants, datasets.config):
        monkeypatch.setattr(owner, "HF_HUB_OFFLINE", offline)
    # Connections of older clients are made for one or the other.
    getattr(utils._http, "reset_sessions", lambda: None)()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


_API = re.compile(
    r"^/api/(datasets|models)/([^/]+/[^/]+)(?:/(revision|tree|paths-info|commits)/([^/]+)(?:/(.+))?)?$"
)
_FILE = re.compile(r"^(/datasets)?/([^/]+/[^/]+)/resolve/([^/]+)/(.+)$")


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def do_POST(self) -> None:
            self.answer()

        def answer(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            body = self.rfile.read(length).decode()
            url = urllib.parse.urlsplit(self.path)
            path = urllib.parse.unquote(url.path)
            hub.asked.append(f"{self.command} {path}")
            if hub.busy > 0 and path.startswith("/api/datasets"):
                hub.busy -= 1
                self.send(429, b"slow down", {"Retry-After": "7"})
            elif path.startswith("/large/"):
                _, _, kind, owner, name, rest = path.split("/", 5)
                self.send_file(hub.repositories[kind, f"{owner}/{name}"], rest, {})
            elif found := _API.match(path):
                self.answer_api(found, urllib.parse.parse_qs(url.query), body)
            elif found := _FILE.match(path):
                self.answer_file(found)
            else:
                self.refuse(404, None, "no such page")

        def answer_api(self, found: re.Match[str], query: dict[str, list[str]], body: str) -> None:
            kind, name, what, revision, folder = found.groups()
            repository = self.find(kind, name, revision or "main")
            if repository is None:
                return
            if what == "tree":
                recursive = query.get("recursive", ["false"])[0].lower() == "true"
                self.send_json(repository.tree(folder or "", recursive))
            elif what == "commits":
                more = {"title": "", "message": "", "authors": [], "date": "2026-01-01T00:00:00Z"}
                self.send_json([{"id": repository.commit} | more])
            elif what == "paths-info":
                is_json = "json" in self.headers.get("Content-Type", "")
                paths = (
                    json.loads(body)["paths"] if is_json else urllib.parse.parse_qs(body)["paths"]
                )
                known = {str(e["path"]): e for e in repository.tree("", recursive=True)}
                self.send_json([known[path] for path in paths if path in known])
            else:
                files = [
                    {"rfilename": path, "size": len(content)}
                    for path, content in sorted(repository.files.items())
                ]
                info = {"id": name, "_id": "0", "sha": repository.commit, "siblings": files}
                more = {"private": False, "gated": False, "disabled": False, "tags": []}
                more |= {"downloads": 0, "likes": 0, "lastModified": "2026-01-01T00:00:00.000Z"}
                self.send_json(info | more)

        def answer_file(self, found: re.Match[str]) -> None:
            dataset, name, revision, path = found.groups()
            kind = "datasets" if dataset else "models"
            repository = self.find(kind, name, revision)
            if repository is None:
                return
            commit = {"X-Repo-Commit": repository.commit}
            if path not in repository.files:
                self.refuse(404, "EntryNotFound", "Entry not found", commit)
            elif path.endswith(LARGE):
                linked = {"X-Linked-Size": str(len(repository.files[path]))}
                linked["X-Linked-Etag"] = f'"{sha256(repository.files[path])}"'
                place = f"{hub.store}/large/{kind}/{name}/{path}"
                self.send(302, b"", commit | linked | {"Location": place})
            else:
                self.send_file(repository, path, commit)

        def find(self, kind: str, name: str, revision: str) -> Repository | None:
            repository = hub.repositories.get((kind, name))
            if repository is None:
                self.refuse(401, "RepoNotFound", "Repository not found")
            elif repository.gated and "/resolve/" in self.path:  # what it is may be asked
                self.refuse(401, "GatedRepo", f"Access to {name} is restricted")
            elif not repository.is_revision(revision):
                self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            else:
                return repository
            return None

        def send_file(self, repository: Repository, path: str, headers: dict[str, str]) -> None:
            content = repository.files[path]
            large = path.endswith(LARGE)
            tag = sha256(content) if large else str(repository.entry(path)["oid"])
            headers |= {"ETag": f'"{tag}"', "Accept-Ranges": "bytes"}
            headers |= {"Last-Modified": formatdate(0, usegmt=True)}
            code, asked = 200, self.headers.get("Range")
            if asked is not None:
                first, _, last = asked.removeprefix("bytes=").partition("-")
                start, stop = int(first), int(last or len(content) - 1) + 1
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
                code, content = 206, content[start:stop]
            length, is_get = str(len(content)), self.command == "GET"
            if is_get and (path in hub.cut or path in hub.broken):
                content = content[: hub.cut.pop(path, 0)]
                self.close_connection = True
            hub.sent[path] = hub.sent.get(path, 0) + is_get * len(content)
            self.send(code, content, headers | {"Content-Length": length})

        def send_json(self, content: object) -> None:
            self.send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

        def refuse(
            self, code: int, error: str | None, message: str, headers: dict[str, str] | None = None
        ) -> None:
            said = {"X-Error-Code": error} if error else {}
            content = json.dumps({"error": message}).encode()
            self.send(code, content, said | {"X-Error-Message": message} | (headers or {}))

        def send(self, code: int, content: bytes, headers: dict[str, str]) -> None:
            self.send_response(code)
            for name, value in ({"Content-Length": str(len(content))} | headers).items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)
                self.wfile.flush()

    return Handler
