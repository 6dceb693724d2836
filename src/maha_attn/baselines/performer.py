"""Performer (Choromanski et al., arXiv 2009.14794): performer-pytorch's attention."""

import contextlib
import io
import warnings

import torch
from torch import Tensor

from maha_attn.baselines.interface import BaselineAttention, RotaryProjection, projection
from maha_attn.spec import AttentionSpec

with warnings.catch_warnings():  # It compares versions by distutils.
    warnings.simplefilter("ignore", DeprecationWarning)
    from performer_pytorch import SelfAttention


class Performer(BaselineAttention):
    """Linear attention over positive random features that estimate the softmax (FAVOR+).

    ``O = φ(Q) (φ(K)ᵀ V)``, normalised, with ``K ln K`` features. They are drawn once: the library
    draws them anew in its whole model only. The causal form without the library's CUDA extension
    keeps a ``K × K ln K`` state of every token of a chunk of 128.
    """

    relu_features = False

    def __init__(self, spec: AttentionSpec, *, max_length: int, layer_idx: int) -> None:
        super().__init__(spec)
        # On the CPU, whatever the context: the features come out of a QR decomposition there.
        # Printed: that the CUDA extension is missing.
        with torch.device("cpu"), contextlib.redirect_stdout(io.StringIO()):
            self.library = SelfAttention(
                spec.hidden_size,
                heads=spec.num_heads,
                dim_head=spec.head_dim,
                causal=spec.causal,
                generalized_attention=self.relu_features,
            )
        self.library.to_q, self.library.to_k = RotaryProjection(spec), RotaryProjection(spec)
        self.library.to_v, self.library.to_out = projection(spec), projection(spec)

    def attend(self, x: Tensor, real: Tensor | None) -> Tensor:
        """As `BaselineAttention.attend`."""
        return self.library(x, mask=real)

    def attention_flops(self, length: int) -> int | None:
        """Bidirectional, ``m`` features: ``8·D·N·m``, two passes through features and two sums.

        And ``2·H·N·m`` for the normaliser.
        """
        if self.spec.causal:
            return None
        features = int(self.library.fast_attention.nb_features)
        return length * features * (8 * self.spec.hidden_size + 2 * self.spec.num_heads)


class ReluPerformer(Performer):
    """Performer with ReLU features (``relu(ωᵀx) + ε``): no estimate of the softmax, but no leak."""

    relu_features = True
