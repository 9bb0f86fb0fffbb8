"""A stand-in of the hub's API on this machine: it keeps what is uploaded, and answers as much as ``huggingface_hub`` asks."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Iterator
from urllib.parse import unquote, urlsplit

import yaml

TOKEN = "hf_of_the_stand_in"
LARGE = ".safetensors"
"""What goes the way of large files."""


class Hub:
    """Attributes:
    repos: id → {"private": …, "files": {path: bytes}}.
    refused: part of a path → status that it is answered with.
    role: of the token.
    requests: (method, path) of all, in order.
    """

    def __init__(self):
        self.repos: dict[str, dict] = {}
        self.refused: dict[str, int] = {}
        self.role = "write"
        self.requests: list[tuple[str, str]] = []
        self.large: dict[str, bytes] = {}

    def answer(self, method: str, path: str, body: bytes, token: str | None, host: str) -> tuple[int, object]:
        """Status, and a JSON-able answer."""
        self.requests.append((method, path))
        if status := next((status for part, status in self.refused.items() if part in path), None):
            return status, {"error": "the stand-in refuses"}
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if method == "PUT":  # no token goes to where large files lie
            self.large[path.rpartition("/")[2]] = body
            return 200, {}
        if token != f"Bearer {TOKEN}":
            return 401, {"error": "Invalid credentials in Authorization header"}
        if path == "/api/whoami-v2":
            orgs = [{"name": "lab"}]
            return 200, {"type": "user", "name": "ada", "orgs": orgs, "auth": {"accessToken": {"role": self.role}}}
        if path == "/api/repos/create":
            return self._create(json.loads(body), host)
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                {**each, "actions": {"upload": {"href": f"http://{host}/large/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        owner, name, *rest = path.removeprefix("/api/models/").split("/")
        repo = self.repos.get(f"{owner}/{name}")
        if repo is None:
            return 404, {"error": "Repository not found"}
        return self._of_repo(f"{owner}/{name}", repo, rest, body, host)

    def _create(self, asked: dict, host: str) -> tuple[int, object]:
        name = f"{asked.get('organization') or 'ada'}/{asked['name']}"
        if name in self.repos:
            return 409, {"error": "You already created this model repo", "url": f"http://{host}/{name}"}
        self.repos[name] = {"private": asked.get("private", asked.get("visibility") == "private"), "files": {}}
        return 200, {"url": f"http://{host}/{name}", "name": name}

    def _of_repo(self, name: str, repo: dict, rest: list[str], body: bytes, host: str) -> tuple[int, object]:
        files = repo["files"]
        if not rest or rest[0] == "revision":
            siblings = [{"rfilename": path} for path in files]
            return 200, {"id": name, "private": repo["private"], "sha": "0" * 40, "siblings": siblings, "tags": []}
        if rest[0] == "tree":
            return 200, [{"type": "file", "path": path, "size": len(data), "oid": "0" * 40} for path, data in files.items()]
        if rest[0] == "preupload":
            asked = json.loads(body)["files"]
            mode = lambda path: "lfs" if path.endswith(LARGE) else "regular"
            return 200, {"files": [{"path": f["path"], "uploadMode": mode(f["path"]), "shouldIgnore": False} for f in asked]}
        if rest[0] == "commit":
            for entry in map(json.loads, body.splitlines()):
                value = entry["value"]
                if entry["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif entry["key"] == "lfsFile":
                    data = self.large[value["oid"]]
                    assert hashlib.sha256(data).hexdigest() == value["oid"] and len(data) == value["size"]
                    files[value["path"]] = data
                elif entry["key"] == "deletedFile":
                    del files[value["path"]]
            return 200, {"success": True, "commitUrl": f"http://{host}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40}
        return 404, {"error": f"the stand-in does not know {rest}"}

    def _validate(self, content: str) -> tuple[int, object]:
        """A few of the hub's rules for the front matter (hub documentation, "Model cards")."""
        head = yaml.safe_load(content.split("---")[1])
        wrong = [
            key
            for key in ("license_name", "license_link", "library_name", "pipeline_tag")
            if not isinstance(head.get(key, ""), str)
        ]
        lists = {
            key: head[key] if isinstance(head[key], list) else [head[key]]
            for key in ("tags", "language", "base_model")
            if key in head
        }
        wrong += [key for key, values in lists.items() if not all(isinstance(value, str) for value in values)]
        wrong += ["license_name"] if head.get("license") == "other" and "license_name" not in head else []
        known = (None, "adapter", "merge", "quantized", "finetune")
        wrong += ["base_model_relation"] if head.get("base_model_relation") not in known else []
        return (400, {"errors": wrong}) if wrong else (200, {"errors": [], "warnings": []})


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[str]:
    """The address that it is reached by."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path, token = unquote(urlsplit(self.path).path), self.headers.get("Authorization")
            status, answer = hub.answer(self.command, path, body, token, self.headers["Host"])
            data = json.dumps(answer).encode()
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        do_GET = do_POST = do_PUT = do_HEAD = handle_any

        def log_message(self, *_) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
