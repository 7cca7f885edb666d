"""ppx-speak and ppx-bench, as users run them, and the round trip of a verification."""

import json
import math
import shlex
import shutil
import sys
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
from ppx.convert.bundle.reader import open_bundle
from ppx.convert.errors import UserError
from ppx.convert.source import demo
from ppx.convert.source.mimi import FRAME, RATE
from ppx.model.forward import Floats, Tokens
from ppx.model.prompt import PROMPT, prompt_tokens
from ppx.recipes.cli import speak, verify
from ppx.speak import answers, audio_files, benchmark, generation, microphone
from ppx.speak.benchmark import Benchmark, FrameTimes, PartTimes, PeakMemory, Prefill
from ppx.speak.benchmark import text as bench_text
from ppx.speak.language_model import Runtime
from ppx.speak.sampling import GREEDY
from ppx.speak.speaker import SpeakOptions, Words, open_speaker, text_of
from ppx.verify import bundle_report, recognizer, round_trip
from ppx.verify import report as reports
from ppx.verify.options import RECOGNIZERS
from ppx.verify.records import Answer
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

PAGE = Path(__file__).parent.parent.parent / "docs" / "speaking.md"
SPEECH = Path(__file__).parent.parent / "data" / "speech.flac"
SAID = "The weather is nice today. We can go to the park, and have a good time with the children."
SENTENCE = 1.68  # seconds of it, the first: recognizing speech takes longer than all the rest
TARGETS = {
    "speech-swift": ("--bits", "4", "--group-size", "64"),
    "moshi-mlx": ("--recipe", "moshi-q4", "--method", "rtn"),
    "mlx": ("--recipe", "mixed"),
}


@pytest.fixture(scope="module")
def demos(program, tmp_path_factory):
    """The demo source, with fewer layers, converted for each target; made once."""
    folder = tmp_path_factory.mktemp("demos")
    shallow = replace(demo.SIZES["demo"], num_layers=4, depformer_num_layers=2)
    demo.make("demo", folder / "shallow", quiet=True, architecture=shallow)
    for target, options in TARGETS.items():
        program("ppx-convert", "shallow", *options, "--output", target, cwd=folder)
    return folder


def write(path: Path, seconds: float = 1.0, rate: int = 16000, channels: int = 1) -> None:
    samples = np.random.default_rng(2).standard_normal((round(seconds * rate), channels)).astype(np.float32) * 0.1
    soundfile.write(path, samples, rate)


@pytest.mark.parametrize(
    ("target", "rate", "channels"), [("speech-swift", 16000, 1), ("moshi-mlx", 44100, 2), ("mlx", 24000, 1)]
)
def test_bundles_of_all_targets_answer(program, demos, codec, tmp_path, target, rate, channels):
    write(tmp_path / "q.wav", 0.7, rate, channels)
    command = ("ppx-speak", demos / target, "q.wav", "--codec", codec, "--seed", "4")
    done = program(*command, "-o", "a.wav", cwd=tmp_path)
    samples, found = soundfile.read(tmp_path / "a.wav")
    assert (len(samples), found) == (round(0.7 * RATE), RATE)
    assert np.abs(samples).max() > 0
    assert "0.7 s of sound" in done.stderr
    assert "modulo" in done.stderr  # the demo has 128 of the codec's 2048 tokens
    if target != "mlx":
        return
    again = program(*command, "-o", "b.wav", "--json", cwd=tmp_path)
    said = json.loads(again.stdout)
    np.testing.assert_allclose(soundfile.read(tmp_path / "b.wav")[0], samples, atol=1e-3)
    assert said["text"] == " ".join(done.stdout.split())
    assert (said["seconds"], said["seed"], said["voice"]) == (0.7, 4, "NATF2")


def test_a_voice_a_prompt_a_seed_and_temperatures_change_the_answer(demos, codec):
    question = np.random.default_rng(2).standard_normal((4, FRAME)).astype(np.float32) * 0.1
    usual = SpeakOptions(codec=codec, prompt="Be brief.")
    others = (replace(usual, voice="NATM1"), replace(usual, prompt="Be long."), replace(usual, seed=5))
    scenes = (usual, *others, replace(usual, sampling=GREEDY))
    answers = set()
    for scene in scenes:
        speaker = open_speaker(demos / "mlx", scene)
        answers.add(tuple(token for said in speaker.answer(question) for token in said.agent.tolist()))
    assert len(answers) == len(scenes)


