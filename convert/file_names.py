"""The names of files in sources and bundles."""

import re

WEIGHTS = "model.safetensors"
CODEC = "tokenizer-e351c8d8-checkpoint125.safetensors"
TOKENIZER = "tokenizer_spm_32k_3.model"
VOICES = "voices.tgz"
CONFIG = "config.json"
FILES = (WEIGHTS, CODEC, TOKENIZER, VOICES, CONFIG)  # of a source
INDEX = "model.safetensors.index.json"
MANIFEST = "manifest.json"
CARD = "README.md"
NOTICE = "NOTICE"
_PART = re.compile(r"[^./\\*?\[\]~\s][^/\\*?\[\]]*")  # of a path; not hidden, and no pattern of the Hub's client


def is_plain(name: str) -> bool:
    """Tell whether the name of a file, from others, stays in its folder and can mean this file only."""
    return name.isprintable() and all(_PART.fullmatch(part) for part in name.split("/"))
