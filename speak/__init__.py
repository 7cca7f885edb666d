"""A bundle in conversation: language model, sampling, codec, microphone. Never changes weights."""
