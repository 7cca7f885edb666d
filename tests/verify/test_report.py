"""How a report is written into a bundle."""

import json
import os
from pathlib import Path

import pytest
from ppx.verify import report as reports


@pytest.fixture
def contents(monkeypatch):
    """Reports of a number, whose pages hold that number."""
    names = [f"parity/{name}" for name in (reports.MARKDOWN, reports.HTML)]
    monkeypatch.setattr(reports, "pages", lambda report: dict.fromkeys(names, str(report["number"])))

    def read(folder):
        pages = [(folder / name).read_text() for name in names]
        return [json.loads((folder / "parity" / reports.JSON).read_text())["number"], *map(int, pages)]

    return read


def test_a_report_stays_until_the_next_one_is_written(contents, tmp_path, monkeypatch):
    reports.write({"number": 1}, tmp_path)
    assert contents(tmp_path) == [1, 1, 1]
    calls = []

    def cut_off(name, at):
        """Interrupt the call of this number, of those that give files or folders another name."""
        rename = getattr(Path, name)

        def call(*arguments):
            calls.append(arguments)
            if len(calls) == at:
                raise KeyboardInterrupt
            return rename(*arguments)

        return call

    for at in (1, 2, 3):
        calls.clear()
        with monkeypatch.context() as patch:
            for name in ("rename", "replace"):
                patch.setattr(Path, name, cut_off(name, at))
            with pytest.raises(KeyboardInterrupt):
                reports.write({"number": 2}, tmp_path)
        assert contents(tmp_path)[0] == 1  # report.json, from which the pages come, is the last
    reports.write({"number": 2}, tmp_path)
    assert contents(tmp_path) == [2, 2, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["parity"]


def test_a_full_disk_leaves_the_earlier_report(contents, tmp_path, monkeypatch):
    reports.write({"number": 1}, tmp_path)

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            reports.write({"number": 2}, tmp_path)
    assert contents(tmp_path) == [1, 1, 1]


def test_nothing_is_written_through_a_link(contents, tmp_path):
    bundle, elsewhere = tmp_path / "bundle", tmp_path / "elsewhere"
    bundle.mkdir()
    elsewhere.mkdir()
    (bundle / "parity").symlink_to(elsewhere)
    reports.write({"number": 1}, bundle)
    assert contents(bundle) == [1, 1, 1]
    assert not list(elsewhere.iterdir())
