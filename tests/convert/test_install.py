"""Bundles where the programs that load them look, in a home of the test's own."""

import errno
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import moshi_mlx
import pytest
from moshi_mlx import models as moshi_models
from ppx.convert import CheckFailed, UserError, install, uninstall
from ppx.convert.bundle import receipt as receipts
from ppx.convert.bundle.consumers import older_swift_folder

ME = "me/personaplex"
NEEDED = (  # of speech-swift's fromPretrained, with the voices that it looks for in the cache
    "temporal.safetensors", "depformer.safetensors", "embeddings.safetensors", "mimi.safetensors",
    "tokenizer_spm_32k_3.model", "config.json", "voices/NATM0.safetensors",
)  # fmt: skip
# of personaplex_mlx.local at 08ad0c1963c5393fd1fc182152131fc9a023fa25
PERSONAPLEX_MLX = {
    "-q", "--tokenizer", "--moshi-weight", "--mimi-weight", "--lm-config", "--voice", "--voice-prompt-dir"
}  # fmt: skip


@pytest.fixture
def home(tmp_path, monkeypatch):
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    for name in ("QWEN3_CACHE_DIR", "QWEN3_ASR_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def there(home):
    """Where speech-swift looks for the model."""
    return home / "Library" / "Caches" / "qwen3-speech" / "models" / "me" / "personaplex"


@pytest.fixture
def mine(bundle, tmp_path):
    shutil.copytree(bundle("--recipe", "4bit"), tmp_path / "mine")
    return tmp_path / "mine"


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_bundle_is_linked_to_where_speech_swift_looks(mine, there, home, program, tmp_path):
    done = program("ppx-install", "mine", "--as", ME, cwd=tmp_path, environment={"HOME": str(home)})
    for name in NEEDED:
        assert (there / name).samefile(mine / name)
        assert not (there / name).is_symlink()
    assert set(mx.load(str(there / "voices" / "NATM0.safetensors"))) == {"embeddings", "cache"}
    assert f'fromPretrained(modelId: "{ME}", offlineMode: true)' in done.stdout
    assert f"speech respond --model-id {ME} --input question.wav --output answer.wav" in done.stdout
    assert "asks the Hub for me/personaplex first" in done.stdout
    (line,) = [line for line in done.stdout.splitlines() if "hard links" in line]
    assert line.startswith(f"{there}: 26 files, ")
    checked = program("ppx-inspect", there, "--check", cwd=tmp_path).stdout
    assert "every file is the one that the manifest names" in checked


@pytest.mark.parametrize("variable", ["QWEN3_CACHE_DIR", "QWEN3_ASR_CACHE_DIR"])
def test_the_cache_is_where_speech_swifts_environment_says(variable, mine, home, tmp_path, monkeypatch):
    monkeypatch.setenv("QWEN3_CACHE_DIR", " ")
    monkeypatch.setenv(variable, str(tmp_path / "elsewhere"))
    done = install(mine, ME)
    assert done.folder == tmp_path / "elsewhere" / "qwen3-speech" / "models" / "me" / "personaplex"
    assert done.folder is not None
    assert (done.folder / "config.json").is_file()
    assert not (home / "Library").exists()


def test_what_speech_swift_deletes_or_replaces_does_not_touch_the_bundle(mine, there):
    """It removes a file and moves a downloaded one in its place; what it put there is not ours any more."""
    install(mine, ME)
    before = tree(mine)
    (there / "config.json").unlink()
    (there / "config.json").write_text("{}")
    assert tree(mine) == before
    with pytest.raises(UserError, match=r"holds files that were not installed \(config.json\)"):
        install(mine, ME)
    done = uninstall(mine, ME)
    assert done.left == ["config.json"]
    assert tree(there) == {"config.json": b"{}"}


def test_removing_takes_away_what_was_put_there_and_nothing_else(mine, there, home, program, tmp_path):
    install(mine, ME)
    (there / "voices" / "other.safetensors").write_bytes(b"x")
    (there / ".cache").mkdir()
    (there / ".cache" / "note").write_text("speech-swift's")
    shutil.rmtree(mine)
    environment = {"HOME": str(home)}
    said = program("ppx-install", "mine", "--as", ME, "--remove", "--dry-run", cwd=tmp_path, environment=environment)
    assert "26 files would be removed (pico, recipe 4bit, 26 files linked)" in said.stdout
    assert (there / "config.json").is_file()
    said = program("ppx-install", "mine", "--as", ME, "--remove", cwd=tmp_path, environment=environment)
    assert "voices/other.safetensors: was not installed, or changed since: it stays" in said.stdout
    assert set(tree(there)) == {"voices/other.safetensors", ".cache/note"}
    said = program("ppx-install", "mine", "--as", ME, "--remove", cwd=tmp_path, environment=environment, status=2)
    assert said.stderr.endswith("nothing is installed there: give the name that it was installed as with --as\n")


def test_another_bundle_takes_the_place_of_the_one_that_was_installed(mine, bundle, there):
    install(mine, ME)
    other = bundle("--recipe", "8bit")
    planned = install(other, ME, dry_run=True)
    assert planned.replaces == "pico, recipe 4bit, 26 files linked"
    assert (there / "config.json").samefile(mine / "config.json")
    done = install(other, ME)
    assert done == planned
    assert (there / "config.json").samefile(other / "config.json")
    again = install(other, ME)
    assert again.unchanged
    assert again.replaces is None
    assert [path.name for path in there.parent.iterdir()] == ["personaplex"]


def test_only_the_bundle_that_is_installed_is_removed(mine, bundle, there):
    other = bundle("--recipe", "8bit")
    install(other, ME)
    with pytest.raises(
        UserError, match=r"another bundle is installed as me/personaplex \(pico, recipe 8bit, 26 files linked\)"
    ):
        uninstall(mine, ME)
    assert there.is_dir()
    assert uninstall(ME).left == []
    assert not there.parent.exists()


def test_the_folder_of_a_user_stays_while_another_model_is_in_it(mine, there):
    install(mine, ME)
    install(mine, "me/other")
    uninstall(mine, ME)
    assert [path.name for path in there.parent.iterdir()] == ["other"]


def test_what_was_installed_of_a_damaged_bundle_is_removed(mine, there):
    install(mine, ME)
    (mine / "manifest.json").unlink()  # which is linked
    (mine / "manifest.json").write_text("{")
    assert uninstall(mine, ME).left == []
    assert not there.exists()


def test_copies_are_files_of_their_own(mine, there):
    done = install(mine, ME, copy=True)
    assert done.copied
    placed = tree(there)
    del placed[receipts.RECEIPT]
    kept = tree(mine)
    del kept["README.md"]
    assert placed == kept
    assert not any((there / name).samefile(mine / name) for name in NEEDED)
    os.utime(there / "config.json", (1, 1))  # as after a restore: the hash tells that it is the same
    assert uninstall(mine, ME).left == []
    assert not there.exists()


def test_a_damaged_bundle_is_not_copied(mine, there):
    data = bytearray((mine / "mimi.safetensors").read_bytes())
    data[-1] ^= 1
    (mine / "mimi.safetensors").write_bytes(data)
    with pytest.raises(CheckFailed, match=r"mimi\.safetensors: its sha256 is not the one in manifest\.json"):
        install(mine, ME, copy=True)
    assert list(there.parent.iterdir()) == []
    (mine / "voices" / "NATM0.safetensors").unlink()
    (mine / "mimi.safetensors").write_bytes(data[:-1])
    with pytest.raises(UserError, match="NATM0"):
        install(mine, ME)


def others(there: Path, _: Path) -> None:
    there.mkdir(parents=True)
    (there / "model.safetensors").write_bytes(b"theirs")


def a_link(there: Path, home: Path) -> None:
    there.parent.mkdir(parents=True)
    there.symlink_to(home)


def a_file(there: Path, _: Path) -> None:
    there.parent.mkdir(parents=True)
    there.write_text("")


def older(_: Path, home: Path) -> None:
    folder = older_swift_folder(ME)
    assert folder == home / "Library" / "Caches" / "qwen3-speech" / "me_personaplex"
    folder.mkdir(parents=True)
    (folder / "temporal.safetensors").write_bytes(b"theirs")


def unfinished(there: Path, _: Path) -> None:
    folder = there.with_name(".personaplex.ppx-partial")
    folder.mkdir(parents=True)
    (folder / "letter.txt").write_text("theirs")


@pytest.mark.parametrize(
    ("prepare", "message"),
    [
        (others, r"holds files that were not installed \(model.safetensors\): move that away"),
        (a_link, "is not a folder that was installed"),
        (a_file, "is not a folder that was installed"),
        (older, "speech-swift reads this folder before the new one"),
        (unfinished, "holds letter.txt, which was not installed"),
    ],
)
@pytest.mark.parametrize("dry_run", [True, False])
def test_what_others_put_there_is_not_touched(prepare, message, dry_run, mine, there, home):
    prepare(there, home)
    before = tree(home)
    if prepare is unfinished and dry_run:
        return
    with pytest.raises(UserError, match=message):
        install(mine, ME, dry_run=dry_run)
    assert {name: data for name, data in tree(home).items() if "ppx-convert" not in name} == before


def test_an_empty_folder_is_one_that_speech_swift_made(mine, there):
    (there / "voices").mkdir(parents=True)
    install(mine, ME)
    assert (there / "config.json").is_file()


@pytest.mark.parametrize(
    "text",
    ["{", "[]", json.dumps({"receipt_version": 2}), "x" * 100, json.dumps({"files": {"../../x": {}}})],
)
def test_a_receipt_that_is_not_ours_is_refused(text, mine, there):
    install(mine, ME)
    (there / receipts.RECEIPT).unlink()
    (there / receipts.RECEIPT).write_text(text)
    for call in (install, uninstall):
        with pytest.raises(UserError, match=r"not a receipt of ppx-convert"):
            call(mine, ME)
    assert (there / "config.json").is_file()


def test_a_receipt_cannot_name_files_elsewhere(mine, there, home):
    install(mine, ME)
    (home / "letter.txt").write_text("theirs")
    path = there / receipts.RECEIPT
    data = json.loads(path.read_text())
    record = receipts.placed(home / "letter.txt", "0" * 64)
    entry = {"size": record.size, "sha256": record.sha256, "inode": record.inode, "modified": record.modified}
    outside = os.path.relpath(home / "letter.txt", there)
    path.write_text(json.dumps(data | {"files": data["files"] | {outside: entry}}))
    with pytest.raises(UserError, match="not a receipt"):
        uninstall(mine, ME)
    path.write_text(json.dumps(data | {"files": {"voices/letter.txt": entry}}))
    shutil.rmtree(there / "voices")
    (there / "voices").symlink_to(home)  # where a file of that inode is
    assert "voices" in uninstall(mine, ME).left
    assert (home / "letter.txt").is_file()


KILL = """
import os, signal, sys
from pathlib import Path
from ppx.convert import install
from ppx.convert.bundle import placement
where, at, calls = sys.argv[3], int(sys.argv[4]), 0
def dying(real):
    def run(*arguments, **options):
        global calls
        calls += 1
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **options)
    return run
if where == "link":
    placement._link = dying(placement._link)
else:
    Path.rename = dying(Path.rename)
install(sys.argv[1], sys.argv[2])
"""


@pytest.mark.parametrize(("where", "at"), [("link", 1), ("link", 20), ("rename", 1), ("rename", 2), ("rename", 3),
                                           ("rename", 4)])  # fmt: skip
def test_a_killed_installation_never_looks_finished(where, at, mine, bundle, there):
    """The renames: of a receipt, of the complete one, of the old folder away, of the new one in its place."""
    install(mine, ME)
    other = bundle("--recipe", "8bit")
    done = subprocess.run([sys.executable, "-c", KILL, other, ME, where, str(at)], check=False)
    assert done.returncode == -signal.SIGKILL
    if there.exists():
        assert not there.is_symlink()
        assert all((there / name).samefile(mine / name) for name in NEEDED)
    assert any(path.name.startswith(".personaplex.ppx-") for path in there.parent.iterdir())
    install(other, ME)
    assert all((there / name).samefile(other / name) for name in NEEDED)
    assert [path.name for path in there.parent.iterdir()] == ["personaplex"]


def test_a_killed_installation_is_removed(mine, there):
    done = subprocess.run([sys.executable, "-c", KILL, mine, ME, "link", "5"], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not there.exists()
    assert uninstall(mine, ME).removed == [".personaplex.ppx-partial"]
    assert not there.parent.exists()


def test_two_installations_wait_for_each_other(mine, there):
    from ppx.convert.bundle.placement import locked

    with locked(), pytest.raises(UserError, match="another installation is at work"):
        install(mine, ME)
    assert not there.exists()


def test_another_volume_takes_copies(mine, there, monkeypatch):
    def link(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, "Cross-device link")

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(UserError, match=r"cannot be linked to .* \(Cross-device link\): copy it instead"):
        install(mine, ME)
    assert list(there.parent.iterdir()) == []
    install(mine, ME, copy=True)


def test_a_disk_without_room_is_told_before_copying(mine, there, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(UserError, match=r"0\.00 GB are free and 0\.00 GB are needed: free some, or link it instead"):
        install(mine, ME, copy=True)
    assert list(there.parent.iterdir()) == []


@pytest.mark.parametrize("name", ["x", "../x", "a/../b", "a/b/c", "me/.hidden", "me/a--b", "-a/b", "a b/c", "/a/b"])
def test_names_that_are_no_models(name, mine, home):
    with pytest.raises(UserError, match="not a name such as me/personaplex-4bit"):
        install(mine, name)
    assert list(home.iterdir()) == []


@pytest.mark.usefixtures("mine")
def test_a_bundle_without_a_name_is_local(home, program, tmp_path):
    environment = {"HOME": str(home)}
    said = json.loads(program("ppx-install", "mine", "--json", cwd=tmp_path, environment=environment).stdout)
    assert said["identity"] == "local/mine"
    assert Path(said["folder"]) == home / "Library" / "Caches" / "qwen3-speech" / "models" / "local" / "mine"
    assert said["bytes"] == sum(said["files"].values())
    assert (said["unchanged"], said["replaces"], said["copied"], said["dry_run"]) == (False, None, False, False)
    said = json.loads(
        program("ppx-install", "./mine", "--remove", "--json", cwd=tmp_path, environment=environment).stdout
    )
    assert len(said["removed"]) == 26
    assert said["left"] == []


@pytest.mark.usefixtures("home")
def test_a_name_that_speech_swift_downloads_is_warned_of(mine):
    done = install(mine, "aufklarer/PersonaPlex-7B-MLX-4bit", dry_run=True)
    assert "it replaces these files by those that aufklarer/PersonaPlex-7B-MLX-4bit has" in done.usage[1].note


def options_of(module: str) -> set[str]:
    """The options of a program of the real moshi_mlx, read from its source: importing it needs a sound card."""
    source = (Path(str(moshi_mlx.__file__)).parent / f"{module}.py").read_text()
    return {option for call in re.findall(r"add_argument\((.*?)\)", source, re.DOTALL)
            for option in re.findall(r'"(--?[a-z-]+)"', call)}  # fmt: skip


def test_a_bundle_without_voices_is_installed_and_the_silence_told(pico, program, home, there, tmp_path):
    shutil.copytree(pico, tmp_path / "source", ignore=shutil.ignore_patterns("golden", "voices.tgz"))
    program("ppx-convert", "source", "--recipe", "4bit", "-o", "plain", "--no-verify", cwd=tmp_path)
    done = install(tmp_path / "plain", ME)
    assert "no voices: the library then speaks in whatever voice the model samples" in done.usage[1].note
    assert (there / "temporal.safetensors").is_file()
    assert not (there / "voices").exists()
    assert list(home.iterdir()) == [home / "Library"]


@pytest.mark.parametrize("recipe", ["moshi-q4", "moshi-q8", "bf16"])
@pytest.mark.parametrize("steps", [16, 8])
def test_moshi_mlx_and_personaplex_mlx_get_their_command_lines(recipe, steps, bundle, home):
    folder = bundle("--recipe", recipe, "--depformer-steps", str(steps))
    done = install(folder)
    assert (done.folder, done.files) == (None, {})
    usages = {usage.program: usage for usage in done.usage}
    unpack, _, line = str(usages["personaplex-mlx"].line).partition(" && ")
    assert shlex.split(unpack) == ["tar", "-xzf", str(folder / "voices.tgz")]
    config = json.loads((folder / "config.json").read_text())
    takes_user = moshi_models.LmConfig.from_config_dict(config).other_codebooks == 8
    assert takes_user == (steps == 8) == (usages["moshi_mlx"].line is not None)
    lines = {line: PERSONAPLEX_MLX}
    if takes_user:
        lines[str(usages["moshi_mlx"].line)] = options_of("local_web")
    for command, known in lines.items():
        words = shlex.split(command)
        assert words[:2] == ["python", "-m"]
        assert {word for word in words[3:] if word.startswith("-")} <= known
        files = {Path(word) for word in words if word.startswith("/")}
        assert {file.name for file in files} >= {config["moshi_name"], config["mimi_name"], config["tokenizer_name"]}
        assert all(file.is_file() for file in files)
        bits = [words[words.index("-q") + 1]] if "-q" in words else []
        assert bits == {"moshi-q4": ["4"], "moshi-q8": ["8"], "bf16": []}[recipe]
    assert list(home.iterdir()) == []


def test_a_bundle_for_mlx_is_run_by_ppx_speak(bundle, home):
    done = install(bundle("--recipe", "mixed"))
    (usage,) = done.usage
    assert shlex.split(str(usage.line))[:2] == ["ppx-speak", str(done.bundle)]
    assert list(home.iterdir()) == []


def test_commands_of_the_page_run(bundle, home, program, tmp_path):
    """Those with a bundle in a folder, one after the other."""
    page = (Path(__file__).parent.parent.parent / "docs" / "install.md").read_text()
    lines = [line for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    commands = [line for line in lines if line.startswith("ppx-install")]
    assert len(commands) == 4
    (tmp_path / "my-bundle").symlink_to(bundle("--recipe", "4bit"))
    (tmp_path / "my-moshi-q4").symlink_to(bundle("--recipe", "moshi-q4"))
    found = []
    for command in commands:
        name, *arguments = shlex.split(command)
        found.append(program(name, *arguments, cwd=tmp_path, environment={"HOME": str(home)}).stdout)
    assert "would be installed as me/personaplex-4bit" in found[0]
    assert "is installed as me/personaplex-4bit" in found[1]
    assert "26 files removed" in found[2]
    assert "python -m personaplex_mlx.local -q 4" in found[3]
    assert not list(home.rglob("*.safetensors"))
