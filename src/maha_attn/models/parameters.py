"""How many parameters a model has, and models of equal size by their feed-forward's width."""

import copy

import torch
from transformers import PreTrainedModel

from maha_attn.models.configuration import MahaConfig
from maha_attn.models.language_modeling import MahaForCausalLM


def count_parameters(
    config: MahaConfig, model_class: type[PreTrainedModel] = MahaForCausalLM
) -> int:
    """Parameters of a model, shared ones counted once; none is allocated."""
    with torch.device("meta"):
        return model_class(copy.deepcopy(config)).num_parameters()


def matched_intermediate_size(
    config: MahaConfig, parameters: int, model_class: type[PreTrainedModel] = MahaForCausalLM
) -> int:
    """The feed-forward's width at which a model has as close to ``parameters`` as it can.

    The count is affine in the width, ``3·D`` (and 2 biases) a layer and unit: within half of that
    of ``parameters``.

    Args:
        config: The model; its own ``intermediate_size`` does not matter.
        parameters: Of the model to match, by `count_parameters`.
        model_class: What is made of both configurations.

    Raises:
        ValueError: The model is larger even with a feed-forward of width 1.
    """
    config = copy.deepcopy(config)
    counts = []
    for config.intermediate_size in (1, 2):
        counts.append(count_parameters(config, model_class))
    least, step = counts[0], counts[1] - counts[0]
    if least > parameters + step // 2:
        raise ValueError(
            f"parameters must be at least {least:,}, the model's with a feed-forward of width 1, "
            f"got {parameters:,}; choose a smaller hidden_size or max_position_embeddings"
        )
    return 1 + round((parameters - least) / step)
