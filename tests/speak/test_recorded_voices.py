"""Voices from recordings: the samples, a voice's file, bundles of all targets, conversations, consent."""

import base64
import json
import os
import re
import shlex
import shutil
import tarfile
from contextlib import closing
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pyloudnorm
import pytest
import rustymimi
import soundfile
import torch
from ppx.convert.bundle.manifest import manifest_of
from ppx.convert.bundle.reader import open_bundle
from ppx.convert.errors import UserError
from ppx.convert.file_names import CODEC
from ppx.convert.preparation import open_named
from ppx.convert.source import demo
from ppx.convert.source.mimi import FRAME, RATE
from ppx.convert.source.recorded_voice import read_voice_file, tables_sha256, write_voice
from ppx.model.voice_prompt import make_voice, rows_of
from ppx.speak import audio_files
from ppx.speak.codec import Codec
from ppx.speak.recorded_voices import (
    LOUDNESS,
    bundle_rows,
    normalized,
    read_voice,
    record_voice,
    voice_for_bundle,
    voices_for,
)
from ppx.verify.recorded_voices import without_consent
from safetensors import safe_open
from safetensors.numpy import save_file

PAGE = Path(__file__).parent.parent.parent / "docs" / "voices.md"
SPEECH = Path(__file__).parent.parent / "data" / "speech.flac"
CONSENT = "I am the speaker, and agree to this use of my voice."
TARGETS = {
    "speech-swift": ("--bits", "4", "--group-size", "64"),
    "moshi-mlx": ("--recipe", "moshi-q4", "--method", "rtn"),
    "mlx": ("--recipe", "bf16", "--target", "mlx"),
}


@pytest.fixture(scope="module")
def sources(codec, tmp_path_factory):
    """A folder with a source that has a whole codec (the demo, with few layers), recordings, and a question."""
    folder = tmp_path_factory.mktemp("sources")
    shallow = replace(demo.SIZES["demo:audio"], num_layers=2, depformer_num_layers=1)
    demo.make("demo", folder / "source", quiet=True, architecture=shallow)
    (folder / "source" / CODEC).unlink()
    (folder / "source" / CODEC).symlink_to(codec)
    samples, rate = soundfile.read(SPEECH, dtype="float32")
    soundfile.write(folder / "me.wav", samples[: int(1.3 * rate)], rate)
    soundfile.write(folder / "question.wav", samples[: int(0.4 * rate)], rate)
    return folder


@pytest.fixture(scope="module")
def source(sources):
    with open_named(str(sources / "source")) as opened:
        yield opened


@pytest.fixture(scope="module")
def mine(source, sources):
    return record_voice(source, sources / "me.wav", CONSENT, "mine")


@pytest.fixture(scope="module")
def voice_file(mine, sources):
    write_voice(sources / "mine.safetensors", mine)
    return sources / "mine.safetensors"


@pytest.fixture(scope="module")
def bundles(program, sources, voice_file):
    """The source converted for each target with the voice, and verified."""

    def bundle(target):
        if not (sources / target).is_dir():
            more = ("--voice", voice_file.name, "--output", target, "--verify")
            program("ppx-convert", "source", *TARGETS[target], *more, cwd=sources)
        return sources / target

    return bundle


def member(archive, name):
    file = archive.extractfile(name)
    assert file is not None
    return file.read()


def linked(bundle, folder):
    """A bundle whose manifest a test may change, in hard links: its codec has 385 MB."""
    shutil.copytree(bundle, folder, copy_function=os.link)
    (folder / "manifest.json").unlink()
    shutil.copy(bundle / "manifest.json", folder)
    return folder, json.loads((folder / "manifest.json").read_text())


