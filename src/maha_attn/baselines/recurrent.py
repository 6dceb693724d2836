"""Causal layers with a state of fixed size: transformers' Mamba-2 and gated DeltaNet.

Kernels run where their packages are installed (mamba-ssm, flash-linear-attention), else the
library's PyTorch code. Neither needs positions: both convolve.
"""

import torch
from torch import Tensor
from transformers.models.mamba2.configuration_mamba2 import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from maha_attn.baselines.interface import BaselineAttention
from maha_attn.spec import AttentionSpec


class Mamba2(BaselineAttention):
    """Mamba-2 (Dao and Gu, arXiv 2405.21060): twice the width inside, states of 128."""

    def __init__(self, spec: AttentionSpec, *, max_length: int, layer_idx: int) -> None:
        super().__init__(spec)
        config = Mamba2Config(
            hidden_size=spec.hidden_size,
            num_heads=2 * spec.num_heads,
            head_dim=spec.head_dim,
            n_groups=1,
            use_bias=spec.bias,
            num_hidden_layers=1,
        )
        self.library = Mamba2Mixer(config, layer_idx=0)

    def attend(self, x: Tensor, real: Tensor | None) -> Tensor:
        """As `BaselineAttention.attend`; padding lies in the future."""
        return self.library(x)

    def reset_parameters(self) -> None:
        """The library's values of the state's decay, step and skip."""
        self.library.init_mamba2_weights()

    def attention_flops(self, length: int) -> int:
        """Of the state-space dual form in chunks of ``c``, states ``n``, inner width ``2·D``.

        Per token ``2·c·n`` and ``2·c`` per channel within a chunk, ``2·n`` and ``2·n`` per channel
        into and out of the states (section 6 of the paper).
        """
        c, n = self.library.chunk_size, self.library.ssm_state_size
        return length * (2 * c * n + 2 * self.spec.hidden_size * (2 * c + 4 * n))


class GatedDeltaNet(BaselineAttention):
    """Gated DeltaNet (Yang et al., arXiv 2412.06464) as in Qwen3-Next: a state ``K × K`` a head."""

    def __init__(self, spec: AttentionSpec, *, max_length: int, layer_idx: int) -> None:
        super().__init__(spec)
        config = Qwen3NextConfig(
            hidden_size=spec.hidden_size,
            linear_num_key_heads=spec.num_heads,
            linear_num_value_heads=spec.num_heads,
            linear_key_head_dim=spec.head_dim,
            linear_value_head_dim=spec.head_dim,
            num_hidden_layers=1,
        )
        self.library = Qwen3NextGatedDeltaNet(config, layer_idx=0)

    def attend(self, x: Tensor, real: Tensor | None) -> Tensor:
        """As `BaselineAttention.attend`; padding lies in the future."""
        return self.library(x)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The library's values of the step and the decay."""
        self.library.dt_bias.fill_(1.0)
        self.library.A_log.uniform_(0.01, 16).log_()

    def attention_flops(self, length: int) -> int:
        """In chunks of ``c = 64``, per token and channel: ``8·c`` within, ``6·K`` with the state.

        Within: keys with keys, queries with keys, two triangular systems (``c`` each, half of a
        product), weights with values. With the state: read twice, written once.
        """
        return length * self.spec.hidden_size * (8 * 64 + 6 * self.spec.head_dim)
