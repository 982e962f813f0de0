"""A stand-in for the hub: the routes that uploading calls, over HTTP, on this machine; it keeps what it is given."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_standsinforarealonethatopensdoors"


class Hub:
    """repos: id -> {"private": …, "files": {name: bytes}}. status: answer everything with this error instead."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Any]] = {}
        self.blobs: dict[str, bytes] = {}
        self.status: int | None = None
        self.asked: list[str] = []
        self.url = ""


@contextmanager
def hub() -> Iterator[Hub]:
    """A running stand-in; `url` is its endpoint."""
    held = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": held}))
    held.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield held
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.asked.append(self.path)
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._answer(401, {"error": f"Invalid credentials {self.headers.get('Authorization')}"})
        if self.hub.status is not None:
            return self._answer(self.hub.status, {"error": f"refused {self.headers.get('Authorization')}"})
        if self.path == "/api/repos/create":
            return self._create(json.loads(body))
        if self.path == "/api/validate-yaml":  # of a README.md, before it is taken
            return self._answer(200, {"errors": [], "warnings": []})
        repo, _, what = self.path.removeprefix("/api/models/").removeprefix("/").partition(".git/")
        if what == "info/lfs/objects/batch":
            return self._batch(json.loads(body))
        org, name, verb, *_ = repo.split("/")
        if verb == "preupload":
            return self._modes(json.loads(body))
        return self._commit(f"{org}/{name}", [json.loads(line) for line in body.splitlines()])

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(body).hexdigest() == oid
        self.hub.blobs[oid] = body
        self._answer(200, {})

    def _create(self, asked: dict[str, Any]) -> None:
        name = f"{asked['organization']}/{asked['name']}"
        private = asked.get("private", asked.get("visibility") == "private")
        self.hub.repos.setdefault(name, {"private": bool(private), "files": {}})
        self._answer(200, {"url": f"{self.hub.url}/{name}"})

    def _modes(self, asked: dict[str, Any]) -> None:
        modes = {f["path"]: "lfs" if f["path"].endswith(".safetensors") else "regular" for f in asked["files"]}
        files = [{"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()]
        self._answer(200, {"files": files})

    def _batch(self, asked: dict[str, Any]) -> None:
        where = {o["oid"]: {"upload": {"href": f"{self.hub.url}/blobs/{o['oid']}"}} for o in asked["objects"]}
        objects = [{**o, "actions": where[o["oid"]]} for o in asked["objects"]]
        self._answer(200, {"transfer": "basic", "objects": objects}, kind="application/vnd.git-lfs+json")

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        files = self.hub.repos[repo]["files"]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        self._answer(200, {"commitUrl": f"{self.hub.url}/{repo}/commit/{'0' * 40}", "commitOid": "0" * 40})

    def _answer(self, status: int, content: dict[str, Any], kind: str = "application/json") -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Not to the tests' output."""
