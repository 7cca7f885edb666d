"""Downloads with the real huggingface_hub client, from a server on loopback that speaks its protocol."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from ppx.convert.source import FILES

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPOSITORY = "someone/personaplex-tune"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, body=b"", headers=()):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        if "Content-Length" not in dict(headers):
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.server.requests.append((self.command, self.path, self.headers.get("Authorization")))
        if api := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(?:revision|tree)/([^/?]+)(?:\?.*)?", self.path):
            return self.api(*api.groups())
        if resolve := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/([^/?]+)", self.path):
            return self.resolve(*resolve.groups())
        return self.answer(404)

    def refused(self, repository, revision):
        if repository != REPOSITORY:
            return 401, "RepoNotFound"
        if revision not in ("main", COMMIT):
            return 404, "RevisionNotFound"
        return None

    def api(self, repository, revision):
        if refused := self.refused(repository, revision):
            return self.answer(refused[0], b"{}", {"X-Error-Code": refused[1]})
        if "/tree/" in self.path:
            body = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.server.files.items()
            ]
        else:
            siblings = [{"rfilename": name} for name in self.server.files]
            body = {"id": repository, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
        return self.answer(200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def resolve(self, repository, revision, name):
        if refused := self.refused(repository, revision):
            return self.answer(refused[0], b"", {"X-Error-Code": refused[1]})
        if self.server.gated and self.headers.get("Authorization") != "Bearer hf_allowed":
            return self.answer(403, b"", {"X-Error-Code": "GatedRepo"})
        data = self.server.files[name]
        headers = {
            "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Content-Length": str(len(data)),
            "Accept-Ranges": "bytes",
        }
        return self.answer(200, data, headers)


@pytest.fixture
def hub(pico):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files = {name: (pico / name).read_bytes() for name in FILES} | {"huge.bin": b"not asked for"}
    server.gated, server.requests = False, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def convert(hub, program, tmp_path):
    address = f"http://127.0.0.1:{hub.server_address[1]}"

    def run(*options, status=0, **environment):
        environment = {
            "HF_ENDPOINT": address,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        } | environment
        return program("ppx-convert", *options, cwd=tmp_path, status=status, environment=environment)

    return run


def test_a_hub_source_is_downloaded_pinned_and_cached(convert, hub, tmp_path):
    convert(REPOSITORY, "-o", "out")
    source = json.loads((tmp_path / "out" / "manifest.json").read_text())["source"]
    assert (source["id"], source["revision"]) == (REPOSITORY, COMMIT)
    fetched = {path.rsplit("/", 1)[1] for command, path, _ in hub.requests if command == "GET" and "resolve" in path}
    assert fetched == set(FILES)
    hub.requests.clear()
    convert(REPOSITORY, "-o", "again", HF_HUB_OFFLINE="1")
    assert hub.requests == []
    convert(REPOSITORY, "-o", "third")
    assert not [path for command, path, _ in hub.requests if command == "GET" and "resolve" in path]


def test_a_gated_repository_says_which_licence_and_token(convert, hub, tmp_path):
    hub.gated = True
    done = convert(REPOSITORY, "-o", "out", status=2)
    page = f"http://127.0.0.1:{hub.server_address[1]}/{REPOSITORY}"
    assert f"gated. Accept its licence at {page}, then log in with `hf auth login`" in done.stderr
    assert "HF_TOKEN" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    done = convert(REPOSITORY, "-o", "out", HF_TOKEN="hf_allowed")
    written = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not any(b"hf_allowed" in data for data in [*written, done.stdout.encode(), done.stderr.encode()])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["nobody/nothing"], "nobody/nothing: not found on the Hub, or private"),
        ([REPOSITORY, "--revision", "nope"], "has no revision 'nope'"),
    ],
)
def test_what_is_not_there(options, message, convert):
    done = convert(*options, status=2)
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_a_repository_of_another_kind(convert, hub):
    del hub.files["voices.tgz"]
    assert "holds no voices.tgz" in convert(REPOSITORY, status=2).stderr


def test_no_network(convert):
    done = convert(REPOSITORY, status=2, HF_ENDPOINT="http://127.0.0.1:9")
    assert "not in the Hub's cache, and http://127.0.0.1:9 was not reached" in done.stderr
    assert "HF_HUB_OFFLINE is set" in convert(REPOSITORY, status=2, HF_HUB_OFFLINE="1").stderr


def test_a_dry_run_downloads_nothing(convert, hub, tmp_path):
    done = convert(REPOSITORY, "--dry-run")
    assert "is not on this machine" in done.stderr
    assert "8,371,408,896 parameters" in done.stdout
    assert hub.requests == []
    assert not (tmp_path / "hf" / "hub").exists() or not list((tmp_path / "hf" / "hub").glob("models--*"))
