"""report.html: what its first screen says, and how it fits a phone, in a real browser."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from browser import evaluate
from ppx.convert.bundle.describe import size
from ppx.convert.bundle.manifest import read_manifest
from ppx.convert.bundle.run_memory import memory_of
from ppx.convert.bundle.targets import TARGETS
from ppx.convert.source.source import locate, open_source
from ppx.verify import headline, plots
from ppx.verify import report as reports
from ppx.verify.figures import StreamFigures
from ppx.verify.options import VerifyOptions
from ppx.verify.records import Report
from ppx.verify.verification import verify

EARLIER = Path(__file__).parents[1] / "data" / "earlier"
PHONE = 390
LAYOUT = """(page, view) => ({
  width: page.documentElement.scrollWidth,
  tables: [...page.querySelectorAll("table")].map((table) => {
    const box = table.parentElement, last = table.querySelector("thead th:last-child");
    const right = box.getBoundingClientRect().right;
    box.scrollLeft = 1e6;
    const edges = [...table.querySelectorAll("thead th")].map((head) => head.getBoundingClientRect());
    return {right, overflow: view.getComputedStyle(box).overflowX, wide: box.scrollWidth > box.clientWidth,
      reached: edges.at(-1).right <= right + 1, first: edges[0].left >= box.getBoundingClientRect().left - 1};
  }),
  pictures: [...page.querySelectorAll("figure")].map((figure) =>
    [...figure.querySelectorAll("svg")].filter((svg) => svg.getBoundingClientRect().width > 0).map((svg) => ({
      left: svg.getBoundingClientRect().left, right: svg.getBoundingClientRect().right,
      text: Math.min(...[...svg.querySelectorAll("text")].map((text) =>
        parseFloat(view.getComputedStyle(text).fontSize) * Math.abs(text.getCTM().a || text.getCTM().b))),
    }))),
})"""


@pytest.fixture(scope="module")
def report(pico: Path, bundle: Callable[..., Path]) -> Report:
    """A report with everything that a page can show but a round trip: a control at 8 bit, losses, a session."""
    tokens = pico / "heldout_tokens.safetensors"
    options = VerifyOptions(tokens=tokens, sequences=2, frames=40, rollout=5, device="cpu", controls=(8,))
    with open_source(locate(str(pico))) as source:
        found = verify(source, bundle("--recipe", "4bit"), options, "ppx-verify bundle", quiet=True)
    return reports.finish(found)


@pytest.fixture(scope="module")
def page(report: Report) -> str:
    return reports.html(report)


@pytest.fixture
def undrawn(monkeypatch):
    """Pages without pictures, which take seconds."""
    monkeypatch.setattr(plots, "pictures", lambda _: {})


def first_screen(page: str) -> str:
    """The page's text before its first picture, or table."""
    return re.sub(r"<[^>]+>", "", re.split("<figure|<h2>", page[page.index("<h1>") :])[0])


def test_the_first_screen(page, report, bundle):
    said = first_screen(page)
    agent = report.predictions["agent"]
    plain, eight = (headline.times(agent.bundle, one) for one in (agent.control, agent.controls["8"]))
    assert f"{plain:.2g} times as much as plain rounding at the same bits" in said
    assert f", and {eight:.0f} times as much as 8 bit of the same checkpoint." in said
    manifest = read_manifest(bundle("--recipe", "4bit"))
    assert manifest
    assert report.memory == memory_of(manifest)
    assert size(report.memory.total) in said
    assert "computed" in said
    assert TARGETS["speech-swift"].programs in said
    assert "ppx-speak" in said
    assert "--controls 8" not in said


@pytest.mark.usefixtures("undrawn")
def test_a_control_at_8_bit_that_was_not_computed_has_its_command(report):
    streams = {name: replace(stream, controls={}) for name, stream in report.predictions.items()}
    assert report.hidden
    without = replace(report, predictions=streams, hidden=replace(report.hidden, controls={}))
    assert "ppx-verify bundle --controls 8 adds it" in first_screen(reports.html(without))
    at_8_bit = tuple(replace(row, bits=row.bits and 8) for row in report.weights)
    assert not headline.lacks_8_bit(replace(without, weights=at_8_bit))  # plain rounding is that control


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda stream: replace(stream, control=None, controls={}), "nats/token; this report has nothing to compare"),
        (lambda stream: replace(stream, bundle=replace(stream.bundle, kl=None)), "Nothing was computed."),
    ],
)
def test_what_cannot_be_compared_is_said(report, change, expected):
    streams = {name: change(stream) for name, stream in report.predictions.items()}
    assert expected in headline.comparison(replace(report, predictions=streams))


