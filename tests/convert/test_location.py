"""Bundles on the Hub, through the real client, from a server on loopback: for every program that reads one."""

import json
import os
import re
import shlex
from pathlib import Path

import pytest
from hub_server import LARGE, Repository, environment_of, running
from ppx.convert import UserError, locate_bundle
from ppx.convert.bundle.location import published_as
from ppx.convert.bundle.manifest import manifest_of
from ppx.convert.file_names import is_plain
from safetensors.numpy import load_file, save_file

REPOSITORY = "someone/personaplex-4bit"


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def files(bundle):
    return files_of(bundle("--recipe", "4bit"))


@pytest.fixture
def hub(files):
    with running() as server:
        server.repositories[REPOSITORY] = Repository(files | {"unasked.bin": b"x" * LARGE})
        yield server


@pytest.fixture
def environment(hub, tmp_path):
    return environment_of(hub, tmp_path / "hf")


@pytest.fixture
def run(environment, program, tmp_path):
    def run(name, *arguments, status=0, **more):
        return program(name, *arguments, cwd=tmp_path, status=status, environment=environment | more)

    return run


def fetched(hub) -> list[str]:
    return [path.partition("/resolve/")[2].partition("/")[2] for method, path, count, _ in hub.log
            if method == "GET" and "/resolve/" in path and count]  # fmt: skip


def test_a_bundle_is_downloaded_once_and_checked(run, hub, files):
    said = run("ppx-inspect", REPOSITORY, "--check").stdout
    assert f"a bundle, {len(files)} files" in said
    assert "every file is the one that the manifest names" in said
    assert sorted(fetched(hub)) == sorted(files)  # nothing else, nothing twice
    hub.log.clear()
    shown = json.loads(run("ppx-inspect", REPOSITORY, "--json", HF_HUB_OFFLINE="1").stdout)
    assert (shown["kind"], shown["missing"]) == ("bundle", [])
    assert fetched(hub) == []


def test_a_download_that_breaks_resumes(run, hub, files):
    hub.faults = [(r"GET .*/resolve/.*temporal\.safetensors", ("cut", 0.3)), (r"GET .*/api/", ("status", 503, {}))]
    run("ppx-inspect", REPOSITORY, "--check")
    ranges = [range_ for _, path, count, range_ in hub.log if path.endswith("/temporal.safetensors") and count]
    assert ranges == [None, f"bytes={int(len(files['temporal.safetensors']) * 0.3)}-"]


def test_a_file_damaged_on_its_way_is_told(run, hub):
    hub.faults = [(r"GET .*/resolve/.*temporal\.safetensors", "corrupt")]
    said = run("ppx-inspect", REPOSITORY, status=1).stderr
    assert "temporal.safetensors: its sha256 is not the Hub's" in said


def test_a_revision_is_taken_of_the_hub_only(run, hub, bundle, tmp_path):
    other = files_of(bundle("--recipe", "8bit"))
    hub.repositories[REPOSITORY].commit("8bit", other)
    shown = json.loads(run("ppx-inspect", REPOSITORY, "--revision", "8bit", "--json").stdout)
    assert shown["recipe"]["name"] == "8bit"
    shown = json.loads(run("ppx-inspect", REPOSITORY, "--json").stdout)
    assert shown["recipe"]["name"] == "4bit"
    assert "has no revision 'x'" in run("ppx-inspect", REPOSITORY, "--revision", "x", status=2).stderr
    (tmp_path / "here").symlink_to(bundle("--recipe", "4bit"))
    said = run("ppx-inspect", "here", "--revision", "main", status=2).stderr
    assert "here: is not on the Hub, and only what is there has a revision" in said


def test_a_folder_of_that_name_comes_first(run, hub, bundle, tmp_path):
    place = tmp_path / REPOSITORY
    place.parent.mkdir()
    place.symlink_to(bundle("--recipe", "8bit"))
    assert json.loads(run("ppx-inspect", REPOSITORY, "--json").stdout)["recipe"]["name"] == "8bit"
    assert hub.log == []


def changed(bundle: dict[str, bytes], **keys: object) -> dict[str, bytes]:
    return bundle | {"manifest.json": json.dumps(json.loads(bundle["manifest.json"]) | keys).encode()}


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a/../../b", "~/x", "a//b", ".ppx-install.json", "*", "v/[a]"])
def test_names_in_a_manifest_are_not_believed(name, run, hub, files):
    record = {"size": 1, "sha256": "0" * 64}
    named = json.loads(files["manifest.json"])["files"] | {name: record}
    hub.repositories[REPOSITORY] = Repository(changed(files, files=named) | {name: b"x", "more.bin": b"y"})
    said = run("ppx-inspect", REPOSITORY, status=2).stderr
    assert "do not trust" in said
    assert len(said.splitlines()) == 1
    assert fetched(hub) == ["manifest.json"]


def test_sizes_in_a_manifest_are_not_believed(run, hub, files):
    named = json.loads(files["manifest.json"])["files"]
    smaller = named | {"config.json": named["config.json"] | {"size": 3}}
    hub.repositories[REPOSITORY] = Repository(changed(files, files=smaller))
    said = run("ppx-inspect", REPOSITORY, status=2).stderr
    assert f"config.json: has {len(files['config.json'])} bytes, 3 are in manifest.json" in said


