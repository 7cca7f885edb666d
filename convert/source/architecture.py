"""The architecture of a PersonaPlex or Moshi model, as its config.json gives it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import Problem, UserError, reason, refuse
from ..file_names import CONFIG
from ..hints import Hint
from ..regular_files import read_json

DELAYS = (0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1)
PERSONAPLEX_STEPS = 16
SAMPLING: dict[str, Any] = {
    "audio_temp": 0.8,
    "audio_top_k": 250,
    "text_temp": 0.7,
    "text_top_k": 25,
}  # as the reference has it


@dataclass(frozen=True)
class Architecture:
    """Sizes of a model; the defaults are PersonaPlex-7B's, which its own config.json leaves out.

    hidden, depformer_hidden: width between ``linear_out`` and half of ``linear_in``. steps: depformer steps, each
    with weights of its own. n_q: audio codebooks in, the agent's and the user's together.
    """

    dim: int = 4096
    num_layers: int = 32
    num_heads: int = 32
    hidden_scale: float = 4.125
    context: int = 3000
    max_period: int = 10000
    text_card: int = 32000
    text_padding: int = 3
    n_q: int = 16
    card: int = 2048
    depformer_dim: int = 1024
    depformer_num_layers: int = 6
    depformer_num_heads: int = 16
    depformer_dim_feedforward: int = 4224
    steps: int = PERSONAPLEX_STEPS
    delays: tuple[int, ...] = DELAYS

    @property
    def hidden(self) -> int:
        """Width of the temporal transformer's MLP."""
        return _hidden(self.dim, int(self.hidden_scale * self.dim))

    @property
    def depformer_hidden(self) -> int:
        """Width of the depformer's MLP."""
        return _hidden(self.depformer_dim, self.depformer_dim_feedforward)


def _hidden(dim: int, feedforward: int) -> int:
    """Return the width of a gated MLP, by the reference's rule."""
    return 11 * dim // 4 if feedforward == 4 * dim else 2 * feedforward // 3


_SIZES = {  # key in config.json -> field, and the largest that is taken for a size: far above any real one, so that a
    # config from others cannot make us count to a billion
    "dim": ("dim", 1 << 17),
    "num_layers": ("num_layers", 1024),
    "num_heads": ("num_heads", 1024),
    "context": ("context", 1 << 24),
    "max_period": ("max_period", 1 << 30),
    "text_card": ("text_card", 1 << 22),
    "existing_text_padding_id": ("text_padding", 1 << 22),
    "n_q": ("n_q", 16),
    "card": ("card", 1 << 22),
    "depformer_dim": ("depformer_dim", 1 << 17),
    "depformer_num_layers": ("depformer_num_layers", 256),
    "depformer_num_heads": ("depformer_num_heads", 1024),
    "dep_q": ("steps", 128),
}
_OPTIONAL = {"existing_text_padding_id", "max_period", "context"}
_LONGEST_DELAY = 32  # frames: 2.6 s
_LARGEST = 1 << 20  # bytes of a config.json
_WIDEST = 1 << 20  # of an MLP
_FIXED: dict[str, tuple[Any, ...]] = {  # what the converter and every runtime take for granted
    "causal": (True,),
    "layer_scale": (None,),
    "gating": ("silu",),
    "norm": ("rms_norm_f32", "rms_norm"),
    "positional_embedding": ("rope",),
    "cross_attention": (False, None),
    "conditioners": ({}, None),
    "demux_second_stream": (False, None),
    "extra_heads_num_heads": (0, None),
    "depformer_causal": (True, None),
    "depformer_layer_scale": (None, False),
    "depformer_multi_linear": (True,),
    "depformer_gating": ("silu",),
    "depformer_pos_emb": ("none",),
    "depformer_weights_per_step": (True,),
    "depformer_weights_per_step_schedule": (None,),
    "depformer_low_rank_embeddings": (None,),
}


def from_config(config: dict[str, Any]) -> Architecture:
    """Read the architecture out of a parsed config.json; raises as ``sizes_of``, and for ``impossible`` sizes."""
    architecture = sizes_of(config)
    refuse(impossible(architecture))
    return architecture


