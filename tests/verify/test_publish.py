"""Uploads with the real huggingface_hub client, to a server on loopback that speaks its protocol."""

import hashlib
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub_server import LARGE, Repository, Server, environment_of, git_hash, running, sha256
from huggingface_hub import ModelCard
from ppx.convert.errors import UserError
from ppx.verify.publishing.gate import check_name

NAME = "me/personaplex-4bit"
FAILURE = {"check": "predictions", "limit": "text_kl", "where": "text", "message": "text KL is 9, over .1"}
REPORT = ("parity/report.json", "parity/report.md", "parity/report.html")


@pytest.fixture(scope="module")
def proven(program, pico, tmp_path_factory):
    """A bundle whose report passes."""
    folder = tmp_path_factory.mktemp("proven")
    program("ppx-convert", pico, "--verify", "-o", "bundle", cwd=folder)
    return folder / "bundle"


@pytest.fixture
def bundle(proven, tmp_path):
    shutil.copytree(proven, tmp_path / "bundle")
    return tmp_path / "bundle"


@pytest.fixture
def hub():
    with running() as server:
        yield server


@pytest.fixture
def run(hub, program, tmp_path):
    """Run a program with a token that may write, without the client's xet, which loopback cannot speak."""
    own = {"HF_HUB_DISABLE_XET": "1", "HF_TOKEN": "hf_writer"}
    environment = environment_of(hub, tmp_path / "hf") | own

    def go(name, *options, status=0, **more):
        return program(name, *options, cwd=tmp_path, status=status, environment=environment | more)

    return go


@pytest.fixture
def publish(run):
    return lambda *options, **more: run("ppx-publish", "bundle", NAME, *options, **more)


def expected(bundle: Path) -> dict[str, bytes]:
    """Contents of the files that go up, by name."""
    manifest = json.loads((bundle / "manifest.json").read_text())
    names = [*manifest["files"], "manifest.json", *REPORT, "README.md", "NOTICE"]
    return {name: (bundle / name).read_bytes() for name in names}


def held(hub: Server, revision: str = "main", name: str = NAME) -> dict[str, bytes]:
    files = dict(hub.repositories[name].at(revision))
    files.pop(".gitattributes", None)
    return files


def puts(hub: Server) -> dict[str, int]:
    """Bytes of each large file that the server received, by sha256."""
    total: dict[str, int] = {}
    for method, path, count, _ in hub.log:
        if method == "PUT":
            key = path.rsplit("/", 1)[1]
            total[key] = total.get(key, 0) + count
    return total


def commits(hub: Server, name: str = NAME) -> int:
    return len(hub.repositories[name].commits)


def test_a_whole_upload_and_a_second_one_that_changes_nothing(publish, hub, bundle):
    (bundle / "notes.txt").write_text("mine")
    (bundle / "parity" / "draft.json").write_text("{}")
    done = publish()
    files = expected(bundle)
    assert held(hub) == files
    assert not hub.repositories[NAME].private
    assert done.stdout.startswith(f"{hub.address}/{NAME}: {len(files)} files sent (")
    assert f"all {len(files)} files are there with the sizes and sha256 that they have here" in done.stdout
    assert done.stderr == ""
    large = {sha256(data): len(data) for data in files.values() if len(data) >= LARGE}
    assert puts(hub) == large
    assert commits(hub) == 2  # the empty repository, and this
    hub.log.clear()
    done = publish()
    assert "nothing new; all" in done.stdout
    assert commits(hub) == 2
    assert not [entry for entry in hub.log if entry[0] != "GET"]


def test_only_what_changed_goes_up(publish, hub, bundle, run, pico):
    publish()
    hub.log.clear()
    run("ppx-verify", "bundle", "--reference", pico, "--sequences", "1", "--frames", "40")
    done = json.loads(publish("--json").stdout)
    assert set(done["changed"]) == {*REPORT, "README.md"}
    assert done["page"] == f"{hub.address}/{NAME}"
    assert held(hub) == expected(bundle)
    assert set(puts(hub)) <= {sha256(held(hub)[name]) for name in REPORT}


def test_an_upload_that_is_cut_goes_on_without_sending_anything_twice(publish, hub, bundle):
    files = expected(bundle)
    last = sha256(files["temporal.safetensors"])
    hub.faults = [(f"PUT /lfs-put/{last}", ("cut", 0.3)), (f"PUT /lfs-put/{last}", ("status", 400, {}))]
    done = publish(status=2)
    assert "the upload stopped (BadRequestError): try again, what is done is kept" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert NAME in hub.repositories
    assert held(hub) == {}  # nothing looks finished
    sent = puts(hub)
    hub.faults.clear()
    hub.log.clear()
    publish()
    again = puts(hub)
    assert held(hub).keys() == files.keys()
    large = {sha256(data): len(data) for data in held(hub).values() if len(data) >= LARGE}
    assert again[last] == large[last]  # a broken file goes again as a whole, which is what LFS can do
    assert {**sent, **again} == large
    assert not {key for key in again if key in sent and key != last}


