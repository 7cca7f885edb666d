"""How a report is written into a bundle."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from ppx.convert.errors import UserError
from ppx.verify import compare_reports
from ppx.verify import report as reports
from ppx.verify.records import Report

EARLIER = Path(__file__).parents[1] / "data" / "earlier"


def numbered(number: int) -> Report:
    """A report with a number for its command."""
    return replace(reports.read(EARLIER / "report.json"), command=str(number))


@pytest.fixture
def contents(monkeypatch):
    """The commands in a folder's report and pages, which are the command alone."""
    names = [f"parity/{name}" for name in (reports.MARKDOWN, reports.HTML)]
    monkeypatch.setattr(reports, "pages", lambda report: dict.fromkeys(names, report.command))

    def read(folder):
        pages = [(folder / name).read_text() for name in names]
        return [int(json.loads((folder / "parity" / reports.JSON).read_text())["command"]), *map(int, pages)]

    return read


def test_a_report_stays_until_the_next_one_is_written(contents, tmp_path, monkeypatch):
    reports.write(numbered(1), tmp_path)
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
                reports.write(numbered(2), tmp_path)
        assert contents(tmp_path)[0] == 1  # report.json, from which the pages come, is the last
    reports.write(numbered(2), tmp_path)
    assert contents(tmp_path) == [2, 2, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["parity"]


def test_a_full_disk_leaves_the_earlier_report(contents, tmp_path, monkeypatch):
    reports.write(numbered(1), tmp_path)

    def full(_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            reports.write(numbered(2), tmp_path)
    assert contents(tmp_path) == [1, 1, 1]


def test_nothing_is_written_through_a_link(contents, tmp_path):
    bundle, elsewhere = tmp_path / "bundle", tmp_path / "elsewhere"
    bundle.mkdir()
    elsewhere.mkdir()
    (bundle / "parity").symlink_to(elsewhere)
    reports.write(numbered(1), bundle)
    assert contents(bundle) == [1, 1, 1]
    assert not list(elsewhere.iterdir())


def test_a_report_of_an_earlier_version_is_read_and_written_again_as_this_one(tmp_path):
    report = reports.read(EARLIER / "report.json")
    (tmp_path / "bundle").mkdir()
    reports.write(report, tmp_path / "bundle")
    expected = json.loads((EARLIER / "report.json").read_text()) | {"report_version": 2, "hidden": None, "memory": None}
    del expected["looser_limits"]
    for row in expected["activations"]:
        del row["noise_local"]
    for stream in expected["predictions"].values():
        stream["controls"] = {}
    assert json.loads((tmp_path / "bundle" / "parity" / "report.json").read_text()) == expected
    assert reports.finish(report) == report
    page = reports.html(report)
    assert page.count("<svg") == 2 * 5  # for a phone and for a wide page
    assert "self_attn.in_proj" in page
    assert "| KL of text | 0.00167 ± 0.000734 | – | ≤ 0.015 |" in reports.markdown(report)


def test_a_report_that_lacks_what_later_versions_write_is_read_and_rendered():
    report = reports.read(EARLIER / "report-lacking.json")
    data = json.loads((EARLIER / "report-lacking.json").read_text())
    assert report.round_trip is None
    assert report.source.files is None
    assert report.bundle.parameters is None
    assert report.verdict.failures[0].place is None
    divergence = report.predictions["text"].bundle.kl
    assert divergence
    assert (divergence.mean, divergence.max) == (data["predictions"]["text"]["bundle"]["kl"]["mean"], None)
    assert "KL of text is 9, at most 0.015 is allowed" in reports.html(report)
    assert reports.markdown(report).startswith("# Not intact: 4bit-g64 for mlx\n")
    assert [figure.passed for figure in reports.figures(report)] == [False, True, True, True]
    compared = compare_reports.compare(reports.read(EARLIER / "report.json"), report)
    assert ["checkpoints" in reason for reason in compared.not_comparable] == [True, False]
    shown = compare_reports.text(("one", "other"), compared)
    assert "verdict" in shown
    assert len(compared.blocks.most_different) == 0  # the same figures


@pytest.mark.parametrize("number", [0, 3, "1", None])
def test_a_report_of_another_version_is_refused(number, tmp_path):
    data = json.loads((EARLIER / "report.json").read_text()) | {"report_version": number}
    (tmp_path / "report.json").write_text(json.dumps(data))
    with pytest.raises(UserError, match=r"not a report that this version reads \(report_version is"):
        reports.read(tmp_path / "report.json")


def test_figures_that_are_not_finite_are_written_as_null():
    report = reports.read(EARLIER / "report.json")
    weights = (replace(report.weights[0], relative_rmse=float("nan"), max_abs=1.23456789, squared_error=5.0),)
    finished = reports.finish(replace(report, weights=weights)).weights[0]
    assert (finished.relative_rmse, finished.max_abs, finished.squared_error) == (None, 1.23457, 0.0)
    assert "not finite" in reports.html(reports.finish(replace(report, weights=weights)))