def test_a_voice_is_the_normalized_recording_encoded_frame_by_frame(source, sources, mine):
    """The reference's steps, with the libraries themselves."""
    assert soundfile.info(sources / "me.wav").samplerate != RATE
    samples = audio_files.read(sources / "me.wav")[0]
    louder = pyloudnorm.normalize.loudness(samples, pyloudnorm.Meter(RATE).integrated_loudness(samples), -24.0)
    tokenizer = rustymimi.Tokenizer(str(source.location.folder / CODEC), num_codebooks=8)
    frames = []
    while len(louder):
        frame, louder = louder[:FRAME], louder[FRAME:]
        frame = np.concatenate([frame, np.zeros(FRAME - len(frame))])
        frames.append(tokenizer.encode_step(frame.astype(np.float32)[None, None])[0, :, 0])
    assert len(frames) == 17
    assert mine.origin.codes.tolist() == np.stack(frames, 1).tolist()
    expected = make_voice("mine", np.stack(frames, 1).astype(np.int64), source.architecture, rows_of(source.checkpoint))
    assert mine.voice.embeddings.tobytes() == expected.embeddings.tobytes()
    assert mine.voice.cache.tolist() == expected.cache.tolist()
    assert mine.voice.embeddings.shape == (16, 1, 1, 256)
    assert (mine.origin.name, mine.origin.consent) == ("mine", CONSENT)


def test_loudness_does_not_depend_on_how_loud_the_recording_is(sources):
    samples = audio_files.read(sources / "me.wav")[0]
    meter = pyloudnorm.Meter(RATE)
    for factor in (0.1, 1, 3):
        found = normalized(samples * np.float32(factor), Path("me.wav"))
        assert found.dtype == np.float32
        assert meter.integrated_loudness(found) == pytest.approx(LOUDNESS, abs=0.01)


def test_peaks_are_not_limited(sources):
    """A click makes a quiet recording louder than full scale, as in the reference; no warning gets out."""
    samples = audio_files.read(sources / "me.wav")[0] * np.float32(0.01)
    samples[5000] = 1
    assert np.abs(normalized(samples, Path("me.wav"))).max() > 1


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.zeros(RATE), "too quiet to be a voice"),
        (np.ones(RATE // 5) * 0.1, r"measured \(it is 0.20 s long, and 0.4 s are needed\): give a longer"),
        (np.zeros(0), "loudness cannot be measured"),
        (np.ones(61 * RATE) * 0.1, "61 s long: at most 60 s are read"),
    ],
)
def test_recordings_that_make_no_voice(source, tmp_path, samples, message):
    soundfile.write(tmp_path / "r.wav", samples, RATE)
    with pytest.raises(UserError, match=message):
        record_voice(source, tmp_path / "r.wav", CONSENT)


def test_channels_are_mixed(source, tmp_path):
    samples = np.random.default_rng(0).standard_normal((RATE, 2)).astype(np.float32) * 0.1
    soundfile.write(tmp_path / "two.wav", samples, RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "one.wav", samples.mean(1), RATE, subtype="FLOAT")
    two, one = (record_voice(source, tmp_path / name, CONSENT) for name in ("two.wav", "one.wav"))
    assert two.origin.tokens == one.origin.tokens
    assert two.origin.recording != one.origin.recording


def test_tokens_that_the_model_does_not_have(source, sources, pico):
    """Pico knows 128 of the codec's tokens."""
    with open_named(str(pico)) as plain:
        small = replace(source, checkpoint=plain.checkpoint)
        with pytest.raises(UserError, match="tokens outside the vocabulary of this model"):
            record_voice(small, sources / "me.wav", CONSENT)
        with pytest.raises(UserError, match="not a codec that rustymimi loads"):
            record_voice(plain, sources / "me.wav", CONSENT)


@pytest.mark.parametrize("consent", ["", "   ", "yes", "I agree", "1 2 3 4", "- - -", "x" * 30])
def test_consent_is_a_sentence(source, sources, consent):
    with pytest.raises(UserError, match="consent of the person recorded"):
        record_voice(source, sources / "me.wav", consent)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NATF2", "there is already a voice NATF2"),
        ("natf2", "there is already a voice NATF2"),
        ("a/b", "not a name"),
        ("..", "not a name"),
        ("ä", "not a name"),
        ("", "not a name"),
        ("a" * 65, "not a name"),
    ],
)
def test_names_are_plain_and_new(source, sources, name, message):
    with pytest.raises(UserError, match=message):
        record_voice(source, sources / "me.wav", CONSENT, name)


