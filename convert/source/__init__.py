"""What is converted: the checkpoint, adapters, voices, the codec, the Hub."""
