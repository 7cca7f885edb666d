"""Downloads with the real huggingface_hub client, from a server on loopback that speaks its protocol."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hub_server import Repository, Server, environment_of, running, sha256
from ppx.convert.file_names import CODEC, FILES, TOKENIZER
from sources import base_moshi, rename, shard

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
    return environment_of(hub, tmp_path / "hf")


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
        "    def skip(self, _): pass\n"
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
    whole = repository.at("main")
    for lacking in ("model.safetensors", "tokenizer_spm_32k_3.model"):
        repository.commit("main", {name: data for name, data in whole.items() if name != lacking})
        done = convert(REPOSITORY, status=2)
        assert f"has no {lacking}: is this the right repository?" in done.stderr
        assert not fetched(hub).get("tokenizer-e351c8d8-checkpoint125.safetensors")


def test_a_sharded_source_without_voices_is_downloaded_whole_and_from_the_cache(convert, hub, tmp_path):
    """As base Moshi's repositories, with shards: what config.json and the index name, and nothing else."""
    folder = base_moshi(tmp_path / "made" / "moshi")
    rename(folder, mimi_name="mimi.safetensors")
    shards = sorted(set(shard(folder).values()))
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    others = {"README.md": b"---\nlicense: cc-by-4.0\n---\n", "pytorch_model.bin": b"not asked for"}
    hub.repositories["someone/moshi"] = Repository(files | others)
    hub.faults = [(rf"GET .*/resolve/.*{shards[1]}", ("cut", 0.5))]  # gone on with
    convert("someone/moshi", "--recipe", "moshi-q4", "-o", "out")
    assert fetched(hub) == {name: len(data) for name, data in (files | others).items() if not name.endswith(".bin")}
    source = json.loads((tmp_path / "out" / "manifest.json").read_text())["source"]
    assert set(source["files"]) == set(files)
    assert {name: source["files"][name]["sha256"] for name in shards} == {name: sha256(files[name]) for name in shards}
    hub.log.clear()
    convert("someone/moshi", "--recipe", "moshi-q4", "-o", "again", HF_HUB_OFFLINE="1")
    done = convert("someone/moshi", "--recipe", "moshi-q4", "--dry-run")
    assert "no voices, as the source has none" in done.stdout
    assert "is not on this machine" not in done.stderr
    assert fetched(hub) == {}


def test_a_repository_lacks_a_shard_or_has_a_damaged_one(convert, hub, tmp_path):
    folder = base_moshi(tmp_path / "made" / "moshi")
    shards = sorted(set(shard(folder).values()))
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.repositories["someone/less"] = Repository({name: data for name, data in files.items() if name != shards[2]})
    done = convert("someone/less", "--recipe", "moshi-q4", status=2)
    assert f"has no {shards[2]}: is this the right repository?" in done.stderr
    assert shards[0] not in fetched(hub)
    hub.repositories["someone/moshi"] = Repository(files)
    convert("someone/moshi", "--recipe", "moshi-q4", "-o", "out")
    blob = next((tmp_path / "hf").rglob(sha256(files[shards[1]])))
    blob.write_bytes(files[shards[1]][:-1] + b"x")
    done = convert("someone/moshi", "--recipe", "moshi-q4", "-o", "again", status=2)
    assert "its sha256 is not the one that the Hub gave: damaged in the cache" in done.stderr


def test_the_command_of_the_sources_page(hub, program, environment, tmp_path):
    """And what the target cannot load is told before the weights are downloaded."""
    page = (Path(__file__).parents[2] / "docs" / "sources.md").read_text()
    (block,) = re.findall(r"```sh\n(.+?)\n```", page, re.DOTALL)
    name, source, *options = shlex.split(block)
    folder = base_moshi(tmp_path / "made" / "moshi")
    hub.repositories[source] = Repository({path.name: path.read_bytes() for path in folder.iterdir()})
    done = program(name, source, cwd=tmp_path, status=2, environment=environment)
    assert "speech-swift loads a depformer of 16 steps, not 8" in done.stderr
    assert "--fill-depformer-steps copies" in done.stderr
    assert set(fetched(hub)) == {"config.json"}
    program(name, source, *options, cwd=tmp_path, environment=environment)
    manifest = json.loads((tmp_path / "moshiko-pytorch-bf16-moshi-mlx-moshi-q4" / "manifest.json").read_text())
    assert (manifest["source"]["id"], manifest["voices"]) == ("kyutai/moshiko-pytorch-bf16", [])