def test_mistakes_are_told_in_one_line(demos, codec, bundle, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "q.wav", 0.2)
    (tmp_path / "text.wav").write_text("hello")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), RATE)
    soundfile.write(tmp_path / "nan.wav", np.full(4000, np.nan, np.float32), RATE, subtype="FLOAT")
    swift = demos / "speech-swift"
    asked = ("-o", "a.wav", "--codec", codec)
    for arguments, reason in (
        ((swift, "q.wav", *asked, "--voice", "NOBODY"), "voice NOBODY: not in this bundle, which has NATF0, "),
        ((swift, "text.wav", *asked), "text.wav: unreadable audio"),
        ((swift, "empty.wav", *asked), "empty.wav: the recording is empty"),
        ((swift, "q.wav", *asked, "--prompt", "long " * 80), "the text prompt has 4"),
        ((swift, "q.wav", "-o", "a.wav"), "mimi.safetensors: not a codec that rustymimi loads"),
        ((swift, "q.wav", "-o", "q.wav", "--codec", codec), "q.wav: is there already"),
        ((swift, "q.wav", "-o", "a.mp3", "--codec", codec), "a.mp3: give the name of a .wav file"),
        ((swift, "q.wav"), "give a recording and --output, or --live"),
        ((swift, "nan.wav", *asked), "nan.wav: contains NaN or infinite samples"),
        ((swift, "q.wav", *asked, "--greedy", "--text-top-k", "3"), "leave temperatures and top-k out"),
        ((tmp_path / "nowhere", "q.wav", *asked), "nowhere: not a bundle"),
        ((bundle(), "q.wav", *asked), "at most 2 fit this model: shorten --prompt"),
    ):
        done = CliRunner().invoke(speak.app, [str(argument) for argument in arguments])
        assert done.exit_code == 2
        assert len(done.stderr.splitlines()) == 1
        assert reason in done.stderr, done.stderr
    assert not (tmp_path / "a.wav").exists()


@pytest.mark.parametrize("name", ["ppx-speak", "ppx-bench"])
def test_what_compiles_on_a_gpu_is_announced(demos, codec, monkeypatch, name):
    """Both transformers' functions run for the first time, which compiles them, while it is shown."""
    events = []

    def noted(method):
        def made(*arguments):
            function = method(*arguments)

            def run(*inputs):
                events.append(method.__name__)
                return function(*inputs)

            return run

        return made

    @contextmanager
    def shown(label, _total, _unit, silent):
        events.append((label, silent))
        yield SimpleNamespace(update=lambda: events.append("update"))
        events.append("end")

    for method in (Runtime.temporal, Runtime.depformer):
        monkeypatch.setattr(Runtime, method.__name__, noted(method))
    monkeypatch.setattr(generation, "long_step", shown)
    monkeypatch.setattr(generation, "on_gpu", lambda: True)
    if name == "ppx-speak":
        open_speaker(demos / "mlx", SpeakOptions(codec=codec))
    else:
        benchmark.measure(demos / "mlx", 2, codec=codec, silent=False)
    announced = ("MLX compiles the prompt and a frame", False)
    assert events[:6] == [announced, "update", "temporal", "depformer", "update", "end"]


@pytest.fixture(scope="module")
def conversation(program, tmp_path_factory):
    """The page's conversation with a demo: its folder, and what its commands print."""
    folder = tmp_path_factory.mktemp("conversation")
    section = PAGE.read_text().partition("\n## With a demo\n")[2].partition("```sh\n")[2]
    commands = [shlex.split(line) for line in section.partition("```")[0].splitlines() if line.startswith("ppx-")]
    assert [command[0] for command in commands] == ["ppx-convert", "ppx-speak", "ppx-verify", "ppx-bench"]
    samples, rate = soundfile.read(SPEECH)
    soundfile.write(folder / "question.wav", samples[: round(SENTENCE * rate)], rate)
    shorter = {"ppx-bench": ["--frames", "10"], "ppx-verify": ["--sequences", "1", "--frames", "80"]}
    return folder, [program(name, *rest, *shorter.get(name, []), cwd=folder).stdout for name, *rest in commands]