def test_more_bytes_than_a_manifest_names_are_not_downloaded(run, hub, files, tmp_path):
    """The listing says how large a file is before it is asked for."""
    huge = {"type": "file", "path": "README.md", "size": 1 << 40, "oid": "1" * 40}
    hub.extra = [huge | {"lfs": {"oid": "2" * 64, "size": 1 << 40, "pointerSize": 130}}]
    hub.repositories[REPOSITORY] = Repository({key: data for key, data in files.items() if key != "README.md"})
    assert "at most" in run("ppx-inspect", REPOSITORY, status=2).stderr
    hub.extra = [huge | {"path": "manifest.json"}]
    hub.repositories["someone/other"] = Repository({"config.json": b"{}"})
    assert f"bytes, at most {64 << 20} are expected" in run("ppx-inspect", "someone/other", status=2).stderr
    assert not any(size > 1 << 20 for path in (tmp_path / "hf").rglob("*.incomplete") for size in [path.stat().st_size])


def test_what_is_no_bundle_is_told(run, hub):
    hub.repositories["someone/source"] = Repository({"model.safetensors": b"x", "config.json": b"{}"})
    said = run("ppx-bench", "someone/source", status=2).stderr
    assert "someone/source: has no manifest.json: not a bundle of ppx-convert" in said
    assert "not found on the Hub, or private" in run("ppx-bench", "someone/nothing", status=2).stderr
    hub.repositories[REPOSITORY].private = True
    assert "private" in run("ppx-bench", REPOSITORY, status=2).stderr
    assert "was not reached" in run("ppx-speak", "x/y", "q.wav", "-o", "a.wav", status=2, HF_HUB_OFFLINE="1").stderr


def test_a_hub_bundle_is_installed_from_the_cache(run, files, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    run("ppx-install", REPOSITORY, HOME=str(home))
    there = home / "Library" / "Caches" / "qwen3-speech" / "models" / "someone" / "personaplex-4bit"
    for name in ("temporal.safetensors", "voices/NATM0.safetensors"):
        assert (there / name).stat().st_nlink == 2  # with the blob in the Hub's cache, no link to a link
        assert not (there / name).is_symlink()
        assert (there / name).read_bytes() == files[name]
    run("ppx-install", REPOSITORY, "--remove", HOME=str(home))
    assert not there.exists()
    run("ppx-inspect", REPOSITORY, "--check", HF_HUB_OFFLINE="1")


@pytest.mark.slow
def test_a_hub_bundle_is_benched_and_verified(run, hub, files, pico, tmp_path):
    """The report goes beside, not into the Hub's cache."""
    figures = json.loads(run("ppx-bench", REPOSITORY, "--frames", "2", "--json").stdout)
    assert figures["recipe"] == "4bit"
    tokens = tmp_path / "held.safetensors"
    save_file({"tokens": load_file(pico / "heldout_tokens.safetensors")["tokens"][:2, :, :40].copy()}, tokens)
    said = run("ppx-verify", REPOSITORY, "--reference", pico, "--tokens", "held.safetensors").stdout
    assert f"\n{REPOSITORY} is intact" in said
    assert "report: someone--personaplex-4bit/parity/report.html" in said
    report = tmp_path / "someone--personaplex-4bit" / "parity" / "report.json"
    commit = hub.repositories[REPOSITORY].heads["main"]
    assert f"ppx-verify {REPOSITORY} --revision {commit} " in json.loads(report.read_text())["command"]
    snapshot = next((tmp_path / "hf").rglob("snapshots")) / commit
    assert set(files_of(snapshot)) == set(files)
    assert published_as(snapshot) == (REPOSITORY, commit)
    said = run("ppx-verify", report, report).stdout
    assert "KL of the agent's codebooks" in said
    figures = run("ppx-verify", report, report, "--json").stdout
    assert run("ppx-verify", REPOSITORY, report, "--json").stdout == figures
    data = files | {"parity/report.json": report.read_bytes()}
    hub.repositories["someone/other"] = Repository(data)
    assert run("ppx-verify", report, "someone/other", "--json").stdout == figures
    assert "  B: someone/other: 4 bit" in run("ppx-verify", report, "someone/other").stdout


def test_only_the_hubs_cache_has_links_out_of_a_bundle(bundle, tmp_path):
    """The same links are refused in a folder that somebody packed."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, (name, data) in enumerate(files_of(bundle("--recipe", "moshi-q4")).items()):
        (blobs / str(number)).write_bytes(data)
        (snapshot / name).symlink_to(os.path.relpath(blobs / str(number), snapshot))
    assert manifest_of(snapshot).target == "moshi-mlx"
    assert published_as(snapshot) is None
    config = snapshot / "config.json"
    config.unlink()
    config.symlink_to("/etc/hostname")
    with pytest.raises(UserError, match=r"names files outside of its folder: config\.json"):
        manifest_of(snapshot)
    (tmp_path / "snapshots").rename(tmp_path / "others")
    with pytest.raises(UserError, match="names files outside of its folder"):
        manifest_of(tmp_path / "others" / "0")


def test_a_path_is_a_folder_whatever_it_looks_like(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert locate_bundle("a/b") == Path("a/b")
    assert locate_bundle("./x/y") == Path("x/y")
    assert locate_bundle(tmp_path) == tmp_path


@pytest.mark.parametrize("name", ["a", "a.b", "voices/NATF0.safetensors", "model-00001-of-00002.safetensors", "é/x y"])
def test_plain_names(name):
    assert is_plain(name)
    assert not is_plain(f"{name}\n")
    assert not is_plain(f"../{name}")


def test_commands_of_the_page_with_a_hub_id_run(run, hub, files):
    page = (Path(__file__).parent.parent.parent / "docs" / "install.md").read_text()
    lines = [line for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    commands = [line for line in lines if " me/personaplex-4bit" in line and " --as " not in line]
    assert len(commands) == 2
    hub.repositories["me/personaplex-4bit"] = Repository(files)
    for command in commands:
        name, *arguments = shlex.split(command)
        run(name, *arguments, *(["--frames", "2"] if name == "ppx-bench" else []))