def test_a_busy_or_broken_hub_is_waited_for(publish, hub, bundle):
    asked = ["GET /api/models/", "POST /api/repos/create", "GET .*/tree/", "POST .*/preupload/", "POST .*/commit/"]
    asked += ["POST .*/info/lfs/objects/batch", "PUT /lfs-put/", "POST /api/validate-yaml"]
    hub.faults = [(where, ("status", 429, {"Retry_After": "0"})) for where in asked]
    hub.faults += [(where, ("status", 503, {})) for where in ("GET .*/tree/", "PUT /lfs-put/")]
    done = publish()
    assert held(hub) == expected(bundle)
    assert not hub.faults
    assert done.stderr == ""


def objections(done: subprocess.CompletedProcess[str]) -> str:
    assert "check failed: bundle: not published: " in done.stderr
    assert len(done.stderr.splitlines()) == 1
    return done.stderr


def test_refused_without_a_report(publish, hub, bundle):
    shutil.rmtree(bundle / "parity")
    assert "it has no report: run ppx-verify first" in objections(publish(status=1))
    assert NAME not in hub.repositories
    assert hub.log == []


def edit(path: Path, change: Callable[..., object]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def fail(report: dict[str, Any]) -> None:
    report["verdict"] = {"passed": False, "failures": [FAILURE]}


def test_refused_with_a_report_that_fails_contradicts_itself_or_is_of_other_files(publish, hub, bundle, proven):
    report = bundle / "parity" / "report.json"
    cases = [
        (fail, "its report fails: text KL is 9, over .1"),
        (lambda r: r["verdict"].update(failures=[FAILURE]), "contradicts itself"),
        (lambda r: r["bundle"].update(fingerprint="0" * 64), "its report is older, or about other files"),
        (lambda r: r["bundle"]["files"].popitem(), "its report is older, or about other files"),
        (lambda r: r.clear(), "its report cannot be read: run ppx-verify again"),
    ]
    for change, message in cases:
        shutil.copy(proven / "parity" / "report.json", report)
        edit(report, change)
        assert message in objections(publish(status=1))
    assert hub.log == []


def test_pages_are_those_of_the_report_whatever_lies_in_the_folder(publish, hub, bundle, proven, tmp_path):
    (tmp_path / "diary").write_text("private")
    (bundle / "parity" / "report.md").unlink()
    (bundle / "parity" / "report.md").symlink_to(tmp_path / "diary")
    (bundle / "parity" / "report.html").write_text("<script>")
    publish()
    for name in REPORT:
        assert held(hub)[name] == (proven / name).read_bytes()
    (bundle / "manifest.json").rename(tmp_path / "manifest.json")
    (bundle / "manifest.json").symlink_to(tmp_path / "manifest.json")
    assert "manifest.json: leads out of the bundle" in publish(status=2).stderr


def test_a_repository_of_something_else_is_not_written_over(publish, hub, bundle):
    hub.repositories[NAME] = Repository({"README.md": b"theirs", "model.safetensors": b"theirs"})
    done = publish(status=2)
    assert "holds model.safetensors, and is no bundle: choose another name, --create-pr, or --force" in done.stderr
    assert commits(hub) == 1
    publish("--force")
    assert held(hub) == expected(bundle) | {"model.safetensors": b"theirs"}


def test_a_pull_request_whose_answer_is_lost_is_not_made_twice(publish, hub, bundle, monkeypatch):
    hub.repositories[NAME] = Repository({"README.md": b"theirs"})
    made = Repository.commit

    def lost(self, branch, files):
        hub.faults = [("POST .*/commit/", ("status", 502, {}))] * 9
        return made(self, branch, files)

    hub.faults = []
    monkeypatch.setattr(Repository, "commit", lost)
    publish("--create-pr")
    hub.faults = []
    monkeypatch.undo()
    done = publish("--create-pr")
    assert "discussions/1: nothing new" in done.stdout
    assert len(hub.repositories[NAME].requests) == 1
    assert held(hub, "refs/pr/1") == expected(bundle)


def test_refused_with_files_that_are_not_those_of_the_report(publish, hub, bundle):
    weights = bundle / "depformer.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "depformer.safetensors is not the file that manifest.json names" in objections(publish(status=1))
    weights.unlink()
    assert (
        "depformer.safetensors: missing: make the bundle again"
        in publish(
            status=2,
        ).stderr
    )
    assert hub.log == []


def test_force_publishes_and_the_card_says_why_not(publish, hub, bundle):
    edit(bundle / "parity" / "report.json", fail)
    publish("--force")
    card = held(hub)["README.md"].decode()
    top = card.split("---\n", 2)[2].split("\n## ")[0]
    assert "Published with `--force`, against these objections:" in top
    assert "its report fails: text KL is 9, over .1" in top
    assert (bundle / "README.md").read_bytes() == held(hub)["README.md"]
    assert "**Not intact: " in card


def test_a_dry_run_shows_the_card_that_goes_up(publish, hub, bundle):
    named = ("--base-model", "me/talker")
    before = (bundle / "README.md").read_bytes()
    shown = publish("--dry-run", "--show-card", *named)
    assert shown.stderr == ""
    assert hub.log == []
    assert (bundle / "README.md").read_bytes() == before
    data = ModelCard(shown.stdout).data.to_dict()
    assert data["base_model"] == ["me/talker"]
    assert data["base_model_relation"] == "quantized"
    listed = json.loads(publish("--dry-run", "--json", *named).stdout)
    assert listed["base_model"] == ["me/talker"]
    publish(*named)
    assert held(hub)["README.md"].decode() == shown.stdout == listed["card"]
    assert "the card names no base model: --base-model" in publish("--dry-run").stderr
    assert publish("--dry-run", *named).stderr == ""
    assert "--show-card needs --dry-run: give both" in publish("--show-card", status=2).stderr
    assert "talker: not the name of a base model" in publish("--base-model", "talker", status=2).stderr


def test_a_token_or_a_home_directory_in_any_file_stops_it_even_with_force(publish, hub, bundle, tmp_path):
    report = bundle / "parity" / "report.json"
    original = report.read_text()
    secret = "hf_" + "a1B2c3D4" * 4
    edit(report, lambda r: r.update(command=f"my_{secret} ppx-verify"))  # no word of its own
    done = publish("--force", status=1)
    assert "parity/report.json holds a token" in done.stderr
    assert secret not in done.stderr + done.stdout
    report.write_text(original)
    mine = "a-token-of-another-form"  # the one in use is known, whatever it looks like
    edit(report, lambda r: r.update(command=mine))
    assert "holds a token" in publish("--force", status=1, HF_TOKEN=mine).stderr
    for home in ("/home/somebody/models/", "/Users/somebody/models/"):
        report.write_text(original)
        edit(report, lambda r, home=home: r.update(command=f"ppx-verify {home}bundle"))
        assert "parity/report.json holds the path of a home directory" in publish("--force", status=1).stderr
    report.write_text(original)
    (tmp_path / "me").mkdir()
    edit(report, lambda r: r.update(command=f"ppx-verify {tmp_path}/me/x"))
    assert "holds the path of a home directory" in publish("--force", status=1, HOME=str(tmp_path / "me")).stderr
    assert hub.log == []


def test_a_private_repository(publish, hub, bundle):
    publish("--private")
    assert hub.repositories[NAME].private
    assert held(hub) == expected(bundle)
    publish("--private")
    assert commits(hub) == 2
    hub.repositories[NAME].private = False
    done = publish("--private", status=2)
    assert "is there already, and public: make it private in its settings first" in done.stderr


def test_a_pull_request_and_a_second_run_that_finds_it(publish, hub, bundle):
    hub.repositories[NAME] = Repository({"README.md": b"theirs", "model.bin": b"theirs"})
    done = publish("--create-pr")
    assert f"{hub.address}/{NAME}/discussions/1: " in done.stdout
    assert held(hub, "refs/pr/1") == expected(bundle) | {"model.bin": b"theirs"}
    assert held(hub) == {"README.md": b"theirs", "model.bin": b"theirs"}
    assert "it also holds model.bin, which is not of this bundle" in done.stdout
    done = publish("--create-pr")
    assert f"{hub.address}/{NAME}/discussions/1: nothing new" in done.stdout
    assert len(hub.repositories[NAME].requests) == 1


def test_a_branch(publish, hub, bundle):
    hub.repositories[NAME] = Repository({"README.md": b"old"})
    done = publish("--revision", "draft")
    assert f"{hub.address}/{NAME}/tree/draft: " in done.stdout
    assert held(hub, "draft") == expected(bundle)
    assert held(hub) == {"README.md": b"old"}
    done = publish("--revision", "draft", "--create-pr", status=2)
    assert "contradict each other" in done.stderr


def test_a_dry_run_needs_no_network_and_no_token(publish, hub, bundle):
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    done = publish("--dry-run", "--private", HF_ENDPOINT="http://127.0.0.1:9", HF_TOKEN="", HF_HUB_OFFLINE="1")
    lines = done.stdout.splitlines()
    files = expected(bundle)
    assert [line.split()[-1] for line in lines[:-1]] == list(files)
    assert lines[-1].startswith(f"{len(files)} files, ")
    assert lines[-1].endswith(f", to {NAME} (main; private)")
    found = json.loads(publish("--dry-run", "--json", HF_ENDPOINT="http://127.0.0.1:9", HF_TOKEN="").stdout)
    manifest = json.loads((bundle / "manifest.json").read_text())
    for name, record in manifest["files"].items():
        assert found["files"][name] == {"size": record["size"], "sha256": record["sha256"]}
    assert found["bytes"] == sum(record["size"] for record in found["files"].values())
    assert before == {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    assert hub.log == []


@pytest.mark.usefixtures("bundle")
@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("", "publishing needs a token with write access: log in with `hf auth login`"),
        ("hf_stranger", "the Hub does not know the token"),
        (
            "hf_reader",
            "the token may not do this (no): reading gated repositories and writing are permissions of their own",
        ),
    ],
)
def test_tokens_that_may_not(token, message, publish, hub):
    done = publish(status=2, HF_TOKEN=token)
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not token or token not in done.stderr
    assert NAME not in hub.repositories


