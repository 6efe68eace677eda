"""A stand-in for the hub on this machine: repositories are made, committed to and read over HTTP, as its API has it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

Files = dict[str, bytes]


class Hub(ThreadingHTTPServer):
    """The repositories: name -> branch -> path -> bytes."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, Files]] = {}
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    """The few requests that pushing and loading need; anything else is not found."""

    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        assert isinstance(self.server, Hub)
        return self.server

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def say(self, data: Any, status: int = 200) -> None:
        self.answer(status, json.dumps(data).encode(), Content_Type="application/json")

    def missing(self, what: str) -> None:
        self.answer(404, b"{}", X_Error_Code=what)

    def handle_any(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append(f"{self.command} {path}")
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length) if length else b""
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self.chunks()
        if path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.say({"errors": [], "warnings": []})
        elif found := re.fullmatch(
            r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/(.+)", path
        ):
            self.write(*found.groups(), body)
        elif found := re.fullmatch(
            r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+).*)?", path
        ):
            self.describe(*found.groups())
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self.resolve(*found.groups())
        else:
            self.missing("RepoNotFound")

    do_GET = do_POST = do_HEAD = handle_any

    def chunks(self) -> bytes:
        found = b""
        while size := int(self.rfile.readline().strip(), 16):
            found += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return found

    def create(self, asked: dict[str, Any]) -> None:
        organisation = asked.get("organization") or "me"
        name = f"{organisation}/{asked['name']}"
        known = name in self.hub.repositories
        self.hub.repositories.setdefault(name, {"main": {}})
        self.say({"url": f"{self.hub.url}/{name}", "name": name, "id": name}, 409 if known else 200)

    def write(self, name: str, verb: str, branch: str, body: bytes) -> None:
        """What changes a repository."""
        if name not in self.hub.repositories:
            return self.missing("RepoNotFound")
        branches = self.hub.repositories[name]
        if verb == "branch":
            branches.setdefault(branch, dict(branches["main"]))
            return self.say({})
        if branch not in branches:
            return self.missing("RevisionNotFound")
        if verb == "preupload":
            wanted = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in wanted
            ]
            return self.say({"files": modes})
        for line in body.decode().splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                value = entry["value"]
                branches[branch][value["path"]] = base64.b64decode(value["content"])
        oid = revision_of(branches[branch])
        self.say({"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid})

    def describe(self, name: str, what: str | None, branch: str | None) -> None:
        files = self.hub.repositories.get(name, {}).get(branch or "main")
        if files is None:
            return self.missing("RepoNotFound")
        listed = [
            {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
            for path, data in files.items()
        ]
        if what == "tree":
            return self.say(listed)
        siblings = [{"rfilename": path} for path in files]
        self.say(
            {"id": name, "modelId": name, "sha": revision_of(files), "siblings": siblings, "tags": [],
             "private": False, "downloads": 0, "likes": 0}
        )  # fmt: skip

    def resolve(self, name: str, revision: str, path: str) -> None:
        branches = self.hub.repositories.get(name)
        if branches is None:
            return self.missing("RepoNotFound")
        there = {revision_of(files): files for files in branches.values()} | branches
        files = there.get(revision)
        if files is None:
            return self.missing("RevisionNotFound")
        if path not in files:
            return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=revision_of(files))
        data = files[path]
        self.answer(
            200, data, ETag=f'"{hashlib.sha1(data).hexdigest()}"', X_Repo_Commit=revision_of(files)
        )


def revision_of(files: Files) -> str:
    """The commit that a set of files stands for."""
    parts = sorted((path, hashlib.sha1(data).hexdigest()) for path, data in files.items())
    return hashlib.sha1(json.dumps(parts).encode()).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers inside the ``with``."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join(10)
