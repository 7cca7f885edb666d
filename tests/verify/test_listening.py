"""The page of a blind comparison: in a real browser, by keys; and the answers that go into it."""

import base64
import hashlib
import io
import json
import math
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import browser
import numpy as np
import pytest
import soundfile
from ppx.convert.errors import UserError
from ppx.convert.source import demo
from ppx.convert.source.mimi import FRAME, RATE
from ppx.recipes.cli import two_bundles, verify
from ppx.speak import answers, audio_files
from ppx.speak.speaker import SpeakOptions, open_speaker
from ppx.verify import listening
from ppx.verify.listening import ListeningPage, ListenOptions, listen
from ppx.verify.listening_page import Pair, Question, Rendered, Side, SoundPage, masked, render
from typer.testing import CliRunner

CHROMIUM = browser.executable()
DOCS = Path(__file__).parent.parent.parent / "docs" / "listening.md"
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium")
A = Side('</script><b>four & "bits"', "4bit-secret", "a" * 64)
B = Side("eight<img src=x onerror=alert(1)>", "8bit-secret", "b" * 64)


def tone(hertz: float, seconds: float = 0.4) -> str:
    """A sound of a pitch of its own."""
    times = np.arange(round(seconds * RATE)) / RATE
    return audio_files.data_uri((0.1 * np.sin(2 * np.pi * hertz * times)).astype(np.float32))


