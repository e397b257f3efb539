"""The Hub's endpoints that a push and a pull use, on 127.0.0.1: real HTTP for the real client.

Implements: make a repository (private or not), say what it is, branches, the check of a card's metadata (refuses the
licence `nonsense`), preupload, LFS batch with basic uploads and their check, commits (regular and LFS files, deletions,
parent commit), the tree of a revision, and downloads. Repositories are commits that map paths to contents, in memory.

Not implemented: Xet, multipart uploads, pull requests, tags, pages of long trees, gitignore, quotas, gated
repositories, redirects to other hosts. A token may read and write everything or, if it begins with `hf_read`, read.
"""

import hashlib
import json
import re
import threading
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_writeANDsecret0123456789abcdef"
READ_TOKEN = "hf_readANDsecret0123456789abcdef"
LFS = (".safetensors",)
"""Files that the preupload answer calls large, whatever their size."""


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass
class Repo:
    """One repository: its commits, and which one each branch stands at."""

    kind: str
    private: bool
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        state = json.dumps([len(self.messages), message, sorted((name, sha256(c)) for name, c in files.items())])
        oid = hashlib.sha1(state.encode()).hexdigest()
        self.commits[oid] = files
        self.branches[branch] = oid
        self.messages.append(message)
        return oid

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision, revision if revision in self.commits else None)

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.resolve(revision)]


@dataclass
class Hub:
    """State of the server.

    Attributes:
        url: where it listens.
        repos: by kind and id, such as `models`, `anna/toys`.
        objects: large files by SHA-256, whether a commit has them or not.
        requests: method and path of everything that was asked.
        breaks: asked before each request is answered; the connection is cut where it says so.
    """

    url: str = ""
    repos: dict[tuple[str, str], Repo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)
    breaks: Callable[[str, str], bool] = lambda method, path: False

    def model(self, name: str) -> Repo:
        return self.repos["models", name]

    def asked(self, pattern: str) -> list[str]:
        """Requests `METHOD PATH` that a pattern is found in."""
        return [f"{method} {path}" for method, path in self.requests if re.search(pattern, f"{method} {path}")]


