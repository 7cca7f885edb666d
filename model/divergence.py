"""The Kullback-Leibler divergence of predictions, which verification, sensitivities and fine-tuning all go by."""

from torch import Tensor


def kl_divergence(actual: Tensor, expected: Tensor) -> Tensor:
    """Return KL(expected || actual) of log-probabilities ``[..., vocabulary]``, in nats, for each row ``[...]``.

    In the dtype of its arguments: reports take float64; sensitivities and fine-tuning float32, which is what fits into
    memory for them. Rounding can leave it a little below zero.
    """
    return (expected.exp() * (expected - actual)).sum(-1)