def sound_page(count: int = 8, seed: int = 0) -> SoundPage:
    """A page of tones: those of A are whole hundreds of hertz."""
    questions = [Question("what </script> is.wav", tone(50)), Question("other.wav", tone(60))]
    pairs = [Pair(n % 2, seed + n // 2, tone(200 + 100 * n), tone(250 + 100 * n)) for n in range(count)]
    return SoundPage(A, B, questions, pairs, seed, "NATF2")


def data_of(page: Rendered) -> dict[str, Any]:
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page.html, re.DOTALL)
    data: dict[str, Any] = json.loads(text)
    return data


def sides_of(page: Rendered, made_of: SoundPage) -> list[str]:
    """What X is in each pair of a page, by its sound."""
    of_a = {pair.a for pair in made_of.pairs}
    return ["a" if pair["x"] in of_a else "b" for pair in data_of(page)["pairs"]]


def exact_p_value(a: int, b: int) -> float:
    """Twice the smaller tail of a fair coin, by adding up every outcome."""
    tail = sum(math.comb(a + b, k) for k in range(max(a, b), a + b + 1))
    return float(min(1.0, 2 * tail / 2 ** (a + b)))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A page of eight pairs in its file, and what it was made of."""
    made_of = sound_page()
    rendered = render(made_of)
    file = tmp_path_factory.mktemp("page") / "listen.html"
    file.write_text(rendered.html)
    return rendered, made_of, file


@pytest.fixture
def tab(tmp_path):
    assert CHROMIUM
    with browser.opened(CHROMIUM, tmp_path / "profile") as opened:
        yield opened


def play_both(tab: browser.Page) -> None:
    for name in "xy":
        tab.press(name)
        tab.until(f"state.heard[current].includes('{name}')")


@needs_browser
def test_a_listener_answers_all_pairs_by_keys(tab, page):
    rendered, made_of, file = page
    truth = sides_of(rendered, made_of)
    assert set(truth) == {"a", "b"}
    preferred = ["a", "b", "a", None, "a", "a", "a", "a"]
    tab.resize(390, 844)
    tab.open(file.as_uri())
    assert tab.evaluate("element('heading').textContent") == "Pair 1 of 8"
    tab.press("1")
    assert tab.evaluate("element('status').textContent") == "Play both answers first."
    tab.press("n")
    assert tab.evaluate("[element('status').textContent, current]") == ["Choose first.", 0]
    for number, side in enumerate(preferred):
        play_both(tab)
        right = {None: "0", truth[number]: "1"}.get(side, "2")
        if number == 4:  # the other one first: it can be changed
            tab.press("0")
        tab.press(right)
        assert tab.evaluate("document.querySelectorAll('#choices :checked').length") == 1
        dom = tab.evaluate("document.documentElement.outerHTML")
        for secret in (A, B):
            for text in (secret.name, secret.recipe, secret.fingerprint):
                hidden = [text, json.dumps(text)[1:-1], base64.b64encode(text.encode()).decode().rstrip("=")[:-1]]
                assert not [one for one in hidden if one in dom]
        assert not tab.evaluate("element('json').value + element('rows').textContent + element('tally').textContent")
        if number == 5:  # a reload continues where it was
            tab.open("about:blank#")
            tab.open(file.as_uri())
            assert tab.evaluate("[current, state.answers.filter(Boolean).length]") == [6, 6]
        elif number < 7:
            tab.press("n")
            assert tab.evaluate("current") == number + 1
    tab.press("p")
    assert tab.evaluate("current") == 6
    tab.press("n")
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    tab.press("n")
    tab.until("!element('result').hidden")
    assert tab.evaluate("document.activeElement.id") == "outcome"
    assert tab.evaluate("element('outcome').textContent") == "A was chosen more often: 6 to 1"
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    found = json.loads(tab.evaluate("element('json').value"))
    p = exact_p_value(6, 1)
    assert (found["a_better"], found["b_better"], found["no_difference"], found["decided"]) == (6, 1, 1, 7)
    assert found["p_value"] == pytest.approx(p, rel=1e-15) == 0.125
    assert [pair["preferred"] for pair in found["pairs"]] == preferred
    assert [pair["x"] for pair in found["pairs"]] == truth
    assert [{"x": pair["x"], "y": pair["y"], "same": None}[pair["answer"]] for pair in found["pairs"]] == preferred
    assert (found["a"]["name"], found["b"]["name"], found["a"]["recipe"]) == (A.name, B.name, A.recipe)
    assert hashlib.sha256(found["key"].encode()).hexdigest() == found["seal"] == rendered.seal
    assert json.loads(found["key"])["x"] == truth
    shown = tab.evaluate("element('result').innerText")
    assert f"A: {A.name} (4bit-secret)" in shown
    assert "p = 0.125: two-sided exact binomial test of 7 decided pairs; 1 without a difference left out" in shown
    assert "by chance in 12.5 % of such tests" in shown
    assert "7 of 7 for one side would have been" in shown
    rows = tab.evaluate("[...element('rows').rows].map((row) => [...row.cells].map((cell) => cell.textContent))")
    assert [row[3] for row in rows] == [side.upper() for side in truth]
    assert [row[4] for row in rows] == [side.upper() if side else "no difference" for side in preferred]
    address = tab.evaluate("element('download').href")
    assert json.loads(unquote(address.removeprefix("data:application/json;charset=utf-8,"))) == found
    tab.until("element('status').textContent === 'The key is the one that was sealed.'")
    assert tab.evaluate("[document.scripts.length, document.images.length]") == [2, 0]
    tab.press("1")  # it is over
    assert json.loads(tab.evaluate("JSON.stringify(results())")) == found
    tab.open("about:blank#")
    tab.open(file.as_uri())
    assert json.loads(tab.evaluate("element('json').value")) == found
    tab.evaluate("element('copy').click()")
    tab.until("element('status').textContent.startsWith('Copied') || element('status').textContent.startsWith('Not')")
    tab.evaluate("element('again').click()")
    assert tab.evaluate("[current, element('json').value, element('tally').textContent]") == [0, "", ""]
    assert tab.complaints == []
    documented = DOCS.read_text()
    for field in [*found, *found["pairs"][0], *found["a"]]:
        assert f"`{field}`" in documented, field


@needs_browser
def test_the_page_computes_exact_p_values(tab, page):
    tab.open(page[2].as_uri())
    pairs = [(a, b) for a in range(13) for b in range(13)] + [(100, 0), (61, 39), (50, 50), (40, 60)]
    found = tab.evaluate(f"{json.dumps(pairs)}.map(([a, b]) => pValue(a, b))")
    assert found == pytest.approx([exact_p_value(*pair) for pair in pairs], rel=1e-14)
    fewest = tab.evaluate("Array.from({ length: 31 }, (_, n) => fewestOf(n))")
    for n, most in enumerate(fewest):
        clear = [k for k in range(math.ceil(n / 2), n + 1) if exact_p_value(k, n - k) <= 0.05]
        assert most == (clear[0] if clear else None)


@needs_browser
def test_without_storage_without_a_mouse_and_in_the_dark(tab, page):
    """As some browsers are where a file is opened: no storage. Tab, Space and arrows reach everything."""
    code = "Object.defineProperty(window, 'localStorage', { get() { throw new DOMException('denied'); } })"
    tab.call("Page.addScriptToEvaluateOnNewDocument", source=code)
    tab.resize(1280, 800, dark=True)
    tab.open(page[2].as_uri())
    seen = []
    for _ in range(7):
        tab.press("Tab")
        seen.append(tab.evaluate("document.activeElement.id"))
        style = "getComputedStyle(document.activeElement)"
        assert tab.evaluate(f"[{style}.outlineStyle, parseFloat({style}.outlineWidth) >= 2]") == ["solid", True]
    assert seen[:6] == ["play-q", "seek-q", "play-x", "seek-x", "play-y", "seek-y"]
    tab.evaluate("element('play-x').focus()")
    tab.press(" ")
    tab.until("state.heard[0].includes('x')")
    assert tab.evaluate("element('play-x').getAttribute('aria-pressed')") in ("true", "false")
    tab.press("y")
    tab.until("state.heard[0].includes('y') && audio.x.paused")
    tab.evaluate("document.querySelector('[value=x]').focus()")
    tab.press("ArrowDown")
    assert tab.evaluate("state.answers[0]") == "same"
    assert tab.evaluate("element('storage').hidden") is False
    tab.evaluate("element('shortcuts').click()")
    tab.press("2")
    assert tab.evaluate("state.answers[0]") == "same"
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 27)"
    names = tab.evaluate(
        "[...document.querySelectorAll('button, input, textarea, a')].filter((one) => "
        "!one.textContent.trim() && !one.getAttribute('aria-label') && !one.labels?.[0]?.textContent.trim()).length"
    )
    assert names == 0
    assert tab.complaints == []


@needs_browser
def test_a_page_that_was_changed_is_noticed(tab, page, tmp_path):
    rendered, _, _ = page
    wrong = rendered.seal.translate(str.maketrans("0123456789abcdef", "123456789abcdef0"))
    (tmp_path / "changed.html").write_text(rendered.html.replace(rendered.seal, wrong))
    tab.open((tmp_path / "changed.html").as_uri())
    tab.evaluate("state.answers.fill('same'), finish()")
    tab.until("element('status').textContent.includes('does not match its seal')")
    assert tab.evaluate("element('outcome').textContent") == "No difference in any pair"
    assert json.loads(tab.evaluate("element('json').value"))["p_value"] is None


def test_order_and_sides_follow_from_seed_and_sounds():
    first = render(sound_page())
    assert render(sound_page()) == first
    others = [sides_of(render(made_of), made_of) for made_of in (sound_page(8, seed) for seed in range(1, 9))]
    assert len({tuple(sides) for sides in others}) > 4
    count = sum(sides.count("a") for sides in others)
    assert 16 < count < 48  # of 64: outside with a probability of 3e-5, and always the same here
    orders = [[pair["seed"] for pair in data_of(render(sound_page(8)))["pairs"]]]
    assert sorted(orders[0]) == [0, 0, 1, 1, 2, 2, 3, 3]
    made_of = sound_page(4)
    equal = [replace(pair, b=pair.a) if number == 2 else pair for number, pair in enumerate(made_of.pairs)]
    sealed = data_of(render(replace(made_of, pairs=equal)))
    key = json.loads(masked(base64.b64decode(sealed["sealed"][1]), sealed["sealed"][0]))
    (place,) = [number for number, pair in enumerate(sealed["pairs"], 1) if pair["x"] == pair["y"]]
    assert key["equal"] == [place]


def test_the_page_loads_nothing_and_runs_only_its_own_script(page):
    html = page[0].html
    (policy,) = re.findall(r'http-equiv="Content-Security-Policy" content="(.*?)"', html)
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for kind in ("script", "style"):
        (code,) = re.findall(rf"<{kind}>(.*?)</{kind}>", html, re.DOTALL)
        assert f"'sha256-{base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()}'" in policy
    assert not re.findall(r"https?://|\bsrc=|url\(", re.sub(r'"data:audio[^"]*"', "", html))
    assert html.count("</script>") == 2


@pytest.fixture(scope="module")
def bundles(program, tmp_path_factory):
    """The demo source, with fewer layers, at 4 and 8 bit."""
    folder = tmp_path_factory.mktemp("listening")
    shallow = replace(demo.SIZES["demo"], num_layers=2, depformer_num_layers=1)
    demo.make("demo", folder / "shallow", quiet=True, architecture=shallow)
    for bits in ("4", "8"):
        program("ppx-convert", "shallow", "--bits", bits, "--output", f"demo-{bits}bit", cwd=folder)
    samples = np.random.default_rng(5).standard_normal(round(0.25 * RATE)).astype(np.float32) * 0.1
    soundfile.write(folder / "question.wav", samples, RATE)
    soundfile.write(folder / "other.wav", samples[::-1], RATE)
    return folder


def samples_of(uri: str) -> Any:
    return soundfile.read(io.BytesIO(base64.b64decode(uri.partition(",")[2])), dtype="int16")[0]


@pytest.mark.slow
def test_both_bundles_answer_with_the_same_seeds(bundles, codec, tmp_path, caplog):
    """Each answer is the one that ppx-speak gives to the same recording, with silence behind it."""
    questions = [bundles / "question.wav", bundles / "other.wav"]
    options = ListenOptions(pairs=3, seed=7, reply=0.2, prompt="Be brief.", codec=codec)
    output = tmp_path / "listen.html"
    folders = (bundles / "demo-4bit", bundles / "demo-8bit")
    done = listen(*folders, questions, output, options)
    html = output.read_text()
    data = data_of(Rendered(html, done.seal))
    assert (done.pairs, done.equal, done.nbytes, data["seal"]) == (3, 0, output.stat().st_size, done.seal)
    assert done.seconds == pytest.approx(0.45)
    assert sorted((pair["question"], pair["seed"]) for pair in data["pairs"]) == [(0, 7), (0, 8), (1, 7)]
    key = json.loads(masked(base64.b64decode(data["sealed"][1]), data["sealed"][0]))
    assert [key[side]["name"] for side in "ab"] == ["demo-4bit", "demo-8bit"]
    assert [key[side]["recipe"] for side in "ab"] == ["4bit-g64", "8bit-g64"]
    assert "modulo" in caplog.text
    for number, (pair, x) in enumerate(zip(data["pairs"], key["x"], strict=True)):
        question = soundfile.read(questions[pair["question"]], dtype="float32")[0]
        count = len(question) + round(0.2 * RATE)
        soundfile.write(tmp_path / "padded.wav", np.pad(question, (0, count - len(question))), RATE)
        for side, name in (("x", x), ("y", "ab".replace(x, ""))):
            spoken = SpeakOptions(prompt="Be brief.", seed=pair["seed"], codec=codec)
            answer = tmp_path / f"{number}{name}.wav"
            answers.answer(folders["ab".index(name)], tmp_path / "padded.wav", answer, spoken)
            expected = soundfile.read(answer, dtype="int16")[0]
            sound = samples_of(pair[side])
            assert len(sound) == -(-count // FRAME) * FRAME
            apart = np.abs(sound[:count].astype(int) - expected)
            assert apart.max() <= 1  # libsndfile rounds to 16 bit in two ways, one for WAV
    again = listen(*folders, questions, tmp_path / "again.html", options)
    assert (tmp_path / "again.html").read_text() == html
    assert again.seal == done.seal
    with pytest.raises(UserError, match="is there already"):
        listen(*folders, questions, output, options)


@pytest.mark.slow
def test_a_restarted_speaker_is_a_new_one(bundles, codec):
    options = SpeakOptions(prompt="Be brief.", seed=1, codec=codec)
    frames = [np.full(FRAME, 0.01 * number, np.float32) for number in range(4)]
    speaker = open_speaker(bundles / "demo-4bit", options, silent=True)
    first = [frame.agent for frame in speaker.answer(frames)]
    speaker.restart(2)
    second = [frame.agent for frame in speaker.answer(frames)]
    speaker.restart(1)
    third = list(speaker.answer(frames))
    assert np.array_equal(first, [frame.agent for frame in third])
    assert not np.array_equal(first, second)
    fresh = list(open_speaker(bundles / "demo-4bit", replace(options, seed=2), silent=True).answer(frames))
    assert np.array_equal(second, [frame.agent for frame in fresh])


@pytest.mark.slow
def test_mistakes_are_told_before_anything_takes_long(bundles, codec, tmp_path, monkeypatch):
    monkeypatch.chdir(bundles)
    monkeypatch.setattr(listening, "open_speaker", lambda *_, **__: pytest.fail("it took long"))
    soundfile.write(tmp_path / "long.wav", np.zeros(61 * RATE, np.float32), RATE)
    soundfile.write(tmp_path / "minute.wav", np.zeros(59 * RATE, np.float32), RATE)
    (tmp_path / "there.html").write_text("mine")
    shutil.copy("question.wav", tmp_path / "question.wav")
    pair, ask = ("demo-4bit", "demo-8bit"), ("--listen", "question.wav", "--codec", str(codec))
    cases: list[tuple[tuple[str, ...], str]] = [
        (("demo-4bit", *ask), "give the other one as well"),
        (("demo-4bit", "--pairs", "3"), "--pairs needs --listen"),
        ((*pair, "-o", "a.html"), "--output needs --listen"),
        ((*pair, "--codec", str(codec)), "compared by their reports"),
        ((*pair, *ask, "--rollout", "3"), "leave the others out"),
        ((*pair, *ask, "--pairs", "0"), "0 pairs: use 1 to 100"),
        ((*pair, *ask, "--listen", "other.wav", "--pairs", "1"), "2 recordings for 1 pair: "),
        ((*pair, *ask, "-o", str(tmp_path / "there.html")), "is there already"),
        ((*pair, *ask, "-o", str(tmp_path / "page.txt")), "give the name of a .html file"),
        ((*pair, "--listen", "question.wav"), "mimi.safetensors: not a codec that rustymimi loads"),
        ((*pair, *ask, "--voice", "NOBODY"), "voice NOBODY: not in this bundle"),
        ((*pair, *ask, "--prompt", "word " * 400), "tokens: at most"),
        ((*pair, *ask[2:], "--listen", str(tmp_path / "long.wav")), "61 s long: at most 60 s fit a page"),
        ((*pair, *ask[2:], "--listen", str(tmp_path / "minute.wav"), "--pairs", "20"), "minutes of answers"),
        ((*pair, *ask[2:], "--listen", "nothing.wav"), "nothing.wav"),
        (("demo-4bit", "nothing", *ask), "nothing: not a bundle"),
    ]
    for arguments, message in cases:
        done = CliRunner().invoke(verify.app, list(arguments))
        assert done.exit_code == 2, (arguments, done.output)
        assert message in done.stderr, (arguments, done.stderr)
    assert (tmp_path / "there.html").read_text() == "mine"
    assert not list(bundles.glob("*.html*"))


@pytest.mark.slow
def test_an_interrupt_leaves_no_page(bundles, codec, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.chdir(bundles)
    monkeypatch.setattr(listening, "open_speaker", interrupted)
    done = CliRunner().invoke(verify.app, ["demo-4bit", "demo-8bit", "--listen", "question.wav", "--codec", str(codec)])
    assert done.exit_code == 130
    assert done.stderr.splitlines()[-1] == "interrupted: no report or page was written"
    assert not list(bundles.glob("*.html*"))


def test_the_program_says_what_it_made(tmp_path, monkeypatch):
    calls = []

    def made(a, b, questions, output, options, *, quiet):
        calls.append((a, b, questions, output, options, quiet))
        return ListeningPage(Path(output), 4, 1, 9.5, 2_000_000, "5ea1" * 16)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(two_bundles, "listen", made)
    done = CliRunner().invoke(
        verify.app,
        ["four", "eight", "--listen", "q.wav", "--listen", "r.wav", "--pairs", "4", "--seed", "3", "--voice", "NATM1"],
    )
    assert done.exit_code == 0
    lines = done.stdout.splitlines()
    assert lines[0] == "listen.html: 4 pairs of 9.5 s, 2 MB, one file"
    assert lines[1].startswith("1 of the pairs have the same sound")
    assert "5ea1" * 16 in lines[2]
    assert lines[3] == f"open it in a browser: {(tmp_path / 'listen.html').as_uri()}"
    assert "4 pairs of answers to q.wav, r.wav, by four (A) and eight (B)" in done.stderr
    options = ListenOptions(pairs=4, seed=3, voice="NATM1")
    assert calls == [(Path("four"), Path("eight"), [Path("q.wav"), Path("r.wav")], Path("listen.html"), options, False)]
    done = CliRunner().invoke(verify.app, ["four", "eight", "--listen", "q.wav", "--json"])
    assert json.loads(done.stdout)["seal"] == "5ea1" * 16
    assert done.stderr == ""
    assert calls[1][-2:] == (ListenOptions(), True)


def test_bundles_on_the_hub_are_listened_to_under_their_names(monkeypatch, bundle, tmp_path):
    """They lie in the Hub's cache, in folders that are called by a commit."""
    cache = tmp_path / "models--me--four"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots").mkdir()
    commit = cache / "snapshots" / ("1" * 40)
    commit.symlink_to(bundle("--recipe", "4bit"))
    located, calls = {"me/four": commit, "me/eight": tmp_path / "eight"}, []

    def made(a, b, _questions, output, _options, **_):
        calls.append((a, b))
        return ListeningPage(Path(output), 10, 0, 9.5, 1, "5ea1")

    monkeypatch.setattr(two_bundles, "listen", made)
    monkeypatch.setattr(two_bundles, "locate_bundle", lambda where, *_, **__: located[where])
    done = CliRunner().invoke(verify.app, ["me/four", "me/eight", "--listen", "q.wav"])
    assert done.exit_code == 0, done.output
    assert "by me/four (A) and me/eight (B)" in done.stderr
    assert calls == [(commit, tmp_path / "eight")]
    commit.unlink()
    shutil.copytree(bundle("--recipe", "4bit"), commit)
    assert listening._side(commit).name == "me/four"
    assert listening._side(bundle("--recipe", "4bit")).name == bundle("--recipe", "4bit").name


def test_a_recording_is_not_a_voice_of_two_bundles():
    with pytest.raises(UserError, match=r"me.wav: not a voice: make one of a recording with ppx-voice first"):
        ListenOptions(voice="me.wav")
    assert ListenOptions(voice="me.safetensors").voice == "me.safetensors"


def test_the_documented_commands_are_commands(monkeypatch):
    calls = []

    def made(a, b, questions, output, options, *, quiet):
        assert not quiet
        calls.append((a, b, len(questions), output, options.pairs, options.seed))
        return ListeningPage(Path(output), options.pairs, 0, 9.5, 1, "5ea1")

    monkeypatch.setattr(two_bundles, "listen", made)
    (block,) = re.findall(r"```sh\n(.*?)```", DOCS.read_text(), re.DOTALL)
    for line in block.splitlines():
        name, *arguments = shlex.split(line)
        assert name == "ppx-verify"
        done = CliRunner().invoke(verify.app, arguments)
        assert done.exit_code == 0, done.output
    bundles = (Path("my-4bit"), Path("my-8bit"))
    assert calls == [(*bundles, 1, Path("listen.html"), 10, 0), (*bundles, 2, Path("listen.html"), 12, 3)]