@pytest.mark.usefixtures("undrawn")
def test_a_report_of_an_earlier_version_has_a_first_screen():
    said = first_screen(reports.html(reports.read(EARLIER / "report.json")))
    assert "Memory" not in said
    assert "On disk" in said
    assert "this report has nothing to compare that with" in said


def test_pictures_are_vectors_with_ids_of_their_own(page):
    assert page.count("<svg") == 2 * 5  # for a phone and for a wide page
    assert "<image" not in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    used = set(re.findall(r'(?:xlink:href="|url\()#([^")]+)', page))
    assert used
    assert used <= set(ids)


def test_figures_that_are_not_known_are_left_out_of_pictures(report):
    def unknown(stream: StreamFigures) -> StreamFigures:
        return StreamFigures(replace(stream.bundle, kl=None), replace(stream.noise, kl=None))

    streams = {name: unknown(stream) for name, stream in report.predictions.items()}
    drawn = plots.pictures(replace(report, predictions=streams))
    assert "this bundle" in drawn["comparison"].narrow
    assert "plain rounding" not in drawn["comparison"].narrow


def test_the_first_picture_has_bundle_and_controls_side_by_side(page):
    for picture in re.findall(r"<svg.*?</svg>", page, re.DOTALL)[:2]:
        words = re.findall(r">([^<>]+)</text>", picture)
        assert [word for word in words if word in ("this bundle", "plain 8 bit", "plain rounding")] == [
            "this bundle",
            "plain 8 bit",
            "plain rounding",
        ]
        assert "KL divergence, nats/token" in words
        assert " ".join(["text", *map(str, range(16))]) in " ".join(words)


@pytest.mark.usefixtures("undrawn")
def test_losses_are_shown_only_where_somebody_said_the_tokens(page, report):
    assert "Δ loss" in page
    assert "perplexity ×" in page

    def without(stream: StreamFigures) -> StreamFigures:
        return replace(stream, bundle=replace(stream.bundle, loss=None))

    streams = {name: without(stream) for name, stream in report.predictions.items()}
    bare = reports.html(replace(report, predictions=streams))
    assert "Δ loss" not in bare
    assert "perplexity ×" not in bare
    table = bare[bare.index('aria-label="Streams"') :].partition("</table>")[0]
    heads, cells = table.count("<th>"), re.findall(r"<tr>(<td>.*?)</tr>", table)
    assert {row.count("<td>") for row in cells} == {heads}


def test_tensors_have_their_component(page, report):
    body = page[page.index('<table id="tensors">') :]
    for row in report.weights:
        assert f"<td><small>{row.component}</small> {row.name}</td>" in body


def layout_at(width: int, page: str, folder: Path) -> Any:
    return evaluate(page, LAYOUT, width, folder)


def test_a_phone_shows_every_column_and_legible_pictures(page, tmp_path):
    found = layout_at(PHONE, page, tmp_path)
    assert found["width"] <= PHONE  # the page itself does not scroll sideways
    assert len(found["tables"]) == 4
    assert any(table["wide"] for table in found["tables"])
    for table in found["tables"]:
        assert table["right"] <= PHONE
        assert table["overflow"] == "auto"
        assert table["reached"]  # the last column, by scrolling inside of the table
        assert table["first"]  # the first one stays
    assert [len(shown) for shown in found["pictures"]] == [1] * 5
    for (picture,) in found["pictures"]:
        assert 0 <= picture["left"] < picture["right"] <= PHONE
        assert picture["text"] >= 10


@pytest.mark.parametrize("width", [500, 800, 1280])
def test_wider_pages_are_drawn_for_their_width(width, page, tmp_path):
    found = layout_at(width, page, tmp_path)
    assert found["width"] <= width
    assert [len(shown) for shown in found["pictures"]] == [1] * 5
    for (picture,) in found["pictures"]:
        assert picture["right"] <= width
        assert picture["text"] >= 9


def test_a_page_that_is_too_wide_fails_the_check(page, tmp_path):
    """The check itself: a table outside of a box that scrolls makes the page wider than a phone."""
    broken = page.replace("overflow-x: auto", "overflow-x: visible")
    assert layout_at(PHONE, broken, tmp_path)["width"] > PHONE
