"""A Hub of our own on localhost: enough of its HTTP API to create a repository, upload to it, and download from it."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub:
    """``repositories``: {name: {path: bytes}}. ``gated``: names that nobody may read. ``writable``: False answers 403."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.writable = True
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.server.server_port}"


def _handler(hub: FakeHub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: object) -> None:
            pass

        def answer(self, body: object = None, status: int = 200, headers: dict[str, str] | None = None) -> None:
            data = body if isinstance(body, bytes) else json.dumps(body if body is not None else {}).encode()
            self.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def refuse(self, status: int, code: str) -> None:
            self.answer({"error": code}, status, {"X-Error-Code": code, "X-Error-Message": code})

        def body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") == "chunked":
                chunks = []
                while size := int(self.rfile.readline(), 16):
                    chunks.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(chunks)
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"{self.command} {path}")
            if path == "/api/whoami-v2":
                return self.answer({"name": "me", "type": "user", "orgs": []})
            if match := re.fullmatch(r"/api/models/(.+?)(?:/(revision|tree)/([^/]+)(?:/.*)?)?", path):
                name, what, revision = match.groups()
                if name in hub.gated:
                    return self.refuse(403, "GatedRepo")
                if name not in hub.repositories:
                    return self.refuse(404, "RepoNotFound")
                if revision not in (None, "main", COMMIT):
                    return self.refuse(404, "RevisionNotFound")
                files = hub.repositories[name]
                if what == "tree":
                    entries = [{"type": "file", "path": p, "size": len(d), "oid": _oid(d)} for p, d in files.items()]
                    return self.answer(entries)
                return self.answer({"id": name, "sha": COMMIT, "siblings": [{"rfilename": p} for p in files]})
            if match := re.fullmatch(r"/(.+?)/resolve/[^/]+/(.+)", path):
                name, file = match.groups()
                data = hub.repositories.get(name, {}).get(file)
                if data is None:
                    return self.refuse(404, "EntryNotFound")
                return self.answer(data, headers={"ETag": f'"{_oid(data)}"', "X-Repo-Commit": COMMIT})
            return self.refuse(404, "RepoNotFound")

        do_HEAD = do_GET

        def do_PUT(self) -> None:
            data = self.body()
            hub.blobs[self.path.removeprefix("/lfs/")] = data
            self.answer()

        def do_POST(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.requests.append(f"POST {path}")
            data = self.body()
            if not hub.writable:
                return self.refuse(403, "Forbidden")
            if path == "/api/repos/create":
                asked = json.loads(data)
                name = f"{asked.get('organization') or 'me'}/{asked['name']}"
                hub.repositories.setdefault(name, {})
                return self.answer({"url": f"{hub.url}/{name}", "name": name})
            if match := re.fullmatch(r"/api/models/(.+)/preupload/(.+)", path):
                files = json.loads(data)["files"]
                modes = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                        "oid": None,
                    }
                    for file in files
                ]
                return self.answer({"files": modes})
            if re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
                objects = [
                    {**item, "actions": {"upload": {"href": f"{hub.url}/lfs/{item['oid']}"}}}
                    for item in json.loads(data)["objects"]
                ]
                return self.answer({"transfer": "basic", "objects": objects})
            if match := re.fullmatch(r"/api/models/(.+)/commit/(.+)", path):
                return self.commit(match[1], data)
            return self.refuse(404, "RepoNotFound")

        def commit(self, name: str, data: bytes) -> None:
            files = hub.repositories[name]
            for line in data.splitlines():
                item = json.loads(line)
                value = item["value"]
                if item["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif item["key"] == "lfsFile":
                    blob = hub.blobs[value["oid"]]
                    assert hashlib.sha256(blob).hexdigest() == value["oid"]
                    files[value["path"]] = blob
            self.answer({"commitUrl": f"{hub.url}/{name}/commit/{COMMIT}", "commitOid": COMMIT, "success": True})

    return Handler


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextlib.contextmanager
def running(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that huggingface_hub talks to instead of the real one."""
    hub = FakeHub()
    threading.Thread(target=hub.server.serve_forever, daemon=True).start()
    template = hub.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
