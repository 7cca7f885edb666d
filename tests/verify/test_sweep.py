"""Sweeps in one process: the file, the cells, what is recorded, what resumes, and storage behind a URL."""

import csv
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ppx.convert.errors import UserError
from ppx.quant.affine import BITS
from ppx.verify import sweep
from ppx.verify.records import Times
from ppx.verify.sweeping import local_run
from ppx.verify.sweeping import place as places
from ppx.verify.sweeping import sweep as sweeps
from ppx.verify.sweeping.cells import cells_of
from ppx.verify.sweeping.jobs import Job, source_reference
from ppx.verify.sweeping.place import MARKER, Place, download, fetch_source, shown, source_fingerprint, upload
from ppx.verify.sweeping.progress_line import time_left
from ppx.verify.sweeping.records import CellResult, front, read_result, to_text
from ppx.verify.sweeping.settings import CalibrationSet, Evaluation, Resources
from ppx.verify.sweeping.sweep_file import read
from ppx.verify.sweeping.tables import write_csv
from ppx.verify.sweeping.work import Outcome
from safetensors.numpy import load_file, save_file
from sources import rename, shard
from sweep_files import TWO, rows_of, untimed, written

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def once(pico: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A finished sweep of two cells: its file and its results."""
    folder = tmp_path_factory.mktemp("sweep")
    file = written(folder, TWO, pico)
    sweep(file, folder / "results", keep="all")
    return file, folder / "results"


def test_all_mistakes_come_at_once(tmp_path, pico):
    text = """
methods = ["mse", "magic"]
surprise = 1
[[sources]]
source = "nowhere"
[[sources]]
name = "a/b"
source = "PICO"
revision = "main"
[[recipes]]
bits = 4
group_size = 48
[[recipes]]
recipe = "4bit"
target_size = "5GB"
[[recipes]]
recipe = "unheard-of"
[[calibration]]
tokens = ["gone.safetensors"]
sessions = 3
[evaluation]
frames = 1
controls = [7]
[resources]
cores = 0
memory = "much"
gpus = 1.5
[[exclude]]
sauce = "x"
[[include]]
source = "other"
recipe = "4bit"
"""
    with pytest.raises(UserError) as caught:
        read(written(tmp_path, text, pico))
    said = str(caught.value)
    for part in (
        "unknown method 'magic'",
        "unknown key 'surprise'",
        "source 1: nowhere: neither a folder nor a Hub id",
        "name 'a/b'",
        "a revision has no effect",
        "group_size is 48",
        "recipe and target_size is given",
        "unheard-of: no such recipe or file",
        "gone.safetensors: no such file",
        "sessions is for self-generated",
        "frames is 1",
        "controls of 7 bit",
        "cores is 0",
        "much: not a size",
        "gpus is 1.5",
        "unknown key 'sauce'",
        "source is 'other'",
    ):
        assert part in said, part
    assert all(line.startswith(str(tmp_path)) for line in said.splitlines())


@pytest.mark.parametrize("text", ["", "sources = 3", "[[sources]]\nsource = 4", "x = [[", "\x00", "methods = 3"])
def test_what_is_not_a_sweep_is_refused_in_words(tmp_path, text):
    (tmp_path / "sweep.toml").write_text(text)
    with pytest.raises(UserError, match=r"sweep\.toml"):
        read(tmp_path / "sweep.toml")


def test_the_matrix_has_each_cell_once(tmp_path, pico):
    text = """
methods = ["rtn", "gptq"]
[[sources]]
name = "a"
source = "PICO"
[[sources]]
name = "b"
source = "demo"
[[recipes]]
bits = 4
[[recipes]]
recipe = "bf16"
[[recipes]]
name = "small"
bits_per_weight = 5
[[calibration]]
name = "own"
[[calibration]]
name = "recorded"
tokens = ["PICO/calibration_tokens.safetensors"]
[[exclude]]
source = "b"
method = "gptq"
[[exclude]]
recipe = "small"
calibration = "own"
[[include]]
source = "b"
recipe = "4bit-g64"
method = "gptq"
calibration = "own"
"""
    names = [cell.name for cell in cells_of(read(written(tmp_path, text, pico)))]
    assert names == [
        "a/4bit-g64-rtn",
        "a/4bit-g64-gptq-own",
        "a/4bit-g64-gptq-recorded",
        "a/bf16",  # quantizes nothing: one cell, whatever the methods
        "a/small-rtn-recorded",
        "a/small-gptq-recorded",
        "b/4bit-g64-rtn",
        "b/bf16",
        "b/small-rtn-recorded",
        "b/4bit-g64-gptq-own",
    ]


def test_the_example_of_the_page_is_a_sweep(tmp_path):
    page = (Path(__file__).parent.parent.parent / "docs" / "sweeps.md").read_text()
    (tmp_path / "sweep.toml").write_text(re.findall(r"```toml\n(.*?)```", page, re.DOTALL)[0])
    settings = read(tmp_path / "sweep.toml")
    assert [cell.name for cell in cells_of(settings)] == [
        "base/4bit",
        "base/4bit-gptq-own",
        "base/6bit-g64",
        "base/6bit-g64-gptq-own",
        "base/fits-5GB-own",
        "base/fits-5GB-gptq-own",
        "demo/4bit",
        "demo/6bit-g64",
        "demo/fits-5GB-own",
        "demo/4bit-rtn",
    ]
    assert settings.resources == Resources(cores=4, memory=12_000_000_000)
    assert settings.evaluation.controls == (8,)
    kinds: dict[str, Any] = {"resources": Resources, "evaluation": Evaluation, "calibration": CalibrationSet}
    for table, keys in kinds.items():
        row = re.findall(rf"^\| `\[+{table}\]+` \| (.*) \|$", page, re.MULTILINE)[0]
        assert all(f"`{key}`" in row for key in keys.__dataclass_fields__), table


def test_a_dry_run_prints_sizes_of_the_plan(program, tmp_path, once):
    file, results = once
    said = program("ppx-sweep", file, "--dry-run", "--json", cwd=tmp_path).stdout
    planned = {cell["name"]: cell["bytes"] for cell in json.loads(said)["cells"]}
    for result in results.glob("cells/*/*/result.json"):
        made = read_result(result)
        assert planned.pop(made.name) == made.bytes
    assert not planned
    assert [path.name for path in tmp_path.iterdir()] == []


def test_results_are_those_of_the_reports_and_link_to_them(once):
    _, results = once
    rows = rows_of(results)
    assert [row["name"] for row in rows] == ["pico/3bit-g64", "pico/4bit-g64"]
    page = (results / "index.html").read_text()
    for row in rows:
        report = json.loads((results / row["report"]).with_suffix(".json").read_text())
        assert float(row["agent_kl"]) == report["predictions"]["agent"]["bundle"]["kl"]["mean"]
        manifest = (results / row["bundle"] / "manifest.json").stat().st_size
        assert int(row["bytes"]) == report["bundle"]["bytes"] - manifest
        assert (results / row["bundle"] / "manifest.json").is_file()
        assert f'href="{row["report"]}"' in page
    assert page.count("<svg") == 1
    assert not re.search(r'(?:src|href)="(?:https?:)?//', page)
    parquet = pytest.importorskip("pyarrow.parquet", reason="pyarrow is not installed")
    table = parquet.read_table(results / "results.parquet").to_pylist()
    assert [row["agent_kl"] for row in table] == [float(row["agent_kl"]) for row in rows]
    assert not (results / "work").exists()


def watched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that gets the names of what runs."""
    ran: list[str] = []

    def run_here(jobs: Sequence[Job], *more: Any) -> Iterator[tuple[Job, Outcome]]:
        ran.extend(job.label for job in jobs)
        return real(jobs, *more)

    real = local_run.run_here
    monkeypatch.setattr(local_run, "run_here", run_here)
    return ran


def test_a_changed_file_runs_only_what_changed(once, pico, tmp_path, monkeypatch):
    file, before = once
    results = tmp_path / "results"
    shutil.copytree(before, results)
    ran = watched(monkeypatch)
    sweep(file, results, keep="all")
    assert ran == []
    assert untimed(results) == untimed(before)
    changed = written(tmp_path, TWO.replace("bits = 3", "bits = 2"), pico)
    done = sweep(changed, results)
    assert ran == ["pico/2bit-g64"]
    assert [one.name for one in done.results] == ["pico/4bit-g64", "pico/2bit-g64"]


def test_a_cell_that_fails_is_recorded_and_does_not_stop_the_rest(program, pico, tmp_path):
    text = TWO.replace("bits = 3", 'bits = 4\ngroup_size = 128\nname = "wide"').replace("bits = 4\n[[", "bits = 3\n[[")
    file = written(tmp_path, text, pico)
    first = program("ppx-sweep", file, "-o", "results", "--keep", "best", cwd=tmp_path, status=1)
    assert "1 of 2 cells failed" in first.stderr
    rows = {row["name"]: row for row in rows_of(tmp_path / "results")}
    assert rows["pico/wide"]["status"] == "failed"
    assert "not divided by groups of 128" in rows["pico/wide"]["message"]
    assert rows["pico/3bit-g64"]["status"] == "intact"
    again = program("ppx-sweep", file, "-o", "results", "--keep", "best", cwd=tmp_path, status=1)
    assert again.stderr.startswith("1 of 2 cells done")
    mended = written(tmp_path, text.replace("group_size = 128", "group_size = 32"), pico)
    program("ppx-sweep", mended, "-o", "results", "--keep", "best", cwd=tmp_path)
    assert len(list((tmp_path / "results" / "bundles").glob("*/*/manifest.json"))) == 2


def test_calibration_and_sensitivities_are_made_once(pico, tmp_path, monkeypatch):
    text = TWO.replace("bits = 4\n", 'bits = 4\n[[recipes]]\nname = "five"\nbits_per_weight = 7.5\n')
    text = 'methods = ["gptq", "rtn"]\n' + text + '[[calibration]]\nname = "few"\n'
    text += 'tokens = ["few.safetensors"]\nframes = 40\n'
    tokens = load_file(pico / "calibration_tokens.safetensors")["tokens"][:2, :, :40]
    save_file({"tokens": tokens.copy()}, tmp_path / "few.safetensors")
    text += '[[exclude]]\nrecipe = "?bit*"\nmethod = "rtn"\n[[exclude]]\nrecipe = "3bit*"\n'
    from ppx.calibrate import measurement, sensitivity

    measured = []

    def quick(source: Any, token_set: Any, mark: str, _quiet: bool, _kept: Any) -> sensitivity.Sensitivities:
        measured.append(mark)
        parts = sensitivity.members_of(source.architecture)
        cost = {bits: dict.fromkeys(sensitivity.STREAMS, 0.5**bits) for bits in BITS}
        error = {(bits, size): 0.5**bits for bits in BITS for size in (32, 64)}
        costs, errors = dict.fromkeys(parts, cost), dict.fromkeys(parts, error)
        return sensitivity.Sensitivities(token_set.description, mark, costs=costs, errors=errors)

    monkeypatch.setattr(measurement, "measure", quick)
    done = sweep(written(tmp_path, text, pico), tmp_path / "results")
    assert not done.failures
    assert {one.name: one.calibration for one in done.results} == {
        "pico/4bit-g64-gptq-few": "few",
        "pico/five-gptq-few": "few",
        "pico/five-rtn-few": "few",
    }
    assert len(measured) == 1
    assert len(list((tmp_path / "results" / "shared" / "pico").iterdir())) == 2
    assert all(one.bits_per_weight <= 7.5 for one in done.results if "five" in one.name)


def test_a_source_is_all_of_its_files(pico, tmp_path):
    """Also one in shards with other names: a change of any file is another source."""
    shutil.copytree(pico, tmp_path / "source", ignore=shutil.ignore_patterns("golden", "*_tokens.safetensors"))
    shard(tmp_path / "source")
    rename(tmp_path / "source", mimi_name="mimi.safetensors")
    source = replace(read(written(tmp_path, TWO, pico)).sources[0], where=str(tmp_path / "source"))
    place = Place(tmp_path / "results")
    marks = {source_reference(source, place)[1]}
    for name in ("model-00002-of-00003.safetensors", "mimi.safetensors", "voices.tgz"):
        with (tmp_path / "source" / name).open("ab") as file:
            file.write(b"x")
        marks.add(source_reference(source, place)[1])
    assert len(marks) == 4
    url = (tmp_path / "source").as_uri()
    names = {name for name, *_ in source_fingerprint(url)}
    assert names >= {"model-00003-of-00003.safetensors", "mimi.safetensors", "voices.tgz", "config.json"}
    fetched = fetch_source(url, tmp_path / "fetched")
    assert {path.name for path in fetched.iterdir()} - {"README.md"} == names
    (tmp_path / "source" / "mimi.safetensors").unlink()
    with pytest.raises(UserError, match=r"mimi.safetensors not there; a source holds model.safetensors"):
        source_fingerprint(url)


def result(name: str, nbytes: int, kl: float | None, intact: bool = True) -> CellResult:
    values: dict[str, Any] = dict.fromkeys(CellResult.__dataclass_fields__, "x")
    values |= {"name": name, "bytes": nbytes, "agent_kl": kl, "intact": intact, "failure": None, "bits_per_weight": 4.0}
    values |= dict.fromkeys(("text_kl", "codebook0_kl", "agent_kl_error", "agent_top1", "rounding_kl"), 0.5)
    return CellResult(**values | {"times": Times("2026-01-01T00:00:00Z", 1.0)})


def test_the_front_has_what_nothing_beats():
    cells = [result("a", 10, 0.5), result("b", 20, 0.1), result("c", 20, 0.2), result("d", 30, 0.1)]
    cells += [result("broken", 5, 0.01, intact=False), result("unknown", 1, None), result("e", 40, 0.05)]
    assert front(cells) == {"a", "b", "e"}
    assert front([]) == set()


def test_results_of_others_are_checked(tmp_path):
    good = to_text(result("a", 1, 0.5))
    (tmp_path / "r.json").write_text(good)
    assert read_result(tmp_path / "r.json") == result("a", 1, 0.5)
    for bad in (
        good.replace('"bytes": 1', '"bytes": -1'),
        good.replace("0.5", "NaN"),
        good.replace('"a"', '"\\u001b"'),
        "[",
    ):
        (tmp_path / "r.json").write_text(bad)
        with pytest.raises(UserError, match=r"r\.json: not a sweep's"):
            read_result(tmp_path / "r.json")


def test_texts_of_a_table_are_no_formulas(tmp_path):
    from ppx.verify.sweeping.tables import COLUMNS

    write_csv([dict.fromkeys(COLUMNS) | {"name": '=cmd("x")', "bytes": -3}], tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row["name"] == '\'=cmd("x")'
    assert row["bytes"] == "-3"


def test_time_left_is_of_cells_alike():
    took = {("a", "rtn"): [2.0, 4.0], ("a", "gptq"): [30.0]}
    assert time_left([], {}, 1) == 0
    assert time_left([("a", "rtn")], {}, 1) is None
    assert time_left([("a", "rtn"), ("a", "gptq")], took, 1) == 33
    assert time_left([("a", "rtn"), ("a", "gptq")], took, 8) == 30  # no sooner than the longest
    assert time_left([("b", "rtn")] * 4, took, 2) == 24


def test_cells_side_by_side_by_what_they_take():
    assert Resources(cores=2, memory=10, gpus=0.5).slots(8, 100, 1) == 2
    assert Resources(cores=2, memory=10).slots(8, 25, 0) == 2
    assert Resources(cores=4).slots(2, 0, 0) == 0


@pytest.fixture
def memory() -> Iterator[str]:
    from fsspec.implementations.memory import MemoryFileSystem

    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    yield "memory://sweep"
    MemoryFileSystem.store.clear()


def test_results_through_a_url_are_the_same(once, memory, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file, before = once
    sweep(file, tmp_path / "results", storage=memory, keep="all")
    usual = {name: data for name, data in untimed(before).items() if name.startswith("cells/")}
    travelled = untimed(tmp_path / "results")
    assert {name: data for name, data in travelled.items() if name.startswith("cells/") and MARKER not in name} == usual
    rows = rows_of(tmp_path / "results")
    assert all(row["bundle"].startswith("memory://sweep/bundles/pico/") for row in rows)
    download(memory, rows[0]["bundle"].removeprefix("memory://sweep/"), tmp_path / "bundle")
    assert (tmp_path / "bundle" / "manifest.json").is_file()
    ran = watched(monkeypatch)
    done = sweep(file, tmp_path / "elsewhere", storage=memory, keep="all")  # another driver, with an empty folder
    assert len(done.results) == 2
    assert ran == []


def test_a_source_behind_a_url_is_one(pico, memory, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    import fsspec

    files = fsspec.filesystem("memory")
    for path in pico.iterdir():
        if path.is_file():
            files.put_file(str(path), f"/sources/pico/{path.name}")
    text = TWO.replace('source = "PICO"', 'source = "memory://sources/pico"').replace("[[recipes]]\nbits = 3\n", "")
    done = sweep(written(tmp_path, text, pico), tmp_path / "results", storage=memory)
    assert [one.intact for one in done.results] == [True]
    files.rm("/sources/pico/tokenizer_spm_32k_3.model")
    with pytest.raises(UserError, match=r"memory://sources/pico: tokenizer_spm_32k_3\.model not there"):
        sweep(written(tmp_path, text, pico), tmp_path / "results", storage=memory)


def test_what_is_behind_a_url_is_checked(memory, tmp_path):
    folder = tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    (folder / "inner" / "a.txt").write_text("content")
    upload(folder, memory, "cells/one")
    download(memory, "cells/one", tmp_path / "copy")
    assert (tmp_path / "copy" / "inner" / "a.txt").read_text() == "content"
    import fsspec

    files = fsspec.filesystem("memory")
    files.pipe_file("/sweep/cells/one/inner/a.txt", b"changed")
    with pytest.raises(UserError, match="not what its marker says"):
        download(memory, "cells/one", tmp_path / "other")
    files.pipe_file("/sweep/cells/one/inner/a.txt", b"content and more")
    with pytest.raises(UserError, match="more than 7 bytes"):
        download(memory, "cells/one", tmp_path / "other")
    for name in ("../out", "/etc/x", "a/../../b", "a\\b"):
        marker = {"files": {name: {"size": 1, "sha256": "0" * 64}}}
        files.pipe_file(f"/sweep/cells/one/{MARKER}", json.dumps(marker).encode())
        with pytest.raises(UserError, match="names files outside"):
            download(memory, "cells/one", tmp_path / "other")
    files.pipe_file(f"/sweep/cells/one/{MARKER}", b"[]")
    with pytest.raises(UserError, match="not a sweep's"):
        Place(tmp_path, memory).has("cells/one")
    files.rm_file(f"/sweep/cells/one/{MARKER}")
    assert not Place(tmp_path, memory).has("cells/one")  # an upload that was killed
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "copy"}


def test_secrets_of_urls_are_not_shown(tmp_path):
    assert shown("s3://key:secret@bucket/folder?token=x") == "s3://bucket/folder"
    with pytest.raises(UserError) as caught:
        Place(tmp_path, "nothing://me:secret@host/x").has("cells/one")
    assert "secret" not in str(caught.value)


def test_work_of_a_process_that_still_runs_is_left_alone(tmp_path):
    place = Place(tmp_path)
    with place.work("cells/a") as first:
        (first / "half").write_text("")
        with place.work("cells/a") as second:
            assert second != first

    def fail() -> None:
        with place.work("cells/a") as third:
            (third / "half").write_text("")
            raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        fail()
    with place.work("cells/a") as resumed:
        assert (resumed / "half").is_file()


def test_two_sweeps_do_not_share_a_folder(once, tmp_path):
    file, results = once
    with sweeps._locked(results), pytest.raises(UserError, match="another sweep is at work"):
        sweep(file, results)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(UserError, match="holds files that are not of a sweep"):
        sweep(file, tmp_path / "mine")
    with pytest.raises(UserError, match="not a URL"):
        sweep(file, results, storage="bucket")
    assert places.MARKER not in {path.name for path in results.rglob("*")}
