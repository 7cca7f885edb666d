"""Downloads with the real huggingface_hub client, from a server on loopback that speaks its protocol."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from hub_server import Repository, Server, running, sha256
from ppx.convert.file_names import FILES

REPOSITORY = "someone/personaplex-tune"


@pytest.fixture
def hub(pico):
    with running() as server:
        files = {name: (pico / name).read_bytes() for name in FILES}
        card = b"---\nlicense: cc-by-nc-4.0\n---\n# mine\n"
        server.repositories[REPOSITORY] = Repository(files | {"README.md": card, "huge.bin": b"not asked for"})
        yield server


@pytest.fixture
def environment(hub, tmp_path):
    return {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }


@pytest.fixture
def convert(environment, program, tmp_path):
    def run(*options, status=0, **more):
        return program("ppx-convert", *options, cwd=tmp_path, status=status, environment=environment | more)

    return run


def fetched(hub: Server) -> dict[str, int]:
    """Bytes of each file that the server sent."""
    total: dict[str, int] = {}
    for method, path, count, _ in hub.log:
        if method == "GET" and "/resolve/" in path:
            name = path.rsplit("/", 1)[1]
            total[name] = total.get(name, 0) + count
    return total


def sizes(hub: Server) -> dict[str, int]:
    files = hub.repositories[REPOSITORY].at("main")
    return {name: len(files[name]) for name in (*FILES, "README.md")}


def test_a_hub_source_is_downloaded_pinned_and_cached(convert, hub, tmp_path):
    convert(REPOSITORY, "-o", "out")
    source = json.loads((tmp_path / "out" / "manifest.json").read_text())["source"]
    assert (source["id"], source["revision"]) == (REPOSITORY, hub.repositories[REPOSITORY].heads["main"])
    assert source["license"]["license"] == "cc-by-nc-4.0"
    assert fetched(hub) == sizes(hub)
    assert any(path.startswith("/cdn/") for _, path, _, _ in hub.log)
    hub.log.clear()
    convert(REPOSITORY, "-o", "again", HF_HUB_OFFLINE="1")
    convert(REPOSITORY, "-o", "third")
    hub.repositories[REPOSITORY].private = True  # what is in the cache needs no token
    convert(REPOSITORY, "-o", "fourth")
    assert fetched(hub) == {}


@pytest.mark.parametrize("times", [1, 3])
def test_a_connection_that_breaks_is_gone_on_with(times, convert, hub):
    hub.faults = [(r"GET .*/resolve/.*model\.safetensors", ("cut", 0.3))] * times
    convert(REPOSITORY, "-o", "out")
    assert fetched(hub) == sizes(hub)
    ranges = [range_ for _, path, _, range_ in hub.log if path.endswith("/model.safetensors")]
    assert ranges[0] is None
    assert len([range_ for range_ in ranges if range_]) == times


def test_a_killed_download_is_gone_on_with(convert, hub, tmp_path):
    """The client alone begins anew; here no byte comes twice."""
    total = sizes(hub)["model.safetensors"]
    hub.faults = [(r"GET .*/resolve/.*model\.safetensors", ("cut", 0.3))]
    hub.faults += [(r"GET .*/resolve/.*model\.safetensors", ("status", 403, {}))] * 9
    convert(REPOSITORY, "-o", "out", status=2)
    parts = list((tmp_path / "hf").rglob("*.ppx.incomplete"))
    assert [part.stat().st_size for part in parts] == [int(total * 0.3)]
    hub.faults.clear()
    convert(REPOSITORY, "-o", "out")
    assert fetched(hub) == sizes(hub)
    assert not list((tmp_path / "hf").rglob("*.incomplete"))


def test_a_process_killed_in_the_middle_loses_nothing_that_was_written(convert, hub, environment):
    code = (
        "import os, time, ppx.convert.source.hub as h\n"
        "class Bar:\n"
        "    seen = 0\n"
        "    def __enter__(self): return self\n"
        "    def __exit__(self, *_): pass\n"
        "    def set_postfix_str(self, *_, **__): pass\n"
        "    def update(self, count):\n"
        "        Bar.seen += count\n"
        "        if Bar.seen > 1 << 20: print(Bar.seen, flush=True); time.sleep(60)\n"
        "h.byte_bar = lambda *_: Bar()\n"
        f"h.download({REPOSITORY!r}, None, {FILES!r}, quiet=True)"
    )
    running_one = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | environment, stdout=subprocess.PIPE, text=True
    )
    assert running_one.stdout is not None
    seen = int(running_one.stdout.readline())
    running_one.send_signal(signal.SIGKILL)
    running_one.wait()
    running_one.stdout.close()
    hub.log.clear()
    convert(REPOSITORY, "-o", "out")
    assert seen > 1 << 20
    assert sum(fetched(hub).values()) == sum(sizes(hub).values()) - seen


def test_a_gated_repository_says_which_license_and_token(convert, hub, tmp_path):
    hub.repositories[REPOSITORY].gated = True
    done = convert(REPOSITORY, "-o", "out", status=2)
    page = f"{hub.address}/{REPOSITORY}"
    assert f"gated. Accept its license at {page}, then log in with `hf auth login`" in done.stderr
    assert "HF_TOKEN" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    done = convert(REPOSITORY, "-o", "out", status=2, HF_TOKEN="hf_stranger")
    assert f"gated. Accept its license at {page}, with the account that the token is of" in done.stderr
    done = convert(REPOSITORY, "-o", "out", HF_TOKEN="hf_reader")
    written = [path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert not any(b"hf_reader" in data for data in [*written, done.stdout.encode(), done.stderr.encode()])
    assert hub.untracked_files == []  # the host that large files come from is told no token


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
    repository = hub.repositories[REPOSITORY]
    repository.commit("main", {name: data for name, data in repository.at("main").items() if name != "voices.tgz"})
    assert "has no voices.tgz" in convert(REPOSITORY, status=2).stderr


def test_a_busy_or_broken_hub_is_waited_for(convert, hub):
    asked = ["GET /api/models/[^/]+/[^/]+", "GET .*/tree/", "GET .*/resolve/"]
    hub.faults = [(where, ("status", 429, {"Retry_After": "0"})) for where in asked]
    hub.faults += [(asked[1], ("status", 429, {"RateLimit": '"api";r=0;t=3'})), (asked[2], ("status", 500, {}))]
    began = time.monotonic()
    done = convert(REPOSITORY, "-o", "out")
    assert time.monotonic() - began > 3
    assert done.stderr == ""
    assert fetched(hub) == sizes(hub)
    assert not hub.faults


def test_a_token_that_the_hub_does_not_know(convert, hub):
    answer = {"X_Error_Message": "Invalid credentials in Authorization header"}
    hub.faults = [("GET /api/models/", ("status", 401, answer))]
    done = convert(REPOSITORY, status=2, HF_TOKEN="hf_outdated")
    assert "the Hub does not know the token: log in with" in done.stderr
    assert "hf_outdated" not in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_corrupted_byte_is_found_and_the_file_removed(name, convert, hub, tmp_path):
    hub.faults = [(rf"GET .*/resolve/.*{name}", "corrupt")]
    done = convert(REPOSITORY, "-o", "out", status=1)
    assert f"check failed: {name}: its " in done.stderr
    assert "is not the Hub's" in done.stderr
    assert not list((tmp_path / "hf").rglob("*.incomplete"))
    convert(REPOSITORY, "-o", "out")


def test_a_file_that_was_damaged_in_the_cache_is_found(convert, hub, tmp_path):
    convert(REPOSITORY, "-o", "out")
    weights = hub.repositories[REPOSITORY].at("main")["model.safetensors"]
    blob = next((tmp_path / "hf").rglob(sha256(weights)))
    blob.write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    done = convert(REPOSITORY, "-o", "again", status=2)
    assert "its sha256 is not the one that the Hub gave: damaged in the cache: delete" in done.stderr


@pytest.mark.parametrize(("spare", "fits"), [(-1, False), (0, True)])
def test_a_disk_that_is_too_small_is_seen_before_the_first_byte(spare, fits, hub, environment, tmp_path):
    """The disk must have room for the download and for a bundle of half its size."""
    total = sum(sizes(hub).values())
    code = (
        "import collections, shutil, pathlib, ppx.convert.source.hub as h\n"
        "usage = collections.namedtuple('usage', 'total used free')\n"
        f"shutil.disk_usage = lambda _: usage(0, 0, {total + total // 2 + spare})\n"
        f"room = h.DiskBudget(pathlib.Path({str(tmp_path / 'out')!r}), 0.5)\n"
        f"h.download({REPOSITORY!r}, None, {FILES!r}, ('README.md',), room, quiet=True)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)
    assert (done.returncode == 0) is fits
    if not fits:
        needed = f"download and bundle need {total * 1.5 / 1e9:.2f} GB there: free some, or put the cache (HF_HOME)"
        assert needed in done.stderr
    assert sum(fetched(hub).values()) == (total if fits else 0)


def test_a_strangers_listing_writes_nothing_outside_of_the_cache(convert, hub, tmp_path):
    names = ["../x", "../../../../x", "/tmp/ppx-x", "a" * 300, "a/" * 60 + "x", "model.safetensors/../../x"]
    hub.extra = [{"type": "file", "path": name, "size": 3, "oid": "0" * 40} for name in names]
    convert(REPOSITORY, "-o", "out")
    assert fetched(hub) == sizes(hub)
    inside = tmp_path / "hf"
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "out"}
    assert not [path for path in inside.rglob("*") if path.name in ("x", "a" * 300)]


def test_another_s_page_in_place_of_a_file_is_not_kept(convert, hub, tmp_path):
    """A proxy that answers 200 with a page of its own, after a part has come."""
    where = r"GET .*/resolve/.*model\.safetensors"
    hub.faults = [(where, ("cut", 0.3))] + [(where, ("page", b"<html>blocked"))] * 9
    done = convert(REPOSITORY, "-o", "out", status=2)
    assert "the download stopped (RemoteProtocolError)" in done.stderr
    part = next((tmp_path / "hf").rglob("*.ppx.incomplete"))
    assert part.stat().st_size == int(sizes(hub)["model.safetensors"] * 0.3)
    hub.faults.clear()
    convert(REPOSITORY, "-o", "out")
    assert fetched(hub) == sizes(hub)


def test_what_the_client_alone_has_fetched_is_not_enough_without_the_card(convert, hub, environment, tmp_path):
    """And a blob that is itself a link, as in the client's shared store, is no damaged one."""
    code = (
        "from huggingface_hub import snapshot_download\n"
        f"snapshot_download({REPOSITORY!r}, allow_patterns={list(FILES)!r})"
    )
    subprocess.run([sys.executable, "-c", code], env=os.environ | environment | {"HF_HUB_DISABLE_XET": "1"}, check=True)
    weights = sha256(hub.repositories[REPOSITORY].at("main")["model.safetensors"])
    blob = next((tmp_path / "hf").rglob(f"blobs/{weights}"))
    if not blob.is_symlink():
        elsewhere = tmp_path / "hf" / ("ab" * 32)
        blob.rename(elsewhere)
        blob.symlink_to(elsewhere)
    hub.log.clear()
    convert(REPOSITORY, "-o", "out")
    source = json.loads((tmp_path / "out" / "manifest.json").read_text())["source"]
    assert source["license"]["license"] == "cc-by-nc-4.0"
    assert set(fetched(hub)) == {"README.md"}