@pytest.mark.parametrize(
    "name", ["model", "a/b/c", "../x", "me/..", "me/a--b", "-me/x", "me/", "me/x y", "me/" + "x" * 97]
)
def test_names_that_are_none(name):
    with pytest.raises(UserError, match="not the name of a repository: give USER/NAME"):
        check_name(name)


@pytest.mark.usefixtures("bundle")
def test_what_arrives_is_compared(publish, hub, monkeypatch):
    """A server that keeps another file than was sent: the large one by its hash, the small one by its text."""
    publish()
    repository = hub.repositories[NAME]
    files = dict(repository.at("main"))
    original = Repository.commit

    def tampered(self, branch, new):
        return original(self, branch, new | {"temporal.safetensors": new["temporal.safetensors"][::-1], "NOTICE": b"?"})

    monkeypatch.setattr(Repository, "commit", tampered)
    repository.commits[repository.heads["main"]] = {}
    done = publish(status=1)
    assert "temporal.safetensors has another sha256 there" in done.stderr
    assert "NOTICE has 1 bytes there" in done.stderr
    monkeypatch.undo()
    publish()
    assert held(hub) == {name: files[name] for name in held(hub)}


def test_what_is_no_bundle(run, tmp_path):
    (tmp_path / "empty").mkdir()
    for folder in ("empty", "nowhere"):
        assert "not a bundle: give a folder that ppx-convert wrote" in run("ppx-publish", folder, NAME, status=2).stderr


