"""From a source checkpoint to a bundle: names, plan, stream, voices, Hub. Never runs a model."""