def test_the_conversation_of_the_page_is_a_real_one(conversation):
    folder, said = conversation
    assert soundfile.info(folder / "answer.wav").duration == pytest.approx(SENTENCE)
    assert "demo-audio is intact" in said[2]
    assert f"round trip: {SENTENCE:.1f} s" in said[2]
    assert "codec" in said[3]


def test_the_commands_of_the_page_run(conversation, program, monkeypatch, tmp_path):
    """Those of its beginning, with the demo's bundle; the one that is live ends where there is no microphone."""
    folder, _ = conversation
    (tmp_path / "my-bundle").symlink_to(folder / "demo-audio")
    (tmp_path / "question.wav").symlink_to(folder / "question.wav")
    commands = PAGE.read_text().partition("```sh\n")[2].partition("```")[0].splitlines()
    assert [command.split()[0] for command in commands] == ["ppx-speak", "ppx-speak", "ppx-verify", "ppx-bench"]
    for command in commands:
        name, *arguments = shlex.split(command)
        if "--live" in arguments:
            monkeypatch.setitem(sys.modules, "sounddevice", Sound(broken="device"))
            monkeypatch.chdir(tmp_path)
            ended = CliRunner().invoke(speak.app, arguments)
            assert ended.exit_code == 2
            assert "no microphone or no speaker" in ended.output
            continue
        arguments += ["--frames", "3"] if name == "ppx-bench" else []
        done = program(name, *arguments, cwd=tmp_path)
        if name == "ppx-speak":  # its words are noise, and not shown
            assert soundfile.info(tmp_path / "answer.wav").duration == pytest.approx(SENTENCE)
        else:
            assert ("round trip: " if name == "ppx-verify" else "codec") in done.stdout


def test_words_come_piece_by_piece(tmp_path):
    tokenizer = tmp_path / "tokenizer.model"
    tokenizer.write_bytes(demo.tokenizer(512))
    words = Words(tokenizer, padding=3)
    architecture = demo.SIZES["demo"]
    tokens = prompt_tokens(tokenizer, architecture, "Hello, grüße €!")
    pieces = [words.piece(token) for token in [0, 3, *tokens, 1, 2, 10**6]]
    assert text_of(pieces) == "<system> Hello, grüße €! <system>"
    assert pieces[:2] == ["", ""]
    broken = [
        next(token for token in range(512) if words._processor.id_to_piece(token) == name)
        for name in ("<0xFF>", "<0x41>")
    ]
    assert [words.piece(token) for token in broken] == ["\ufffd", "A"]
    assert prompt_tokens(tokenizer, architecture, "  ") == []
    tagged = prompt_tokens(tokenizer, architecture, " Be brief. ")
    assert prompt_tokens(tokenizer, architecture, "<system> Be brief. <system>") == tagged
    with pytest.raises(UserError, match="not text"):
        prompt_tokens(tokenizer, architecture, "\udcff")
    escape = next(token for token in range(512) if words._processor.id_to_piece(token) == "<0x1B>")
    assert words.piece(escape) == "\ufffd"


class Sound:
    """What sounddevice offers, with somebody who says one frame after another."""

    class PortAudioError(Exception):
        pass

    def __init__(self, broken=""):
        self.broken, self.played = broken, []

    def check_input_settings(self, channels, samplerate):
        assert (channels, samplerate) == (1, RATE)

    def check_output_settings(self, channels, samplerate):
        self.check_input_settings(channels, samplerate)
        if self.broken == "device":
            raise self.PortAudioError("no device")

    def Stream(self, samplerate, blocksize, channels, dtype, callback):
        assert (samplerate, blocksize, channels, dtype) == (RATE, FRAME, 1, "float32")
        self.callback = callback
        return self

    def start(self):
        if self.broken == "busy":
            raise self.PortAudioError("busy")
        for number in range(3):
            self.tick(number)

    def close(self):
        self.callback = None

    def tick(self, number):
        out = np.full((FRAME, 1), 7, np.float32)
        self.callback(np.full((FRAME, 1), number, np.float32), out, FRAME, None, None)
        self.played.append(out[0, 0])


