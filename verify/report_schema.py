"""What a report must hold: reports come with the bundles of others, and are printed, drawn and published."""

import re

from ..convert.schema import TEXT, TRUTH, Each, Leaf, Maybe, OrNull, number, whole
from .limits import AT_LEAST, FIGURES

_SOUND = re.compile("data:audio/flac;base64,[A-Za-z0-9+/]*={0,2}")
_AMOUNT, _SHARE, _ANY = OrNull(number(0)), OrNull(number(0, 1)), OrNull(number())
_INDEX = OrNull(whole(0, 1 << 20))
_FILES = Each({"size": whole(), "sha256": Leaf("a sha256", lambda v: bool(re.fullmatch("[0-9a-f]{64}", str(v))))})

_DIFFERENCE = {"relative_l2": _AMOUNT, "cosine": _ANY, "max_abs": _AMOUNT}
_FIGURES = {
    "positions": whole(),
    "kl": OrNull(
        dict.fromkeys(("mean", "standard_error"), _AMOUNT)
        | dict.fromkeys(("median", "p90", "p99", "p99_9", "max"), Maybe(number(0)))  # not of several streams together
    ),
    "top1": OrNull({"agreement": _SHARE, "standard_error": _AMOUNT}),
    "loss": OrNull(
        {"reference": _ANY, "bundle": _ANY, "change": _ANY, "standard_error": _AMOUNT, "perplexity_ratio": _AMOUNT}
    ),
}
_STREAM = {"bundle": _FIGURES, "noise": _FIGURES}
_WEIGHTS = {
    **dict.fromkeys(("tensor", "source", "file", "component", "module"), TEXT),
    **dict.fromkeys(("layer", "step", "bits", "group_size"), _INDEX),
    **dict.fromkeys(("relative_rmse", "max_abs"), _AMOUNT),
    "part": OrNull(TEXT),
    "bits_per_weight": number(0),
    "parameters": whole(),
    "sqnr_db": _ANY,
    "cosine": _ANY,
    "max_abs_at": [whole()],
    "clipped": _SHARE,
    "unequal": OrNull(whole()),
}
_ACTIVATIONS = {
    "component": TEXT,
    "part": TEXT,
    "layer": _INDEX,
    "step": _INDEX,
    "accumulated": _DIFFERENCE,
    "noise_accumulated": _DIFFERENCE,
    "local": OrNull(_DIFFERENCE),
    "noise_local": OrNull(_DIFFERENCE),
}
_ROLLOUT = {
    "frames": whole(),
    "first_difference": OrNull({"frame": whole(), "stream": TEXT}),
    "agreement": [number(0, 1)],
    "agreement_agent": number(0, 1),
}
_SOUNDS = Leaf("a sound in FLAC", lambda value: isinstance(value, str) and bool(_SOUND.fullmatch(value)))
_ROUND_TRIP = {
    "question": {"file": TEXT, "seconds": number(0), "word_error_rate": _AMOUNT},
    "answer": {
        **dict.fromkeys(("text", "heard"), TEXT),
        **dict.fromkeys(("seconds", "silent", "clipped", "repeats", "looped"), number(0)),
        "word_error_rate": _AMOUNT,
    },
    "scene": {"voice": TEXT, "prompt": TEXT, "folded": TRUTH},
    "recognizer": TEXT,
    "limits": {"floor": number(0)},
    "audio": {"question": _SOUNDS, "answer": _SOUNDS},
}
REPORT = {
    "verdict": {
        "passed": TRUTH,
        "failures": [{"check": TEXT, "message": TEXT, "place": Maybe(TEXT), "limit": OrNull(TEXT)}],
    },
    "limits": {key: number() if key in AT_LEAST else number(0) for key in FIGURES},
    "looser_limits": [TEXT],
    "bundle": {
        **dict.fromkeys(("recipe", "target", "dtype", "fingerprint"), TEXT),
        "bytes": whole(),
        "bits_per_weight": number(0),
        "files": _FILES,
    },
    "source": {"id": TEXT, "revision": OrNull(TEXT), "files": Maybe(_FILES)},
    "material": {"kind": TEXT, "sequences": whole(1), "frames": whole(1), "file": Maybe(TEXT), "voices": Maybe([TEXT])},
    "arithmetic": TEXT,
    "structure": {"problems": [TEXT], "files": whole(), "tensors": whole()},
    "weights": [_WEIGHTS],
    "activations": [_ACTIVATIONS],
    "predictions": Each(_STREAM),
    "rollout": OrNull(_ROLLOUT),
    "round_trip": Maybe(_ROUND_TRIP),
    "ran_on": {
        **dict.fromkeys(("toolkit", "python", "system", "machine"), TEXT),
        "libraries": Each(TEXT),
        "device": {"mlx": TEXT},
    },
    "times": {"began": TEXT, "seconds": number(0)},
    "command": TEXT,
}
PREDICTED = {"predictions": dict.fromkeys(("text", "codebook_0", "agent"), _STREAM)}  # where anything was computed
