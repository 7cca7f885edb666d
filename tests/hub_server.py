"""A Hub on loopback: the endpoints that the real client uses for models, with faults to order and a log."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LARGE = 20_000  # bytes from which a file goes the way of large ones
Status = tuple[Literal["status"], int, dict[str, str]]  # this status with these headers
Cut = tuple[Literal["cut"], float]  # this share of the bytes, then the connection ends
Page = tuple[Literal["page"], bytes]  # this in place of the answer
Fault = Status | Cut | Page | Literal["corrupt"]


def git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Repository:
    """commits: commit -> files, oldest first. heads: branch -> commit. requests: the pull requests."""

    def __init__(self, files: Mapping[str, bytes], private: bool = False, gated: bool = False) -> None:
        self.private, self.gated = private, gated
        self.commits: dict[str, dict[str, bytes]] = {}
        self.heads: dict[str, str] = {}
        self.requests: list[dict[str, object]] = []
        self.commit("main", files)

    def commit(self, branch: str, files: Mapping[str, bytes]) -> str:
        number = f"{len(self.commits) + 1:040x}"
        self.commits[number] = dict(files)
        self.heads[branch] = number
        return number

    def knows(self, revision: str) -> bool:
        return self.heads.get(revision, revision) in self.commits

    def at(self, revision: str) -> dict[str, bytes]:
        return self.commits[self.heads.get(revision, revision)]


class Server(ThreadingHTTPServer):
    """log: (method, path, bytes of a body or answer, Range). faults: list of (pattern, what), each used once."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.stored: dict[str, bytes] = {}
        self.log: list[tuple[str, str, int, str | None]] = []
        self.faults: list[tuple[str, Fault]] = []
        self.tokens = {"hf_writer": True, "hf_reader": False}
        self.untracked_files: list[str] = []  # tokens that a host saw that is not the Hub
        self.extra: list[dict[str, object]] = []  # entries that listings name besides

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fault(self, method: str, path: str) -> Fault | None:
        for place, (pattern, what) in enumerate(self.faults):
            if re.search(pattern, f"{method} {path}"):
                del self.faults[place]
                return what
        return None

    def handle_error(self, *_: object) -> None:
        pass  # connections are broken on purpose