def test_live_goes_from_the_microphone_to_the_speaker(monkeypatch):
    sound = Sound()
    monkeypatch.setitem(sys.modules, "sounddevice", sound)
    with microphone.devices() as (frames, play):
        heard = [next(frames) for _ in range(3)]
        assert [frame[0] for frame in heard] == [0, 1, 2]
        assert heard[0].shape == (FRAME,)
        play(np.full(FRAME, 0.5, np.float32))
        sound.tick(3)
        sound.tick(4)
        assert sound.played == [0, 0, 0, 0.5, 0]  # silence where nothing is ready
        for number in range(5, 12):
            sound.tick(number)  # more than wait: the oldest are dropped
        assert [next(frames)[0] for _ in range(3)] == [9, 10, 11]
        for number in range(6):
            play(np.full(FRAME, number, np.float32))
        sound.tick(12)
        assert sound.played[-1] == 3
    assert sound.callback is None
    microphone.check()
    monkeypatch.setitem(sys.modules, "sounddevice", Sound(broken="busy"))
    with pytest.raises(UserError, match=r"do not open \(busy\)"), microphone.devices():
        pass
    monkeypatch.setitem(sys.modules, "sounddevice", Sound(broken="device"))
    with pytest.raises(UserError, match="no microphone or no speaker"):
        microphone.check()
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    with pytest.raises(UserError, match=r"ppx-convert\[audio,live\]"), microphone.devices():
        pass