@contextmanager
def serve() -> Iterator[Hub]:
    """Run a Hub on a free port."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        self.status, self.message, self.code = status, message, code


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        path = urlsplit(self.path).path
        self.body = self._read()
        self.hub.requests.append((self.command, path))
        if self.hub.breaks(self.command, path):
            self.close_connection = True
            self.connection.close()
            return
        try:
            for method, pattern, function in _ROUTES:
                match = re.fullmatch(pattern, path)
                if match and self.command in method:
                    return function(self, *(unquote(part) for part in match.groups()))
            raise _Refused(404, f"this test server has no {self.command} {path}")
        except _Refused as refused:
            headers = {"X-Error-Message": refused.message} | ({"X-Error-Code": refused.code} if refused.code else {})
            self._send({"error": refused.message}, refused.status, headers)

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _send(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _allow(self, *, write: bool = False) -> bool:
        """Whether somebody asks; refuse tokens that are unknown or may not write."""
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given not in (TOKEN, READ_TOKEN) and (given or write):
            raise _Refused(401, "Invalid credentials in Authorization header")
        if write and given != TOKEN:
            raise _Refused(403, "this token may not write")
        return bool(given)

    def _repo(self, kind: str, name: str, *, write: bool = False) -> Repo:
        known = self._allow()
        repo = self.hub.repos.get((kind, name))
        if repo is None or (repo.private and not known):
            raise _Refused(404 if known else 401, "Repository not found", "RepoNotFound")
        if write:
            self._allow(write=True)
        return repo

    def _commit_of(self, repo: Repo, revision: str) -> str:
        oid = repo.resolve(revision)
        if oid is None:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid

    def info(self, kind: str, name: str, revision: str = "main") -> None:
        repo = self._repo(kind, name)
        oid = self._commit_of(repo, revision)
        siblings = [{"rfilename": path} for path in repo.commits[oid]]
        self._send({"id": name, "sha": oid, "private": repo.private, "tags": [], "downloads": 0, "siblings": siblings})

    def create(self) -> None:
        self._allow(write=True)
        asked = json.loads(self.body)
        kind, name = f"{asked.get('type', 'model')}s", f"{asked['organization']}/{asked['name']}"
        if (kind, name) in self.hub.repos:
            raise _Refused(409, "You already created this repo")
        repo = Repo(kind, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        self.hub.repos[kind, name] = repo
        self._send({"url": f"{self.hub.url}/{name}", "name": name, "id": name})

    def branch(self, kind: str, name: str, branch: str) -> None:
        repo = self._repo(kind, name, write=True)
        if branch in repo.branches:
            raise _Refused(409, "Reference already exists")
        repo.branches[branch] = self._commit_of(repo, json.loads(self.body or b"{}").get("startingPoint", "main"))
        self._send({})

    def check_card(self) -> None:
        card = json.loads(self.body)["content"]
        assert card.startswith("---\n")
        wrong = [{"message": '"license" must be one of a list'}] if "\nlicense: nonsense\n" in card else []
        self._send({"errors": wrong, "warnings": []}, 400 if wrong else 200)

    def preupload(self, kind: str, name: str, revision: str) -> None:
        repo = self._repo(kind, name, write=True)
        there = repo.commits[self._commit_of(repo, revision)]

        def say(path: str) -> dict[str, Any]:
            large = path.endswith(LFS)
            oid = None if path not in there else sha256(there[path]) if large else git_hash(there[path])
            return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

        self._send({"files": [say(file["path"]) for file in json.loads(self.body)["files"]]})

    def batch(self, name: str) -> None:
        self._repo("models", name, write=True)

        def say(wanted: dict[str, Any]) -> dict[str, Any]:
            oid = wanted["oid"]
            if oid in self.hub.objects:
                return wanted
            check = {"href": f"{self.hub.url}/verify"}
            put = {"href": f"{self.hub.url}/objects/{oid}?X-Amz-Signature=anything"}
            return wanted | {"actions": {"upload": put, "verify": check}}

        self._send({"transfer": "basic", "objects": [say(wanted) for wanted in json.loads(self.body)["objects"]]})

    def put_object(self, oid: str) -> None:
        assert sha256(self.body) == oid
        self.hub.objects[oid] = self.body
        self._send(b"")

    def verify(self) -> None:
        asked = json.loads(self.body)
        if len(self.hub.objects.get(asked["oid"], b"")) != asked["size"]:
            raise _Refused(422, "size does not match")
        self._send({})

    def commit(self, kind: str, name: str, revision: str) -> None:
        repo = self._repo(kind, name, write=True)
        lines = [json.loads(line) for line in self.body.splitlines()]
        head = self._commit_of(repo, revision)
        files = dict(repo.commits[head])
        header = lines[0]["value"]
        if header.get("parentCommit", head) != head:
            raise _Refused(412, "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.objects[value["oid"]]
            else:
                assert line["key"] == "deletedFile"
                del files[value["path"]]
        oid = repo.commit(revision, files, header["summary"])
        self._send({"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid, "success": True})

    def tree(self, kind: str, name: str, revision: str) -> None:
        repo = self._repo(kind, name)
        files = repo.commits[self._commit_of(repo, revision)]
        folders = {path.rpartition("/")[0] for path in files} - {""}
        entries: list[dict[str, Any]] = [{"type": "directory", "path": path, "oid": "0" * 40} for path in folders]
        for path, content in files.items():
            entry = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
            if path.endswith(LFS):
                entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        self._send(entries)

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo = self._repo("models", name)
        oid = self._commit_of(repo, revision)
        if path not in repo.commits[oid]:
            raise _Refused(404, "Entry not found", "EntryNotFound")
        content = repo.commits[oid][path]
        etag = sha256(content) if path.endswith(LFS) else git_hash(content)
        self._send(content, headers={"X-Repo-Commit": oid, "ETag": f'"{etag}"'})


_KIND, _NAME, _REVISION = "/api/(models|datasets|spaces)", "/([^/]+/[^/]+)", "/([^/]+)"
_ROUTES: list[tuple[tuple[str, ...], str, Callable[..., None]]] = [
    (("GET",), f"{_KIND}{_NAME}", _Handler.info),
    (("GET",), f"{_KIND}{_NAME}/revision{_REVISION}", _Handler.info),
    (("GET",), f"{_KIND}{_NAME}/tree{_REVISION}", _Handler.tree),
    (("POST",), "/api/repos/create", _Handler.create),
    (("POST",), "/api/validate-yaml", _Handler.check_card),
    (("POST",), f"{_KIND}{_NAME}/branch{_REVISION}", _Handler.branch),
    (("POST",), f"{_KIND}{_NAME}/preupload{_REVISION}", _Handler.preupload),
    (("POST",), f"{_KIND}{_NAME}/commit{_REVISION}", _Handler.commit),
    (("POST",), "/([^/]+/[^/]+).git/info/lfs/objects/batch", _Handler.batch),
    (("PUT",), "/objects/([0-9a-f]+)", _Handler.put_object),
    (("POST",), "/verify", _Handler.verify),
    (("GET", "HEAD"), f"{_NAME}/resolve{_REVISION}/(.+)", _Handler.resolve),
]