def test_an_etag_that_is_a_path_is_refused(convert, monkeypatch):
    import hub_server

    monkeypatch.setattr(hub_server, "git_hash", lambda _: "../../../../escaped")
    assert "which is no hash: do not trust it" in convert(REPOSITORY, status=2).stderr


def test_no_network(convert):
    done = convert(REPOSITORY, status=2, HF_ENDPOINT="http://127.0.0.1:9")
    assert "not in the Hub's cache, and http://127.0.0.1:9 was not reached" in done.stderr
    assert "HF_HUB_OFFLINE is set" in convert(REPOSITORY, status=2, HF_HUB_OFFLINE="1").stderr


def test_a_dry_run_downloads_nothing(convert, hub, tmp_path):
    done = convert(REPOSITORY, "--dry-run")
    assert "is not on this machine" in done.stderr
    assert "8,371,408,896 parameters" in done.stdout
    assert f"{REPOSITORY}: its model.safetensors has 9," in done.stderr
    assert re.search(r"^download: 9\.\d+ MB from the Hub, about \d+ s at 100 Mbit/s$", done.stdout, re.MULTILINE)
    assert hub.log == []
    assert not (tmp_path / "hf" / "hub").exists() or not list((tmp_path / "hf" / "hub").glob("models--*"))


def test_a_dry_run_of_what_is_not_on_the_hub_is_an_error(convert):
    done = convert("nvidia/nothing-like-that", "--dry-run", status=2)
    assert "nvidia/nothing-like-that: not found on the Hub, or private" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert "has no revision 'v9'" in convert(REPOSITORY, "--dry-run", "--revision", "v9", status=2).stderr
    done = convert("nvidia/nothing-like-that", "--dry-run", HF_HUB_OFFLINE="1")
    assert "the Hub was not reached: whether it has nvidia/nothing-like-that" in done.stderr
    assert "download: 17.13 GB from the Hub, about 23 min at 100 Mbit/s" in done.stdout
    done = convert("nvidia/nothing-like-that", "--dry-run", HF_ENDPOINT="http://127.0.0.1:9")
    assert "the Hub was not reached" in done.stderr


def test_a_dry_run_of_what_is_in_the_cache_downloads_nothing(convert):
    convert(REPOSITORY, "-o", "out")
    done = convert(REPOSITORY, "--dry-run", "--json")
    planned = json.loads(done.stdout)
    assert planned["download_bytes"] == 0
    assert planned["conversion_seconds"] > 0
    assert "not on this machine" not in done.stderr
