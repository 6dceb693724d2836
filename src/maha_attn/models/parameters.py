"""How many parameters a model has, and models of equal size by their feed-forward's width."""

import copy

import torch
from transformers import PreTrainedModel

from maha_attn.models.configuration import MahaConfig
from maha_attn.models.language_modeling import MahaForCausalLM

MULTIPLE = 8
"""Of a feed-forward's width, so that matrix products are fast."""


def count_parameters(
    config: MahaConfig, model_class: type[PreTrainedModel] = MahaForCausalLM
) -> int:
    """Parameters of a model, shared ones counted once; none is allocated."""
    with torch.device("meta"):
        return model_class(copy.deepcopy(config)).num_parameters()


def matched_intermediate_size(
    config: MahaConfig,
    parameters: int,
    model_class: type[PreTrainedModel] = MahaForCausalLM,
    *,
    within: float,
) -> int:
    """The feed-forward's width, a multiple of 8, that comes closest to a number of parameters.

    The count is affine in the width, ``3·D`` (and 2 biases) a layer and unit.

    Args:
        config: The model; its own ``intermediate_size`` does not matter.
        parameters: Of the model to match, by `count_parameters`.
        model_class: What is made of both configurations.
        within: The largest share by which the result may be off.

    Raises:
        ValueError: No width comes as close.
    """
    config = copy.deepcopy(config)
    counts = []
    for config.intermediate_size in (MULTIPLE, 2 * MULTIPLE):
        counts.append(count_parameters(config, model_class))
    least, step = counts[0], counts[1] - counts[0]
    more = max(0, round((parameters - least) / step))
    width, found = MULTIPLE * (1 + more), least + more * step
    if abs(found - parameters) > within * parameters:
        raise ValueError(
            f"no feed-forward's width gives {parameters:,} parameters within {within:.0%}: the "
            f"closest, {width}, gives {found:,}; choose a wider one for the reference, or a "
            "smaller hidden_size or max_position_embeddings"
        )
    return width
