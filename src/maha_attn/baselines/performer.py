"""Performer (Choromanski et al., arXiv 2009.14794): performer-pytorch's attention."""

import contextlib
import io
import math
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
        self.num_features = int(spec.head_dim * math.log(spec.head_dim))
        # On the CPU, whatever the context: the features come out of a QR decomposition there.
        # Printed: that the CUDA extension is missing.
        with torch.device("cpu"), contextlib.redirect_stdout(io.StringIO()):
            self.library = SelfAttention(
                spec.hidden_size,
                heads=spec.num_heads,
                dim_head=spec.head_dim,
                causal=spec.causal,
                nb_features=self.num_features,
                generalized_attention=self.relu_features,
            )
        self.library.to_q, self.library.to_k = RotaryProjection(spec), RotaryProjection(spec)
        self.library.to_v, self.library.to_out = projection(spec), projection(spec)

    def attend(self, x: Tensor, real: Tensor | None) -> Tensor:
        """As `BaselineAttention.attend`."""
        return self.library(x, mask=real)

    def attention_flops(self, length: int) -> int:
        """``8·D·N·m``, ``m`` features: ``φ(Q)``, ``φ(K)``, sums of ``φ(K)ᵀ V``, ``φ(Q)`` on them.

        Outer products and running sums of the causal form are as many. And ``2·H·N·m`` for the
        normaliser.
        """
        per_feature = 8 * self.spec.hidden_size + 2 * self.spec.num_heads
        return length * self.num_features * per_feature


class ReluPerformer(Performer):
    """Performer with ReLU features (``relu(ωᵀx) + ε``): no estimate of the softmax, but no leak."""

    relu_features = True
