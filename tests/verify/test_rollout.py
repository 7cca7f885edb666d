"""Rollouts: a greedy session with the user of a token file."""

import numpy as np
from golden import assert_same_session, streaming
from ppx.convert.source.source import locate, open_source
from ppx.model.reference import reference_of
from ppx.model.session import SILENCE, greedy
from ppx.model.tokens import read_tokens
from ppx.verify import rollout
from safetensors.numpy import load_file as load_arrays
from safetensors.numpy import save_file
from safetensors.torch import load_file


def test_a_rollouts_user_is_delayed_once(pico, tmp_path):
    """The golden session again, its user from a token file."""
    golden = load_file(pico / "golden" / "generate_greedy.safetensors")
    with open_source(locate(str(pico))) as source:
        a = source.architecture
        tokens = np.zeros((1, 17, len(golden["user_tokens"])), np.int32)
        tokens[0, 9:] = golden["user_tokens"].T
        save_file({"tokens": tokens}, tmp_path / "talk.safetensors")
        token_set = read_tokens(tmp_path / "talk.safetensors", a, None, None)
        played = rollout.script(source, token_set, golden["text_prompt"].tolist(), tokens.shape[2])
        frames = rollout.frames_of(a, played)
        voice = next(voice for voice in source.voices if voice.name == "NATF2")
        steps = list(greedy(streaming(reference_of(source.checkpoint)), a, voice, frames))
    assert_same_session(steps[-tokens.shape[2] :], golden, 1e-5)


def test_a_rollouts_user_is_silent_where_nothing_is_known(pico, tmp_path):
    tokens = load_arrays(pico / "heldout_tokens.safetensors")["tokens"][:1, :, :12].astype(np.int32)
    tokens[0, 9, 3] = -1
    save_file({"tokens": tokens}, tmp_path / "talk.safetensors")
    with open_source(locate(str(pico))) as source:
        token_set = read_tokens(tmp_path / "talk.safetensors", source.architecture, None, None)
        played = rollout.script(source, token_set, [], 14)
        silence = [token % source.architecture.card for token in SILENCE]
    tokens[0, 9, 3] = silence[0]
    assert played.user == [*tokens[0, 9:].T.tolist(), silence, silence]
    assert played.voice == source.voices[0].name