def sizes_of(config: dict[str, Any]) -> Architecture:
    """Read the architecture out of a parsed config.json, looking at each key alone.

    One without ``dim`` means PersonaPlex-7B. Raises UserError with every key that is missing, of the wrong type, or
    asks for another kind of model than PersonaPlex.
    """
    if "dim" not in config:
        return Architecture()
    messages, sizes = [], {}
    for key, (field, largest) in _SIZES.items():
        value = config.get(key)
        if value is None and key in _OPTIONAL:
            continue
        if type(value) is not int or not 0 < value <= largest:
            messages.append(f"{key} is {_shown(value)}: a whole number from 1 to {largest} is needed")
        else:
            sizes[field] = value
    scale = config.get("hidden_scale", Architecture.hidden_scale)
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0.1 <= scale <= 64:
        messages.append(f"hidden_scale is {_shown(scale)}: a number from 0.1 to 64 is needed")
        scale = Architecture.hidden_scale
    feedforward = config.get("depformer_dim_feedforward")
    if feedforward is None:  # kyutai/personaplex-rl-seamless leaves it to the scale
        feedforward = int(scale * sizes.get("depformer_dim", Architecture.depformer_dim))
    if type(feedforward) is not int or not 3 <= feedforward <= _WIDEST:
        messages.append(
            f"depformer_dim_feedforward is {_shown(feedforward)}: a whole number from 3 to {_WIDEST} is needed"
        )
        feedforward = Architecture.depformer_dim_feedforward
    delays = config.get("delays", list(DELAYS))
    streams = 1 + sizes.get("n_q", Architecture.n_q)
    if not isinstance(delays, list) or not all(type(d) is int and 0 <= d <= _LONGEST_DELAY for d in delays):
        messages.append(f"delays is {_shown(delays)}: whole numbers from 0 to {_LONGEST_DELAY} are needed")
        delays = list(DELAYS)
    elif len(delays) != streams:
        messages.append(f"delays has {len(delays)} entries: 1 + n_q = {streams} streams need one each")
    for key, allowed in _FIXED.items():
        if key in config and config[key] not in allowed:
            messages.append(f"{key} is {_shown(config[key])}: only {allowed[0]!r} is PersonaPlex's architecture")
    refuse([Problem(CONFIG, message) for message in messages])
    return Architecture(**sizes, hidden_scale=float(scale), depformer_dim_feedforward=feedforward, delays=tuple(delays))


def impossible(a: Architecture) -> list[Problem]:
    """Return which sizes contradict each other; no runtime computes such a model."""
    messages = []
    if a.dim % a.num_heads:
        messages.append(f"num_heads is {a.num_heads}: it does not divide dim, {a.dim}")
    elif a.dim // a.num_heads % 2:
        messages.append(
            f"num_heads is {a.num_heads}: heads of dim {a.dim} are {a.dim // a.num_heads} wide, RoPE needs pairs"
        )
    if a.depformer_dim % a.depformer_num_heads:
        heads = f"depformer_num_heads is {a.depformer_num_heads}"
        messages.append(f"{heads}: it does not divide depformer_dim, {a.depformer_dim}")
    if not a.hidden:
        messages.append(f"hidden_scale is {a.hidden_scale}: at dim {a.dim} nothing is left of the MLP")
    if a.n_q % 2:
        messages.append(f"n_q is {a.n_q}: an even number is needed, half of the codebooks are the agent's")
    elif not a.n_q // 2 <= a.steps <= a.n_q:
        messages.append(f"dep_q is {a.steps}: from {a.n_q // 2} (the agent's) to {a.n_q} (all) codebooks are predicted")
    if a.text_padding >= a.text_card:
        messages.append(
            f"existing_text_padding_id is {a.text_padding}: the text vocabulary, text_card, is {a.text_card}"
        )
    if max(a.delays) >= a.context:
        messages.append(f"context is {a.context}: it must be longer than the longest delay, {max(a.delays)}")
    return [Problem(CONFIG, message) for message in messages]


def _shown(value: object) -> str:
    return repr(value)[:60]


def read_config(path: Path) -> dict[str, Any]:
    """Parse a config.json; raises UserError if it is not a JSON object of sane size."""
    try:
        config = read_json(path, _LARGEST)
    except (ValueError, RecursionError) as error:
        raise UserError(Problem(str(path), f"not readable as JSON ({reason(error)})", Hint.DOWNLOAD_AGAIN)) from None
    if not isinstance(config, dict):
        raise UserError(Problem(str(path), f"holds a {type(config).__name__}, not an object", Hint.DOWNLOAD_AGAIN))
    return config


def to_config(architecture: Architecture) -> dict[str, Any]:
    """Return the full Moshi config of an architecture, as moshi_mlx and the PyTorch loaders read it.

    ``depformer_context`` is the number of steps: the reference lets every step see all before it, and a runtime that
    takes 8 here predicts the later codebooks from fewer keys than the model was trained with.
    """
    return {
        "dim": architecture.dim,
        "text_card": architecture.text_card,
        "existing_text_padding_id": architecture.text_padding,
        "n_q": architecture.n_q,
        "dep_q": architecture.steps,
        "card": architecture.card,
        "num_heads": architecture.num_heads,
        "num_layers": architecture.num_layers,
        "hidden_scale": architecture.hidden_scale,
        "causal": True,
        "layer_scale": None,
        "context": architecture.context,
        "max_period": architecture.max_period,
        "gating": "silu",
        "norm": "rms_norm_f32",
        "positional_embedding": "rope",
        "depformer_dim": architecture.depformer_dim,
        "depformer_dim_feedforward": architecture.depformer_dim_feedforward,
        "depformer_num_heads": architecture.depformer_num_heads,
        "depformer_num_layers": architecture.depformer_num_layers,
        "depformer_causal": True,
        "depformer_layer_scale": None,
        "depformer_multi_linear": True,
        "depformer_context": architecture.steps,
        "depformer_max_period": 10000,
        "depformer_gating": "silu",
        "depformer_pos_emb": "none",
        "depformer_weights_per_step": True,
        "delays": list(architecture.delays),
    }