def environment_of(server: Server, home: Path) -> dict[str, str]:
    """Return the environment in which a program takes this server for the Hub, with its cache in a folder."""
    return {
        "HF_ENDPOINT": server.address,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


@contextmanager
def running() -> Iterator[Server]:
    server = Server()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, said: object = b"", **headers: str) -> None:
        """Send bytes as they are, anything else as JSON."""
        body = said if isinstance(said, bytes) else json.dumps(said).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        if "Content_Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @property
    def token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def body(self, cut: float = 1.0) -> bytes:
        length = int(self.headers.get("Content-Length") or 0)
        data = self.rfile.read(int(length * cut))
        self.server.log.append((self.command, self.path, len(data), None))
        return data

    def handle_any(self) -> None:
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        if self.command == "GET" and self.elsewhere(path):
            return None
        what = self.server.fault(self.command, path)
        if isinstance(what, tuple) and what[0] == "status":
            self.body()
            return self.answer(what[1], b"{}", **what[2])
        if isinstance(what, tuple) and what[0] == "page":
            return self.answer(200, what[1])
        if self.command in ("GET", "HEAD"):
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
                return self.info(match[1], match[2] or "main")
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/(refs/pr/\d+|[^/]+)/?", path):
                return self.tree(match[1], match[2], query.get("recursive", [""])[0].lower() == "true")
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/discussions", path):
                found = self.server.repositories[match[1]].requests
                return self.answer(200, {"discussions": found, "count": len(found), "start": 0})
            if match := re.fullmatch(r"(?:/cdn)?/([^/]+/[^/]+)/resolve/(refs/pr/\d+|[^/]+)/(.+)", path):
                return self.resolve(match[1], match[2], match[3], what)
            return self.answer(404)
        if match := re.fullmatch(r"/lfs-put/([0-9a-f]{64})", path):
            if isinstance(what, tuple) and what[0] == "cut":
                self.body(what[1])
                self.close_connection = True
                return None
            data = self.body()
            self.server.stored[match[1]] = data
            return self.answer(200 if sha256(data) == match[1] else 400)
        data = self.body()
        if path == "/api/validate-yaml":
            front = json.loads(data)["content"].split("---\n")
            fine = front[0] == "" and isinstance(yaml.safe_load(front[1]).get("license"), str)
            errors = [] if fine else [{"message": "no license"}]
            return self.answer(200 if fine else 400, {"errors": errors, "warnings": []})
        if not self.server.tokens.get(self.token):
            known = self.token in self.server.tokens
            return self.answer(403 if known else 401, b"{}", X_Error_Message="no")
        return self.write(path, query, data)

    def elsewhere(self, path: str) -> bool:
        """Send a large file's reader to another host, as the Hub does, which must not see a token."""
        match = re.fullmatch(r"(/cdn)?/([^/]+/[^/]+)/resolve/(refs/pr/\d+|[^/]+)/(.+)", path)
        if not match:
            return False
        if match[1]:
            self.server.untracked_files += [self.token] if self.token else []
            return False
        held = self.server.repositories.get(match[2])
        if not held or self.refusal(held) or not held.knows(match[3]):
            return False
        if len(held.at(match[3]).get(match[4], b"")) < LARGE:
            return False
        self.answer(302, b"", Location=f"http://localhost:{self.server.server_port}/cdn{path}")
        return True

    def refusal(self, repository: Repository) -> bool:
        """Tell whether this reader may not read."""
        return (repository.gated or repository.private) and self.token not in self.server.tokens

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def write(self, path: str, query: Mapping[str, list[str]], data: bytes) -> None:
        server = self.server
        if path == "/api/repos/create":
            asked = json.loads(data)
            name = f"{asked['organization']}/{asked['name']}"
            if name in server.repositories:
                return self.answer(409, {"url": f"{server.address}/{name}"})
            server.repositories[name] = Repository({".gitattributes": b"x"}, asked.get("visibility") == "private")
            return self.answer(200, {"url": f"{server.address}/{name}", "name": name, "id": name})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
            repository = server.repositories[match[1]]
            if match[2] in repository.heads:
                return self.answer(409, {"error": "there"})
            repository.heads[match[2]] = repository.heads["main"]
            return self.answer(200, {})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            there = server.repositories[match[1]].at(match[2])
            files = []
            for file in json.loads(data)["files"]:
                mode = "lfs" if file["size"] >= LARGE else "regular"
                old = there.get(file["path"])
                oid = old and (sha256(old) if len(old) >= LARGE else git_hash(old))
                files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
            return self.answer(200, {"files": files})
        if re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            objects = []
            for entry in json.loads(data)["objects"]:
                found: dict[str, object] = {"oid": entry["oid"], "size": entry["size"]}
                if entry["oid"] not in server.stored:
                    found["actions"] = {"upload": {"href": f"{server.address}/lfs-put/{entry['oid']}"}}
                objects.append(found)
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            return self.commit(match[1], match[2], "create_pr" in query, data)
        return self.answer(404)

    def commit(self, name: str, branch: str, as_request: bool, data: bytes) -> None:
        repository = self.server.repositories[name]
        files = dict(repository.at(branch))
        title = ""
        for line in data.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "header":
                title = value["summary"]
            elif entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]
        said = {}
        if as_request:
            number = len(repository.requests) + 1
            branch = f"refs/pr/{number}"
            author = {"name": "me"}
            said["pullRequestUrl"] = f"{self.server.address}/{name}/discussions/{number}"
            repository.requests.append(
                {"num": number, "title": title, "status": "open", "isPullRequest": True, "author": author}
                | {"createdAt": "2026-01-01T00:00:00.000Z", "repo": {"name": name, "type": "model"}}
            )
        commit = repository.commit(branch, files)
        said |= {"commitUrl": f"{self.server.address}/{name}/commit/{commit}", "commitOid": commit}
        return self.answer(200, said)

    def refused(self, name: str, revision: str) -> bool:
        """Answer a reader who may not read, or asks for what is not there; tell whether that was so."""
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and self.token not in self.server.tokens):
            self.answer(401, b"{}", X_Error_Code="RepoNotFound")
        elif not repository.knows(revision):
            self.answer(404, b"{}", X_Error_Code="RevisionNotFound")
        else:
            return False
        return True

    def info(self, name: str, revision: str) -> None:
        if self.refused(name, revision):
            return None
        repository = self.server.repositories[name]
        files = repository.at(revision)
        commit = repository.heads.get(revision, revision)
        body = {"id": name, "sha": commit, "private": repository.private, "tags": []}
        return self.answer(200, body | {"siblings": [{"rfilename": file} for file in files]})

    def tree(self, name: str, revision: str, recursive: bool) -> None:
        if self.refused(name, revision):
            return None
        body = list(self.server.extra)
        files = self.server.repositories[name].at(revision)
        for folder in {path.partition("/")[0] for path in files if "/" in path}:
            body.append({"type": "directory", "path": folder, "size": 0, "oid": git_hash(folder.encode())})
        for path, data in files.items():
            if "/" in path and not recursive:
                continue
            entry: dict[str, object] = {"type": "file", "path": path, "size": len(data), "oid": git_hash(data)}
            if len(data) >= LARGE:
                entry["lfs"] = {"oid": sha256(data), "size": len(data), "pointerSize": 130}
            body.append(entry)
        return self.answer(200, body)

    def resolve(self, name: str, revision: str, file: str, fault: Fault | None) -> None:
        signed = self.path.startswith("/cdn/")
        if not signed and self.refused(name, revision):
            return None
        repository = self.server.repositories[name]
        if not signed and repository.gated and self.token not in self.server.tokens:
            return self.answer(403 if self.token else 401, b"", X_Error_Code="GatedRepo")
        data = repository.at(revision).get(file)
        if data is None:
            return self.answer(404, b"", X_Error_Code="EntryNotFound")
        headers = {"ETag": f'"{sha256(data) if len(data) >= LARGE else git_hash(data)}"', "Accept_Ranges": "bytes"}
        headers["X_Repo_Commit"] = repository.heads.get(revision, revision)
        if self.command == "HEAD" and len(data) >= LARGE:
            headers |= {"X_Linked_Etag": headers["ETag"], "X_Linked_Size": str(len(data)), "ETag": '"of-the-pointer"'}
            there = f"http://localhost:{self.server.server_port}/cdn{self.path}"
            return self.answer(302, b"", Location=there, **headers)
        if self.command == "HEAD":
            return self.answer(200, data, **headers)
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        first = int(asked[1]) if asked else 0
        if asked:
            headers["Content_Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        body = data[first:]
        if fault == "corrupt":
            body = bytes([body[0] ^ 1]) + body[1:]
        sent = body[: int(len(body) * fault[1])] if isinstance(fault, tuple) and fault[0] == "cut" else body
        self.server.log.append((self.command, self.path, len(sent), self.headers.get("Range")))
        self.answer(206 if asked else 200, sent, Content_Length=str(len(body)), **headers)
        if len(sent) < len(body):
            self.close_connection = True
        return None