@pytest.mark.parametrize(("spare", "fits"), [(-1, False), (0, True)])
def test_the_disk_must_have_room_for_every_shard(spare, fits, hub, environment, tmp_path):
    folder = base_moshi(tmp_path / "made" / "moshi")
    shard(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    hub.repositories["someone/moshi"] = Repository(files)
    naming = ("config.json", "model.safetensors.index.json")  # fetched first: they name the others
    total = sum(len(data) for name, data in files.items() if name not in naming)
    code = (
        "import collections, shutil, pathlib, ppx.convert.source.source as s\n"
        "usage = collections.namedtuple('usage', 'total used free')\n"
        f"shutil.disk_usage = lambda _: usage(0, 0, {total + total // 2 + spare})\n"
        f"room = s.hub.DiskBudget(pathlib.Path({str(tmp_path / 'out')!r}), 0.5)\n"
        "s.locate('someone/moshi', quiet=True, room=room)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True)
    assert (done.returncode == 0) is fits, done.stderr
    assert set(fetched(hub)) == (set(files) if fits else set(naming))


@pytest.mark.parametrize("name", ["../../evil.safetensors", "/tmp/evil.safetensors", "hf://a/b/c.safetensors"])
def test_names_in_a_strangers_config_and_index_stay_inside(name, convert, hub, tmp_path):
    folder = base_moshi(tmp_path / "made" / "moshi")
    shard(folder)
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    index = json.dumps({"weight_map": {"out_norm.alpha": name}}).encode()
    hub.repositories["someone/one"] = Repository(files | {"model.safetensors.index.json": index})
    done = convert("someone/one", status=2)
    assert "not the plain name of a safetensors file: do not trust this source" in done.stderr
    config = json.loads(files["config.json"]) | {"mimi_name": name}
    hub.repositories["someone/two"] = Repository(files | {"config.json": json.dumps(config).encode()})
    done = convert("someone/two", status=2)
    assert f"mimi_name is {name!r}" in done.stderr
    assert not list(tmp_path.rglob("evil*"))


def test_personaplex_itself_has_voices(convert, hub):
    files = hub.repositories[REPOSITORY].at("main")
    without = {name: data for name, data in files.items() if name != "voices.tgz"}
    hub.repositories["nvidia/personaplex-7b-v1"] = Repository(without)
    assert "has no voices.tgz" in convert("nvidia/personaplex-7b-v1", status=2).stderr


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


def test_a_dry_run_counts_what_a_source_has(convert, hub):
    """Shards, no voices, and files of which config.json alone knows the names; nothing of it is downloaded."""
    files = {f"model-0000{number}-of-00002.safetensors": b"x" * 1000 * number for number in (1, 2)}
    files |= {"model.safetensors.index.json": b"{}", CODEC: b"c" * 70, TOKENIZER: b"t" * 5, "config.json": b"{}"}
    hub.repositories["me/tune"] = Repository(files | {"notes.bin": b"n" * 10**6})
    done = convert("me/tune", "--target", "mlx", "--dry-run", "--json")
    planned = json.loads(done.stdout)
    assert planned["download_bytes"] == sum(map(len, files.values())) - len("{}")  # an index is not counted
    assert not any(name.startswith("voices/") for name in planned["files"])
    assert "its model.safetensors has 3,000 bytes, other than that of nvidia/personaplex-7b-v1" in done.stderr
    hub.repositories["me/other"] = Repository({"weights.safetensors": b"x", CODEC: b"c", "config.json": b"{}"})
    done = convert("me/other", "--dry-run")
    lacking = f"me/other: has no model.safetensors, {TOKENIZER}: its config.json may name other files"
    assert lacking in done.stderr
    hub.repositories["me/nothing"] = Repository({"notes.bin": b"x", CODEC: b"c"})
    done = convert("me/nothing", "--dry-run", status=2)
    assert "me/nothing: has no model.safetensors: is this the right repository?" in done.stderr
    assert f"me/nothing: has no {TOKENIZER}" in done.stderr
    assert hub.log == []


def test_a_dry_run_of_what_is_in_the_cache_downloads_nothing(convert):
    convert(REPOSITORY, "-o", "out")
    done = convert(REPOSITORY, "--dry-run", "--json")
    planned = json.loads(done.stdout)
    assert planned["download_bytes"] == 0
    assert planned["conversion_seconds"] > 0
    assert "not on this machine" not in done.stderr