def test_the_file_of_a_voice(source, mine, voice_file):
    assert read_voice(source, voice_file).origin == mine.origin
    with safe_open(voice_file, "pt") as file:
        assert file.get_tensor("cache").dtype == torch.int64
        assert file.get_tensor("cache").tolist() == mine.voice.cache.tolist()
        assert file.get_tensor("embeddings").dtype == torch.bfloat16
        assert file.get_tensor("embeddings").view(torch.uint16).numpy().tobytes() == mine.voice.embeddings.tobytes()
        assert file.get_tensor("tokens").tolist() == mine.origin.codes.tolist()
        metadata = file.metadata()
    assert metadata["consent"] == CONSENT
    assert metadata["embedding_tables_sha256"] == tables_sha256(source.checkpoint)
    assert not list(voice_file.parent.glob(".*partial"))


def changed(voice_file, target, metadata=None, **tensors):
    """Write a voice's file with other tensors or metadata; None leaves one out."""
    from safetensors.torch import save_file as save

    with safe_open(voice_file, "pt") as file:
        held = {key: file.get_tensor(key) for key in file.keys()} | tensors  # noqa: SIM118
        about = file.metadata() | (metadata or {})
    held = {key: value for key, value in held.items() if value is not None}
    save(held, target, {key: value for key, value in about.items() if value is not None})
    return target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": None}, "not cache I64, embeddings BF16 and tokens I16"),
        ({"more": torch.zeros(1)}, "not cache I64, embeddings BF16 and tokens I16"),
        ({"embeddings": torch.zeros(16, 1, 1, 256)}, "embeddings' F32"),
        ({"embeddings": torch.zeros(16, 1, 1, 255).bfloat16()}, "embeddings have shape"),
        ({"embeddings": torch.zeros(15, 1, 1, 256).bfloat16()}, "15 embeddings do not belong to 17 frames"),
        ({"embeddings": torch.full((16, 1, 1, 256), torch.nan).bfloat16()}, "not finite"),
        ({"embeddings": torch.zeros(16, 1, 1, 256).bfloat16()}, "embeddings are not those of its tokens"),
        ({"cache": torch.zeros(1, 17, 2, dtype=torch.int64)}, "cache has 2 columns"),
        (
            {"cache": torch.full((1, 17, 4), 1 << 40)},
            "(was it made for another checkpoint?): make it again from the recording",
        ),
        ({"cache": torch.zeros(1, 17, 4, dtype=torch.int64)}, "cache are not those of its tokens"),
        ({"tokens": torch.full((8, 17), 2048, dtype=torch.int16)}, "tokens are not from 0 to 2047"),
        ({"tokens": torch.full((8, 17), -1, dtype=torch.int16)}, "tokens are not from 0 to 2047"),
        ({"tokens": torch.zeros(4, 17, dtype=torch.int16)}, "tokens have shape"),
        ({"tokens": torch.zeros(8, 17, dtype=torch.int16)}, "not those of its tokens"),
        ({"metadata": {"consent": None}}, "consent of the person recorded"),
        ({"metadata": {"consent": "yes"}}, "not a sentence"),
        ({"metadata": {"consent": "I am \x1b[2J the speaker"}}, "cannot be printed"),
        ({"metadata": {"name": "../mine"}}, "lacks a plain name"),
        ({"metadata": {"recording_sha256": "x"}}, "sha256 of recording"),
        ({"metadata": {"format": "mlx"}}, "not a voice that ppx-voice wrote"),
        ({"metadata": {"embedding_tables_sha256": "0" * 64}}, "other embedding tables than those of source"),
    ],
)
def test_files_that_are_no_voice_are_refused(source, voice_file, tmp_path, change, message):
    path = changed(voice_file, tmp_path / "bad.safetensors", **change)
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        read_voice(source, path)
    assert str(caught.value).isprintable()


