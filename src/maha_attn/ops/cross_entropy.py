"""Cross-entropy of a projection onto the vocabulary, some tokens at a time."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, linear
from torch.utils.checkpoint import checkpoint

IGNORED = -100
"""The label of a token that is not to be predicted."""


def linear_cross_entropy(
    hidden_states: Tensor, weight: Tensor, labels: Tensor, chunk: int
) -> tuple[Tensor, Tensor]:
    """``-Σ_t log softmax(W h_t)[y_t]`` over the tokens that have a label.

    At most ``chunk`` rows of logits exist at a time, forward and backward, where the plain loss
    keeps ``T × V`` of them twice. The value and the gradients are those of the plain loss, up to
    the order of summation. Tokens without a label cost nothing.

    Args:
        hidden_states: ``h``, ``[..., D]``.
        weight: ``W``, ``[V, D]``.
        labels: ``y``, integers ``[...]``; ``-100`` is no label.
        chunk: Tokens at a time.

    Returns:
        The sum, fp32 at least, and the number of labels.

    Numerics: logits in the dtype of ``hidden_states`` (or autocast's), softmax in fp32. Cost: the
    logits are computed once more in the backward pass.
    """
    labelled = labels != IGNORED
    hidden_states, labels = hidden_states[labelled], labels[labelled]
    total = hidden_states.new_zeros((), dtype=torch.promote_types(weight.dtype, torch.float32))
    for rows, targets in zip(hidden_states.split(chunk), labels.split(chunk), strict=True):
        part = checkpoint(
            _chunk_loss, rows, weight, targets, use_reentrant=False, preserve_rng_state=False
        )
        total = total + part
    return total, labelled.sum()


def _chunk_loss(rows: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """The sum over one chunk."""
    logits = linear(rows, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return cross_entropy(logits, targets, reduction="sum")
