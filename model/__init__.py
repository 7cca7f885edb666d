"""What PersonaPlex computes: the PyTorch reference, the MLX model, sessions. Gives no verdicts."""
