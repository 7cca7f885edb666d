"""A base Moshi from end to end: converted, loaded by the real moshi_mlx 0.3.0, verified, spoken with."""

import json
import shlex
from contextlib import closing
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
from moshi_mlx import models as moshi_models
from moshi_mlx.utils import Sampler
from ppx.calibrate.self_generated import generate
from ppx.convert import install
from ppx.convert.bundle.reader import open_bundle
from ppx.convert.file_names import CODEC
from ppx.convert.source.source import locate, open_source
from ppx.model.mlx_model import model_of
from ppx.model.reference import reference_of
from ppx.model.session import Frame, greedy, no_voice
from ppx.speak.answers import answer
from ppx.speak.benchmark import measure
from ppx.speak.sampling import GREEDY
from ppx.speak.speaker import SpeakOptions, open_speaker
from ppx.verify.publishing import card
from sources import base_moshi, keep_apart, rename, shard

FORMS = {"moshi-q4": ("model.q4.safetensors", 4, 32), "moshi-q8": ("model.q8.safetensors", 8, 64)}


@pytest.fixture(scope="module")
def moshi(tmp_path_factory) -> Path:
    """As awkward as one may be: in shards, with projections apart and other names."""
    folder = base_moshi(tmp_path_factory.mktemp("moshi") / "moshika", card=2048)
    keep_apart(folder)
    shard(folder)
    rename(folder, mimi_name="mimi.safetensors", tokenizer_name="spm.model")
    return folder


@pytest.fixture(scope="module")
def bundles(program, moshi):
    made: dict[str, Path] = {}

    def convert(recipe: str) -> Path:
        if recipe not in made:
            program("ppx-convert", moshi, "--recipe", recipe, "-o", recipe, cwd=moshi.parent)
            made[recipe] = moshi.parent / recipe
        return made[recipe]

    return convert


@pytest.mark.parametrize("recipe", FORMS)
def test_the_real_loader_takes_it_strictly_and_speaks(recipe, bundles):
    folder = bundles(recipe)
    name, bits, size = FORMS[recipe]
    config = json.loads((folder / "config.json").read_text())
    assert (config["moshi_name"], config["dep_q"], config["mimi_name"]) == (name, 8, CODEC)
    files = json.loads((folder / "manifest.json").read_text())["files"]
    assert set(files) == {name, CODEC, "tokenizer_spm_32k_3.model", "config.json"}
    with mx.stream(mx.cpu):
        model = moshi_models.Lm(moshi_models.LmConfig.from_config_dict(config))
        model.set_dtype(mx.bfloat16)
        nn.quantize(model, bits=bits, group_size=size)
        model.load_weights(str(folder / name), strict=True)
        assert len(model.depformer.slices) == 8
        text, audio = model.sample(
            mx.array([[512]]), [mx.array([[2048]])] * model.cfg.audio_codebooks, Sampler(), Sampler()
        )
        assert 0 <= np.array(text).item() < 512
        assert np.array(audio).size == 8


def test_its_programs_are_shown_what_they_can_run(bundles):
    folder = bundles("moshi-q4")
    usages = {usage.program: usage for usage in install(folder).usage}
    assert (usages["personaplex-mlx"].line, usages["personaplex-mlx"].note) == (
        None,
        "needs voices, and this bundle has none",
    )
    words = shlex.split(str(usages["moshi_mlx"].line))
    assert words[:3] == ["python", "-m", "moshi_mlx.local_web"]
    assert all(Path(word).is_file() for word in words if word.startswith("/"))


def test_manifest_inspection_and_card_know_no_voices(bundles, program, tmp_path):
    folder = bundles("moshi-q4")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["voices"] == []
    assert "model.safetensors.index.json" in manifest["source"]["files"]
    assert "mimi.safetensors" in manifest["source"]["files"]
    assert "\nno voices" in program("ppx-inspect", folder, "--check", cwd=tmp_path).stdout
    with closing(open_bundle(folder)) as bundle:
        assert bundle.voices() == []
        text = card.files(bundle.manifest, None)["README.md"]
    assert "It has no voices." in text
    assert "It loads in moshi_mlx (Python), and in `ppx-speak`" in text
    assert "ppx-speak USER/NAME question.wav --output answer.wav --prompt" in text
    assert not any(wrong in text for wrong in ("voices.tgz", "Voices:", "personaplex_mlx", "[personaplex-mlx]"))


def test_it_is_verified_without_voices(bundles, moshi, program):
    folder = bundles("moshi-q8")
    program("ppx-verify", folder, "--reference", moshi, "--rollout", 6, cwd=moshi.parent)
    report = json.loads((folder / "parity" / "report.json").read_text())
    assert report["verdict"] == {"passed": True, "failures": []}
    assert (report["material"]["kind"], report["material"]["sequences"]) == ("system prompt", 1)
    assert not report["material"].get("voices")
    assert report["rollout"]["voice"] is None
    assert report["rollout"]["frames"] == 6
    assert "codebook_7" in report["predictions"]
    assert "codebook_8" not in report["predictions"]


def test_another_base_moshi_is_noticed(bundles, program, tmp_path):
    other = base_moshi(tmp_path / "other")
    done = program("ppx-verify", bundles("moshi-q8"), "--reference", other, cwd=tmp_path, status=2)
    assert "model.safetensors is not the one that the bundle was made from" in done.stderr


def test_calibration_sessions_begin_with_nothing(moshi):
    with open_source(locate(str(moshi))) as source:
        tokens = generate(source, 6, 3, quiet=True)
    assert tokens.shape == (3, 17, 6)
    assert tokens[:, 1:9].max() < 2048
    assert len({sequence.tobytes() for sequence in tokens}) == 3


def test_it_speaks_without_a_voice_as_the_reference_does(bundles, moshi, codec):
    folder = bundles("bf16")
    speaker = open_speaker(folder, SpeakOptions(prompt="", sampling=GREEDY, codec=codec, arithmetic="float32"))
    assert speaker.conversation.voice.name == ""
    users = np.random.default_rng(1).integers(0, 2048, (5, 8))
    spoken = [speaker.conversation.step(user) for user in users]
    with open_source(locate(str(moshi))) as source, torch.inference_mode():
        reference, a = reference_of(source.checkpoint), source.architecture
        with closing(open_bundle(folder)) as stored:
            expected = [
                list(greedy(model, a, no_voice(a), [Frame(user=user.tolist()) for user in users]))
                for model in (reference, model_of(stored, "float32"))
            ]
    for steps in expected:
        assert [text for text, _ in spoken] == [int(step.text_logits.argmax()) for step in steps]
        assert all(np.array_equal(agent, step.tokens[1:9]) for (_, agent), step in zip(spoken, steps, strict=True))


def test_programs_speak_and_measure_without_a_voice(bundles, codec, program, tmp_path):
    import soundfile

    soundfile.write(tmp_path / "q.wav", np.zeros(24000 // 4, np.float32), 24000)
    folder = bundles("moshi-q4")
    done = program("ppx-speak", folder, "q.wav", "-o", "a.wav", "--codec", codec, "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["voice"] is None
    assert soundfile.info(tmp_path / "a.wav").frames == 6000
    asked = ("q.wav", "-o", "b.wav", "--codec", codec, "--voice", "NATF2")
    done = program("ppx-speak", folder, *asked, cwd=tmp_path, status=2)
    assert "voice NATF2: this bundle has no voices: leave --voice out" in done.stderr
    assert measure(folder, 2, codec=codec).prefill.frames > 12
    assert answer(folder, tmp_path / "q.wav", tmp_path / "c.wav", SpeakOptions(codec=codec)).voice == ""
