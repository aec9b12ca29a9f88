"""A stand-in for the part of the Hugging Face hub's API that an upload uses, on this machine and in memory.

Large files and weights come by the LFS protocol ("basic"), others within the commit, as they do at the hub. What the
hub's newer storage (Xet) does instead is not here.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

FIRST = {".gitattributes": b"*.safetensors filter=lfs\n"}  # what a repository has from the beginning
ORGS = [{"name": "lab", "roleInOrg": "write"}, {"name": "press", "roleInOrg": "read"}]


@dataclass
class Repo:
    """A repository: the files of each revision, and the messages of its commits."""

    private: bool
    revisions: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": dict(FIRST)})
    commits: dict[str, list[str]] = field(default_factory=lambda: {"main": ["initial commit"]})


class Refusal(Exception):
    """An answer that is not 200: its status, what it says, its X-Error-Code, and what else it holds."""

    def __init__(self, status: int, message: str, code: str = "", **more: str):
        super().__init__(message)
        self.status, self.code, self.more = status, code, more


@dataclass
class Hub:
    """The state of the hub, and all requests that it got.

    Attributes:
        tokens: user and role by token.
        repos: repositories by name.
        lfs: contents by SHA-256.
        requests: "METHOD /path" of every request, in order.
        failures: regular expressions of requests that fail with status 500, each once.
    """

    tokens: dict[str, tuple[str, str]]
    repos: dict[str, Repo] = field(default_factory=dict)
    lfs: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    endpoint: str = ""

    def answer(self, method: str, path: str, body: bytes, token: str) -> Any:
        """Return the answer to a request, as JSON or None. Raises Refusal."""
        self.requests.append(f"{method} {path}")
        for pattern in self.failures:
            if re.search(pattern, self.requests[-1]):
                self.failures.remove(pattern)
                raise Refusal(500, "the hub is out of order")
        if path.startswith("/lfs/"):  # a signed address, without a token
            assert hashlib.sha256(body).hexdigest() == path.removeprefix("/lfs/")
            self.lfs[path.removeprefix("/lfs/")] = body
            return {}
        if token not in self.tokens:
            raise Refusal(401, "Invalid username or password.")
        user, role = self.tokens[token]
        if path == "/api/whoami-v2":
            return {"name": user, "orgs": ORGS, "auth": {"accessToken": {"role": role}}}
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(user, json.loads(body))
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._repo(found[1], user)
            return self._batch(json.loads(body))
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/([a-z]+))?(?:/([^/]+))?", path)
        assert found, path
        if found[2] == "commit":
            self._commit(self._repo(found[1], user), found[3], [json.loads(line) for line in body.splitlines()])
            return {"commitUrl": f"{self.endpoint}/{found[1]}/commit/{'0' * 40}", "commitOid": "0" * 40}
        return self._model(found[2], self._repo(found[1], user), found[3], body)

    def _create(self, user: str, asked: dict[str, Any]) -> dict[str, str]:
        owner = asked["organization"] or user
        if owner not in (user, "lab"):
            raise Refusal(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        name = f"{owner}/{asked['name']}"
        if name in self.repos:
            raise Refusal(409, "You already created this model repo", url=f"{self.endpoint}/{name}")
        self.repos[name] = Repo(private=asked["visibility"] == "private")
        return {"url": f"{self.endpoint}/{name}"}

    def _repo(self, name: str, user: str) -> Repo:
        repo = self.repos.get(name)
        if repo is None or (repo.private and name.split("/")[0] not in (user, "lab")):
            raise Refusal(404, "Repository not found", "RepoNotFound")
        return repo

    def _batch(self, asked: dict[str, Any]) -> dict[str, Any]:
        objects = []
        for item in asked["objects"]:
            upload = {"upload": {"href": f"{self.endpoint}/lfs/{item['oid']}"}}
            objects.append(item | ({} if item["oid"] in self.lfs else {"actions": upload}))
        return {"transfer": "basic", "objects": objects}

    def _model(self, what: str | None, repo: Repo, revision: str, body: bytes) -> Any:
        if what is None:
            return {"id": "x", "private": repo.private, "sha": "0" * 40, "siblings": []}
        if what == "refs":
            branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": "0" * 40} for n in repo.revisions]
            return {"branches": branches, "converts": [], "tags": []}
        if what == "branch":
            repo.revisions[revision] = dict(repo.revisions["main"])
            repo.commits[revision] = list(repo.commits["main"])
            return None
        files = repo.revisions[revision]
        if what == "revision":
            return {"id": "x", "private": repo.private, "sha": "0" * 40, "siblings": []}
        if what == "tree":
            return [{"type": "file", "path": p, "size": len(c), "oid": "0" * 40} for p, c in files.items()]
        assert what == "preupload", what
        return {"files": [_mode(item, files) for item in json.loads(body)["files"]]}

    def _commit(self, repo: Repo, revision: str, lines: list[dict[str, Any]]) -> None:
        files = repo.revisions[revision]
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                repo.commits[revision].append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.lfs[value["oid"]]  # which has to be there
            else:
                assert line["key"] == "deletedFile"
                del files[value["path"]]


def _mode(item: dict[str, Any], files: dict[str, bytes]) -> dict[str, Any]:
    path, there = item["path"], files.get(item["path"])
    lfs = path.endswith(".safetensors")
    oid = None
    if there is not None:
        blob = f"blob {len(there)}\0".encode() + there
        oid = hashlib.sha256(there).hexdigest() if lfs else hashlib.sha1(blob).hexdigest()
    return {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid}


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    """Serve a hub on a port of this machine within the `with` block. Its address is `hub.endpoint`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
            status, code = 200, ""
            try:
                answer = hub.answer(self.command, self.path.partition("?")[0], body, token)
            except Refusal as refusal:
                status, code, answer = refusal.status, refusal.code, {"error": str(refusal), **refusal.more}
            content = b"" if answer is None else json.dumps(answer).encode()
            self.send_response(status)
            if code:
                self.send_header("X-Error-Code", code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_PUT = _answer

        def log_message(self, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