def test_files_of_other_kinds_are_refused(source, pico, tmp_path):
    save_file({"a": np.zeros(3)}, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="not a voice that ppx-voice wrote"):
        read_voice(source, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(UserError, match="not a complete safetensors file"):
        read_voice(source, tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="not a voice"):
        read_voice_file(pico / "model.safetensors", source.architecture)


def test_a_voice_of_another_models_tables(source, mine, voice_file, tmp_path):
    """One bit of one table is enough."""
    shutil.copytree(source.location.folder, tmp_path / "other", symlinks=True)
    weights = tmp_path / "other" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[source.checkpoint.file.offsets["emb.15.weight"] + 77] ^= 1
    weights.write_bytes(data)
    with open_named(str(tmp_path / "other")) as other:
        assert tables_sha256(other.checkpoint) != mine.origin.embedding_tables
        with pytest.raises(UserError, match=r"mine.safetensors: made from other embedding tables"):
            read_voice(other, voice_file)


@pytest.mark.parametrize("target", list(TARGETS))
def test_bundles_hold_the_voice_as_their_target_reads_it(bundles, mine, target):
    folder = bundles(target)
    manifest = manifest_of(folder)
    assert manifest.recorded_voices == (mine.origin,)
    assert "mine" in manifest.voices
    assert json.loads((folder / "parity" / "report.json").read_text())["verdict"]["passed"]
    config = json.loads((folder / "config.json").read_text())
    if target == "moshi-mlx":
        with tarfile.open(folder / "voices.tgz") as mixed, tarfile.open(folder.parent / "source/voices.tgz") as plain:
            assert mixed.getnames() == [*plain.getnames(), "voices/mine.pt"]
            for name in plain.getnames():
                assert member(mixed, name) == member(plain, name)
            held = torch.load(BytesIO(member(mixed, "voices/mine.pt")), weights_only=True)
        assert set(held) == {"embeddings", "cache"}
        assert held["cache"].dtype == torch.int64
        assert held["cache"].tolist() == mine.voice.cache.tolist()
        assert held["embeddings"].view(torch.uint16).numpy().tobytes() == mine.voice.embeddings.tobytes()
    else:
        assert "mine" in config["voices"]
        with safe_open(folder / "voices" / "mine.safetensors", "pt") as file:
            assert sorted(file.keys()) == ["cache", "embeddings"]
            cache, embeddings = file.get_tensor("cache"), file.get_tensor("embeddings")
        assert cache.dtype == (torch.float32 if target == "speech-swift" else torch.int32)
        assert cache.long().tolist() == mine.voice.cache.tolist()
        expected = torch.from_numpy(mine.voice.embeddings.astype(np.float32))
        assert (embeddings == expected.to(embeddings.dtype)).all()
    card = (folder / "README.md").read_text()
    assert 'Consent, as its maker states it: "I am the speaker\\, and agree to this use of my voice\\."' in card
    assert "--voice mine.safetensors" in card


@pytest.mark.parametrize("target", list(TARGETS))
def test_a_bundles_own_tables_give_the_voice(bundles, codec, sources, mine, voice_file, target):
    """To the bit where they are floats; near it where they are quantized."""
    with closing(open_bundle(bundles(target))) as bundle:
        again = make_voice("mine", mine.origin.codes, bundle.architecture, bundle_rows(bundle))
        from_file = voice_for_bundle(bundle, voice_file, None, Codec(codec, 8))
        recorded = voice_for_bundle(bundle, sources / "me.wav", CONSENT, Codec(codec, 8))
    assert from_file.embeddings.tobytes() == recorded.embeddings.tobytes() == again.embeddings.tobytes()
    assert from_file.cache.tolist() == mine.voice.cache.tolist()
    exact, found = (one.embeddings.astype(np.float32) for one in (mine.voice, again))
    distance = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    if target == "moshi-mlx":
        assert 0.02 < distance < 0.2
    else:
        assert distance < 1e-4  # what float16 flushes to zero


def test_a_bundle_refuses_a_voice_of_other_tables(bundles, codec, voice_file, tmp_path):
    shuffled = torch.from_numpy(np.random.default_rng(0).standard_normal((16, 1, 1, 256)).astype(np.float32)).bfloat16()
    path = changed(voice_file, tmp_path / "other.safetensors", embeddings=shuffled)
    for target in ("moshi-mlx", "mlx"):
        refused = pytest.raises(UserError, match="made from other embedding tables")
        with closing(open_bundle(bundles(target))) as bundle, refused:
            voice_for_bundle(bundle, path, None, Codec(codec, 8))


def test_verification_makes_the_voice_again(program, bundles, tmp_path):
    """A record that is not the voice's is found, though every hash fits."""
    folder, manifest = linked(bundles("mlx"), tmp_path / "bundle")
    record = manifest["recorded_voices"][0]
    codes = np.frombuffer(base64.b64decode(record["tokens"]), "<i2").copy()
    codes[5] ^= 1
    record["tokens"] = base64.b64encode(codes.tobytes()).decode()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    verify = ("ppx-verify", folder, "--reference", bundles("mlx").parent / "source", "--sequences", "1")
    done = program(*verify, cwd=tmp_path, status=1)
    assert "voice mine: embeddings:" in done.stderr
    record["embedding_tables_sha256"] = "0" * 64
    (folder / "manifest.json").write_text(json.dumps(manifest))
    done = program(*verify, cwd=tmp_path, status=1)
    assert "made from other embedding tables than the source's" in done.stderr


def test_publishing_needs_consent(program, bundles, tmp_path):
    """A passing bundle goes up with it, and never without it."""
    folder, manifest = linked(bundles("mlx"), tmp_path / "bundle")
    command = ("ppx-publish", folder, "me/mine", "--dry-run")
    assert "voices/mine.safetensors" in program(*command, cwd=tmp_path).stdout
    manifest["recorded_voices"][0]["consent"] = "yes"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    for force in ((), ("--force",)):
        done = program(*command, *force, cwd=tmp_path, status=1)
        assert "no consent is recorded for the voice of mine" in done.stderr
    del manifest["recorded_voices"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    done = program(*command, "--force", cwd=tmp_path, status=1)
    assert "no consent is recorded for the voice of mine" in done.stderr


@pytest.mark.parametrize("target", ["moshi-mlx", "mlx"])
def test_a_source_without_voices_gets_one(program, sources, voice_file, mine, tmp_path, target):
    """Its bundle has this voice only, and no option publishes it without its consent."""
    shutil.copytree(sources / "source", tmp_path / "plain", symlinks=True, ignore=shutil.ignore_patterns("voices.tgz"))
    more = ("--voice", voice_file, "--output", "bundle", "--verify")
    program("ppx-convert", "plain", *TARGETS[target], *more, cwd=tmp_path)
    manifest = manifest_of(tmp_path / "bundle")
    assert manifest.voices == ("mine",)
    assert manifest.recorded_voices == (mine.origin,)
    assert json.loads((tmp_path / "bundle" / "parity" / "report.json").read_text())["verdict"]["passed"]
    with closing(open_bundle(tmp_path / "bundle")) as bundle:
        (voice,) = bundle.voices()
    assert voice.cache.tolist() == mine.voice.cache.tolist()
    assert without_consent(manifest) == []
    assert without_consent(replace(manifest, recorded_voices=())) == ["mine"]


def test_voices_of_the_source_need_no_consent(bundles, mine):
    """A source has voices of its own if it has an archive without the presets."""
    manifest = manifest_of(bundles("mlx"))
    own = replace(manifest, voices=("anna",), recorded_voices=())
    assert without_consent(own) == []
    silent = replace(mine.origin, consent="")
    assert without_consent(replace(own, voices=("anna", "mine"), recorded_voices=(silent,))) == ["mine"]
    files = {name: file for name, file in own.source.files.items() if name != "voices.tgz"}
    assert without_consent(replace(own, source=replace(own.source, files=files))) == ["anna"]


def test_added_voices_come_last(source, mine, bundles):
    """What takes the first voice takes one of the source's, whatever an added one is called."""
    first = replace(mine, voice=replace(mine.voice, name="A"), origin=replace(mine.origin, name="A"))
    names = [voice.name for voice in source.with_voices([mine, first]).voices]
    assert (names[0], names[-2:]) == ("NATF0", ["mine", "A"])
    for target in TARGETS:
        with closing(open_bundle(bundles(target))) as bundle:
            assert [voice.name for voice in bundle.voices()][-1] == "mine"
            bundle.manifest = replace(bundle.manifest, recorded_voices=(replace(mine.origin, name="NATF0"),))
            assert [voice.name for voice in bundle.voices()][-1] == "NATF0"


def test_names_and_voices_of_a_conversion(source, sources, voice_file):
    """The same name twice is refused, in either kind of file."""
    assert [one.voice.name for one in voices_for([voice_file, sources / "me.wav"], CONSENT)(source)] == ["mine", "me"]
    with pytest.raises(UserError, match="voice mine: there is already a voice mine"):
        voices_for([voice_file, voice_file])(source)
    with pytest.raises(UserError, match=r"nothing.wav: no such file"):
        voices_for([sources / "nothing.wav"], CONSENT)
    with pytest.raises(UserError, match="consent of the person recorded"):
        voices_for([sources / "me.wav"])


def test_another_voice_makes_another_bundle(program, bundles, sources):
    """A bundle with other voices is not taken for one that is finished; presets alone stay as they were."""
    again = ("ppx-convert", "source", *TARGETS["mlx"], "--output", "mlx")
    done = program(*again, cwd=bundles("mlx").parent, status=2)
    assert "holds a bundle of another source, with other settings" in done.stderr
    done = program(*again, "--voice", "mine.safetensors", "--json", cwd=sources)
    assert json.loads(done.stdout)["files_made"] == 0


def test_mistakes_of_ppx_voice(program, sources, tmp_path):
    command = ("ppx-voice", sources / "source", sources / "me.wav")
    done = program(*command, cwd=tmp_path, status=2)
    assert "give it as --consent" in done.stderr
    assert "Traceback" not in done.stderr
    done = program(*command, "--consent", CONSENT, "--name", "NATM0", cwd=tmp_path, status=2)
    assert "voice NATM0: there is already a voice NATM0: choose another name" in done.stderr
    done = program(*command, "--consent", CONSENT, "-o", "x.pt", cwd=tmp_path, status=2)
    assert "x.pt: give the name of a .safetensors file" in done.stderr
    (tmp_path / "me.safetensors").write_text("mine")
    done = program(*command, "--consent", CONSENT, cwd=tmp_path, status=2)
    assert "me.safetensors: is there already" in done.stderr
    assert (tmp_path / "me.safetensors").read_text() == "mine"
    done = program(*command, "--consent", CONSENT, "--force", "--json", cwd=tmp_path)
    said = json.loads(done.stdout)
    assert (said["output"], said["name"], said["frames"], said["consent"]) == ("me.safetensors", "me", 17, CONSENT)
    assert "tokens" not in said


def test_mistakes_of_the_others(program, bundles, sources, tmp_path):
    speak = ("ppx-speak", bundles("mlx"), sources / "question.wav", "-o", "a.wav")
    done = program(*speak, "--voice", sources / "me.wav", cwd=tmp_path, status=2)
    assert "give it as --consent" in done.stderr
    done = program(*speak, "--voice", "mine", "--consent", CONSENT, cwd=tmp_path, status=2)
    assert "--consent is for a recording" in done.stderr
    done = program(*speak, "--voice", "other.safetensors", cwd=tmp_path, status=2)
    assert "other.safetensors: no such file" in done.stderr
    convert = ("ppx-convert", sources / "source")
    done = program(*convert, "--consent", CONSENT, cwd=tmp_path, status=2)
    assert "--consent is for a recording" in done.stderr
    done = program(*convert, "--voice", sources / "me.wav", "--consent", CONSENT, "--dry-run", cwd=tmp_path)
    assert "not in this plan: a dry run makes no voices" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_commands_of_the_page_run(program, sources, tmp_path):
    """In the order of the page, on a small source in place of the published one; and its Python."""
    for name in ("me.wav", "question.wav"):
        shutil.copy(sources / name, tmp_path)
    text = PAGE.read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    commands = [line for block in blocks for line in block.splitlines() if line.startswith("ppx-")]
    assert [command.split()[0] for command in commands].count("ppx-speak") == 3
    for command in commands:
        name, *arguments = shlex.split(command)
        arguments = [sources / "source" if word == "nvidia/personaplex-7b-v1" else word for word in arguments]
        program(name, *arguments, cwd=tmp_path)
        if name == "ppx-speak":
            assert len(soundfile.read(tmp_path / "answer.wav")[0]) > 0
            (tmp_path / "answer.wav").unlink()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert manifest_of(tmp_path / "my-bundle").recorded_voices
    shutil.rmtree(tmp_path / "my-bundle")
    code = code.replace('"demo:audio"', repr(str(sources / "source")))
    for name in ("mine.safetensors", "me.wav", "my-bundle"):
        code = code.replace(f'"{name}"', repr(str(tmp_path / name)))
    exec(compile(code, str(PAGE), "exec"), {})
    assert [voice.name for voice in manifest_of(tmp_path / "my-bundle").recorded_voices] == ["mine"]