def test_bench_counts_what_a_frame_takes(program, demos, codec, tmp_path):
    folder = demos / "mlx"
    done = program("ppx-bench", folder, "--frames", "6", "--codec", codec, "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    frame, parts = found["frame"], found["parts"]
    assert 0 < frame["p50"] <= frame["p95"] <= frame["p99"]
    assert set(parts) == {"temporal", "depformer", "codec"}
    assert all(seconds > 0 for seconds in parts.values())
    assert found["real_time_factor"] == pytest.approx((frame["mean"] + parts["codec"]) / 0.08)
    assert found["bound"] == pytest.approx(found["bytes_a_frame"] / found["bandwidth"])
    assert found["prefill"]["frames"] == 51 + 12 + 25
    assert (found["frames"], found["steps"]) == (6, 8)
    with safe_open(next(folder.glob("model*.safetensors")), "np") as file:
        names = [name for name in file.keys() if "emb" not in name]  # noqa: SIM118
        stored = sum(math.prod(file.get_slice(name).get_shape()) * 2 for name in names if "weight" in name)
    assert found["bytes_a_frame"] > 0.5 * stored
    longer = json.loads(
        program("ppx-bench", folder, "--frames", "2", "--remembered", "200", "--json", cwd=tmp_path).stdout
    )
    assert longer["prefill"]["frames"] == 200
    assert "codec" not in longer["parts"]  # the demo's own is none
    printed = bench_text(Benchmark.from_json(found))
    assert "real time factor" in printed
    assert "sound is not in it" in bench_text(Benchmark.from_json(longer))
    table = found["table"]
    assert list(table) == ["temporal", "depformer", "codec", "total"]
    assert all(0 < times["p50"] <= times["p95"] for times in table.values())
    for part in ("p50", "p95"):
        assert table["total"][part] == pytest.approx(found["frame"][part] + table["codec"][part])


@pytest.mark.parametrize(
    ("p50", "p95", "words"),
    [
        (0.05, 0.06, "fast enough to talk to: 95 % of frames take at most 60.0 ms of 80.0 ms, real time factor 0.75"),
        (0.07, 0.09, "too slow to talk to, it would stutter: 95 % of frames take at most 90.0 ms of 80.0 ms"),
        (0.2, 0.24, "too slow to talk to: 95 % of frames take at most 240.0 ms of 80.0 ms, real time factor 3.00"),
    ],
)
def test_a_benchmark_has_one_table_and_one_verdict_that_fits_it(p50, p95, words):
    third = PartTimes(p50 / 3, p95 / 3)
    figures = Benchmark(
        FrameTimes(p50, p95, p95, p50), 1.0, 1.0, 1.0, 1.0, (), Prefill(1.0, 80), {"temporal": 0.1},
        {"temporal": third, "depformer": third, "codec": third, "total": PartTimes(p50, p95)},
        1, 1.0, 0.01, PeakMemory(1, 1), 10, 16, "4bit", "mlx", "float32", "here",
    )  # fmt: skip
    lines = bench_text(figures).splitlines()
    assert lines[1].split() == ["ms", "a", "frame", "median", "95", "%", "of", "80", "ms"]
    rows = [line.split() for line in lines[2:6]]
    assert [row[0] for row in rows] == ["temporal", "depformer", "codec", "total"]
    assert rows[3] == ["total", f"{1000 * p50:.1f}", f"{1000 * p95:.1f}", f"{p50 / 0.08:.0%}"]
    assert lines[6].startswith(words)
    assert sum("real time" in line for line in lines) == 1
    without = replace(figures, table={name: times for name, times in figures.table.items() if name != "codec"})
    (line,) = (line for line in bench_text(without).splitlines() if "real time" in line)
    assert line.startswith("the model alone is fast enough" if p95 < 0.08 else "too slow")
    assert line.endswith("; sound is not in it: the bundle's codec does not load") or "; half of them" in line


def test_words_of_random_weights_are_called_noise(conversation):
    folder = conversation[0]
    line = answers.made_of_noise(folder / "demo-audio")
    assert line is not None
    assert line.endswith("made from demo:audio, whose weights are random: its words are noise and are not shown")
    assert conversation[1][1].strip() == ""


def test_words_of_trained_weights_are_not(bundle):
    assert answers.made_of_noise(bundle("--recipe", "4bit")) is None


def meant(
    transcribe: recognizer.Transcribe, samples: Floats, text: str, tokens: Tokens | None = None
) -> tuple[Answer, list[str]]:
    """The judgement of an answer, with a floor of a recognizer that understands the question."""
    frames = -(-len(samples) // FRAME)
    if tokens is None:
        tokens = np.random.default_rng(0).integers(0, 2048, (frames, 8)).astype(np.int32)
    answer = round_trip.judged(samples, tokens, text, transcribe)
    return answer, [failure.message for failure in round_trip.failures(answer, 0.0)]


@pytest.fixture(scope="module")
def speech():
    with audio_files.reading(SPEECH) as (count, frames):
        return np.concatenate(list(frames))[:count]


def test_speech_passed_around_the_model_is_understood(speech):
    """Synthetic speech in the answer's place: what the recognizer gets wrong of it is the floor."""
    transcribe = recognizer.load()
    found, failures = meant(transcribe, speech, SAID)
    assert (found.word_error_rate or 0.0) <= 0.1
    assert found.transcript.split()[-1] == "children"
    assert failures == []
    assert found.clipped == 0
    assert found.silent < 0.4
    _, failures = meant(transcribe, speech, "Once upon a time a king lived in a castle far away from here.")
    assert ["is not its text" in reason for reason in failures] == [True]


def test_what_is_wrong_with_an_answer_is_said(speech, monkeypatch):
    heard = {"words": SAID}

    def transcribe(samples):
        assert len(samples) == pytest.approx(len(speech) * 16000 / RATE, abs=2)
        return heard["words"]

    assert meant(transcribe, speech, SAID)[1] == []
    assert "silent" in meant(transcribe, np.zeros_like(speech), "")[1][0]
    assert "clipped" in meant(transcribe, np.clip(speech * 100, -1, 1), SAID)[1][0]
    again = " ".join(["and then we went home"] * 5)
    heard["words"] = again
    assert "repeats a phrase 5 times in a row" in meant(transcribe, speech, again)[1][0]
    heard["words"] = SAID
    once = np.random.default_rng(0).integers(0, 9, (25, 8))
    loud = np.ones(75, bool)
    assert round_trip.repeated_sound(np.tile(once, (3, 1)), loud) == 6
    assert round_trip.repeated_sound(np.tile(once, (2, 1)), loud[:50]) == 0  # twice is no loop
    assert round_trip.repeated_sound(np.zeros((50, 8), np.int32), loud[:50]) == 4
    assert round_trip.repeated_sound(np.zeros((75, 8), np.int32), ~loud) == 0  # silence may go on
    assert round_trip.repeated_sound(np.random.default_rng(0).integers(0, 9, (75, 8)).astype(np.int32), loud) == 0
    long = np.concatenate([speech, speech])[: 75 * FRAME]
    monkeypatch.setattr(round_trip, "loudness", lambda _: np.ones(75))
    assert "the same sound for 6.0 s" in meant(lambda _: SAID, long, SAID, np.tile(once, (3, 1)))[1][0]


def test_a_recognizer_that_hears_nothing_right_condemns_nobody():
    answer = Answer(
        seconds=1.0, text="", transcript="", word_error_rate=1.0, silent=0.0, clipped=0.0, repeats=1, looped=0.0
    )
    for floor, count in ((0.2, 1), (0.9, 0), (None, 0)):
        assert len(round_trip.failures(answer, floor)) == count
    assert round_trip.word_error_rate("Yes.", "yes") is None
    assert round_trip.word_error_rate("It's four o'clock, Nora!", "it's four o'clock nora") == 0
    assert round_trip.word_error_rate("one two three four", "one three four") == 0.25


def test_recognizers_are_loaded_by_name(monkeypatch):
    segments = [SimpleNamespace(text="good"), SimpleNamespace(text="morning")]
    asked = []

    class WhisperModel:
        def __init__(self, name):
            asked.append(name)

        def transcribe(self, samples, language):
            assert (len(samples), language) == (16000, "en")
            return segments, None

    def transcribe(samples, path_or_hf_repo, language=None):
        assert (len(samples), language) in ((16000, "en"), (16000, None))  # None: only to load it
        asked.append(path_or_hf_repo)
        return {"text": "good evening"}

    monkeypatch.setattr(recognizer, "find_spec", lambda name: name)
    monkeypatch.setitem(sys.modules, "faster_whisper", SimpleNamespace(WhisperModel=WhisperModel))
    monkeypatch.setitem(sys.modules, "mlx_whisper", SimpleNamespace(transcribe=transcribe))
    second = np.zeros(16000, np.float32)
    assert recognizer.load("faster-whisper")(second) == "good morning"
    assert recognizer.load("mlx-whisper")(second) == "good evening"
    assert asked == ["base.en", *["mlx-community/whisper-base.en-mlx"] * 2]
    monkeypatch.setitem(sys.modules, "faster_whisper", None)
    with pytest.raises(UserError, match="does not load"):
        recognizer.load("faster-whisper")
    monkeypatch.setattr(recognizer, "find_spec", lambda _: None)
    for name in RECOGNIZERS:
        with pytest.raises(UserError, match="pip install"):
            recognizer.load(name)


def test_a_strangers_bundle_is_looked_at_before_it_speaks(demos, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(demos / "speech-swift", folder)
    open_bundle(folder).close()
    whole = load_file(folder / "embeddings.safetensors")
    for wrong in (
        {key: whole[key] for key in whole if key != "emb.3.weight"},
        whole | {"emb.3.weight": whole["emb.3.weight"][:9]},
    ):
        save_file(wrong, folder / "embeddings.safetensors")
        with pytest.raises(UserError, match=r"embeddings\.safetensors: emb\.3\.weight: not as the manifest says"):
            open_bundle(folder)
    save_file(whole, folder / "embeddings.safetensors")
    path = folder / "voices" / "NATF2.safetensors"
    voice = load_file(path)
    token, late = voice["cache"].copy(), voice["cache"].copy()
    token[0, 3, 1], late[0, 3, 1] = 129, 128  # the demo's last token is 127, and 128 stands for the beginning
    nan = voice["embeddings"].copy()
    nan[2] = np.nan
    broken = {
        "cache holds tokens that this model does not have": {"cache": token},
        "not finite": {"embeddings": nan},
        "embeddings have shape": {"embeddings": voice["embeddings"][..., :9]},
        "cache has shape": {"cache": voice["cache"][:, :9]},
    }
    for reason, wrong in broken.items():
        save_file({key: np.ascontiguousarray(array) for key, array in (voice | wrong).items()}, path)
        with closing(open_bundle(folder)) as bundle, pytest.raises(UserError, match=reason):
            bundle.voices()
    save_file(voice | {"cache": late}, path)
    with closing(open_bundle(folder)) as bundle:
        assert len(bundle.voices()) == 18


def test_a_round_trip_stands_in_the_report(program, conversation):
    folder, said = conversation
    assert "not judged by its words" in said[2]  # through a random codec nobody understands the question
    left = folder / "demo-audio" / "parity"
    report = json.loads((left / "report.json").read_text())
    heard = report["round_trip"]
    assert heard["question"]["heard"].startswith("the weather is nice today")
    assert heard["answer"]["seconds"] == pytest.approx(SENTENCE)
    assert heard["scene"]["prompt"] == PROMPT
    page = (left / "report.html").read_text()
    assert page.count("<audio controls") == 2
    assert page.count("data:audio/flac;base64,") == 2
    assert "media-src data:" in page
    assert f"Spoken: of {SENTENCE:.1f} s of answer" in (left / "report.md").read_text()
    found = json.loads(bundle_report.as_json(reports.read(folder / "demo-audio")))
    assert found["round_trip"] == {key: heard[key] for key in heard if key != "audio"}
    asked = ("--round-trip", "question.wav", "--recognizer", "mlx-whisper")
    wrong = program("ppx-verify", "demo-audio", *asked, cwd=folder, status=2)
    assert "pip install mlx-whisper" in wrong.stderr
    alone = program("ppx-verify", "demo-audio", "--recognizer", "pocketsphinx", cwd=folder, status=2)
    assert "are for --round-trip" in alone.stderr


def test_a_round_trip_is_added_to_the_report_of_this_bundle(conversation, monkeypatch):
    monkeypatch.chdir(conversation[0])
    calls = []

    def add(*_, report, **__):
        calls.append("spoken")
        return report

    def compare(bundle, *_, **__):
        calls.append("compared")
        return reports.read(bundle)

    monkeypatch.setattr(bundle_report, "add_round_trip", add)
    monkeypatch.setattr(bundle_report, "verify", compare)
    for more, expected in (([], ["spoken"]), (["--frames", "80"], ["compared", "spoken"])):
        asked = ["demo-audio", "--round-trip", "question.wav", "--json", *more]
        done = CliRunner().invoke(verify.app, asked)
        assert (done.exit_code, calls) == (0, expected), done.output
        assert "audio" not in json.loads(done.stdout)["round_trip"]
        calls.clear()
    monkeypatch.setattr(bundle_report, "report_of", lambda *_: None)  # of other files
    assert CliRunner().invoke(verify.app, ["demo-audio", "--round-trip", "question.wav"]).exit_code == 0
    assert calls == ["compared", "spoken"]


def test_a_broken_answer_fails_a_verification_until_it_is_mended(conversation, tmp_path, monkeypatch):
    whole = conversation[0] / "demo-audio"
    folder = tmp_path / "bundle"
    shutil.copytree(whole / "parity", folder / "parity")
    shutil.copy(whole / "manifest.json", folder)
    report = reports.read(folder)
    assert report.verdict.passed
    assert report.round_trip
    sound = replace(report.round_trip.answer, repeats=1, looped=0.0, clipped=0.0)
    for answer, passes in ((replace(sound, silent=1.0), False), (sound, True)):
        spoken = replace(report.round_trip, answer=answer)
        monkeypatch.setattr(round_trip, "run", lambda *_, spoken=spoken: spoken)
        found = bundle_report.add_round_trip(folder, SPEECH)
        assert found.verdict.passed is passes
        assert reports.read(folder).verdict == found.verdict
        assert ("the answer is silent" in (folder / "parity" / "report.html").read_text()) is not passes


@pytest.mark.parametrize(
    "broken",
    [
        {"audio": {"question": "https://x/y", "answer": "data:audio/flac;base64,QQ=="}},
        {"answer": {}},
        {"recognizer": 3},
    ],
)
def test_a_strangers_round_trip_is_looked_at(conversation, tmp_path, broken):
    report = json.loads((conversation[0] / "demo-audio" / "parity" / "report.json").read_text())
    (tmp_path / "good.json").write_text(json.dumps(report))
    assert reports.read(tmp_path / "good.json").to_json() == report
    report["round_trip"] |= broken
    (tmp_path / "bad.json").write_text(json.dumps(report))
    with pytest.raises(UserError, match="not a report "):
        reports.read(tmp_path / "bad.json")
