"""BigBird (Zaheer et al., arXiv 2007.14062): transformers' block-sparse attention."""

import numpy as np
import torch.nn.functional as F
from torch import Tensor
from transformers.models.big_bird.configuration_big_bird import BigBirdConfig
from transformers.models.big_bird.modeling_big_bird import (
    BigBirdBlockSparseAttention,
    BigBirdModel,
)

from maha_attn.baselines.interface import (
    BaselineAttention,
    RotaryProjection,
    pad_to_multiple,
    projection,
)
from maha_attn.spec import AttentionSpec

RANDOM_BLOCKS = 3
"""The library's default."""


class BigBird(BaselineAttention):
    """Each block of ``w/2`` queries sees its own and both neighbours, the ends, and random blocks.

    The first and the last block see everything. Random blocks are the library's: drawn in training,
    the same at every step and others in every layer; in evaluation all of them are the first block.
    As in BigBird's own model, rows are padded to whole blocks, and up to 11 blocks all is visible.
    Whether asked for or not, the library also scatters all weights into an ``N × N`` matrix, so its
    memory is quadratic where the paper's is linear.
    """

    def __init__(self, spec: AttentionSpec, *, max_length: int, layer_idx: int) -> None:
        super().__init__(spec)
        self.block = max(spec.window // 2, 1)
        config = BigBirdConfig(
            hidden_size=spec.hidden_size,
            num_attention_heads=spec.num_heads,
            block_size=self.block,
            num_random_blocks=RANDOM_BLOCKS,
            max_position_embeddings=max(max_length, 4096),
            use_bias=spec.bias,
        )
        self.library = BigBirdBlockSparseAttention(config, seed=layer_idx)
        self.library.query, self.library.key = RotaryProjection(spec), RotaryProjection(spec)
        self.out_proj = projection(spec)

    def attend(self, x: Tensor, real: Tensor | None) -> Tensor:
        """As `BaselineAttention.attend`."""
        length = x.shape[1]
        if self._is_full(length):
            return self.out_proj(self._full(x, real))
        x, real = pad_to_multiple(x, real, self.block)
        masks = BigBirdModel.create_masks_for_block_sparse_attn(real.to(x.dtype), self.block)
        blocked, band, rows, columns = masks
        state = np.random.get_state()  # noqa: NPY002 - which the library seeds anew at each call.
        try:
            y, _ = self.library(x, band, rows, columns, blocked, blocked)
        finally:
            np.random.set_state(state)  # noqa: NPY002
        return self.out_proj(y[:, :length])

    def _is_full(self, length: int) -> bool:
        return length <= (5 + 2 * RANDOM_BLOCKS) * self.block

    def _full(self, x: Tensor, real: Tensor | None) -> Tensor:
        heads = (self.spec.num_heads, self.spec.head_dim)
        q, k, v = (
            project(x).unflatten(-1, heads).transpose(1, 2)
            for project in (self.library.query, self.library.key, self.library.value)
        )
        mask = None if real is None else real[:, None, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)

    def attention_flops(self, length: int) -> int:
        """``4·D`` per pair of the blocks that meet, ``n = ⌈N/block⌉`` of them in a row.

        Two rows of ``n`` blocks, two of ``4 + random``, the others of ``5 + random``.
        """
        n = -(-length // self.block)
        meetings = 2 * n + 2 * (4 + RANDOM_BLOCKS) + (n - 4) * (5 + RANDOM_BLOCKS)
        pairs = length**2 if self._is_full(length) else meetings * self.block**2
        return 4 * self.spec.hidden_size * pairs
