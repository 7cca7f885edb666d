"""The names of files in sources and bundles."""

WEIGHTS = "model.safetensors"
CODEC = "tokenizer-e351c8d8-checkpoint125.safetensors"
TOKENIZER = "tokenizer_spm_32k_3.model"
VOICES = "voices.tgz"
CONFIG = "config.json"
FILES = (WEIGHTS, CODEC, TOKENIZER, VOICES, CONFIG)  # of a source
INDEX = "model.safetensors.index.json"
MANIFEST = "manifest.json"
CARD = "README.md"