def test_convert_and_publish_in_one_command(run, hub, pico, tmp_path):
    named = ("--base-model", "me/talker")
    done = run("ppx-convert", pico, "-o", "bundle", "--verify", "--publish", NAME, "--private", *named)
    assert "[me/talker](" in held(hub)["README.md"].decode()
    assert hub.repositories[NAME].private
    assert held(hub) == expected(tmp_path / "bundle")
    assert done.stdout.splitlines()[-1].startswith(f"{hub.address}/{NAME}: ")
    assert f'fromPretrained(modelId: "{NAME}")' in held(hub)["README.md"].decode()
    for options, message in (
        (("--publish", NAME, "--no-verify"), "--publish needs --verify"),
        (("--private", "--verify"), "--private needs --publish"),
        (("--publish", "x", "--verify"), "not the name of a repository"),
        (("--base-model", "me/talker", "--verify"), "--base-model needs --publish"),
        (("--base-model", "talker", "--publish", NAME, "--verify"), "not the name of a base model"),
    ):
        assert message in run("ppx-convert", pico, "-o", "other", *options, status=2).stderr
    done = run("ppx-convert", pico, "-o", "other", "--verify", "--publish", NAME, status=2, HF_TOKEN="")
    assert "publishing needs a token" in done.stderr
    assert not Path(tmp_path / "other").exists()


@pytest.mark.parametrize("source", ["someone/personaplex", "demo"])
def test_a_source_that_has_a_name_takes_no_other_base_model(source, run, hub):
    options = ("-o", "other", "--verify", "--publish", NAME, "--base-model", "me/talker")
    done = run("ppx-convert", source, *options, status=2)
    assert f"not the base model: the bundle is made from {source}" in done.stderr
    assert hub.log == []


def test_the_server_hashes_as_the_hub_does():
    assert git_hash(b"hello\n") == "ce013625030ba8dba906f756967f9e9ca394464a"
    assert sha256(b"") == hashlib.sha256().hexdigest()
