"""Does a trained model look ahead? A perplexity means something only if it does not."""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedModel

from maha_attn.baselines import ATTENTIONS
from maha_attn.models import MahaConfig

ROUNDING = 2
"""By so many units in the last place of the largest logit other people's kernels may differ: their
sums run over blocks that hold later tokens too, times zero."""


class LeakError(ValueError):
    """A causal model's output depends on later tokens."""


@torch.inference_mode()
def check_causal(model: PreTrainedModel, windows: NDArray[np.int64], bf16: bool = False) -> None:
    """Change every token of the later half; no logit of the earlier half may change.

    The halves meet inside a block of every scale, whatever the ratio, so that a block that is seen
    before it is complete is found; likewise at the first token and at the last. Layers of our own
    must agree bitwise, since each output is computed from its own past alone; layers of libraries
    within `ROUNDING`.

    Args:
        model: A causal language model, on the device and in the dtype in which it is evaluated.
        windows: Rows of tokens ``[R, N]``, ``N ≥ 4``.
        bf16: Run the model under bf16 autocast.

    Raises:
        LeakError: A logit changed.
        ValueError: A logit is not finite.
    """
    config = model.config
    assert isinstance(config, MahaConfig)
    exact = all(ATTENTIONS[config.layer_type(i)].cache for i in range(config.num_hidden_layers))
    tokens = torch.from_numpy(windows).to(model.device)
    length = tokens.shape[1]

    def logits(tokens: Tensor) -> Tensor:
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16):
            return model.eval()(input_ids=tokens, use_cache=False).logits

    known = logits(tokens)
    if not known.isfinite().all():
        raise ValueError(
            "the model's logits are not finite: its training diverged; it has no perplexity"
        )
    allowed = 0.0
    if not exact:
        allowed = ROUNDING * torch.finfo(known.dtype).eps * known.abs().max().item()
    for cut in sorted({1, max(length // 2 - 3, 2), length - 1}):
        changed = tokens.clone()
        changed[:, cut:] = (changed[:, cut:] + config.vocab_size // 2) % config.vocab_size
        off = (logits(changed)[:, :cut] - known[:, :cut]).abs().max().item()
        if not off <= allowed:  # Also where it is no number.
            raise LeakError(
                f"the model looks ahead: other tokens from place {cut} of {length} on change "
                f"earlier logits by up to {off:.2g} (allowed: {allowed:.2g}); it has no perplexity"
            )
