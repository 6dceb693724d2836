"""The language models: the backbone and a projection onto the vocabulary, causal or masked.

Their parameters have the same names and shapes, so each loads the other's checkpoint.
"""

# ruff: noqa: RUF012 - transformers declares its class attributes without ClassVar.

import copy
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel
from transformers.utils.generic import can_return_tuple

from maha_attn.models.backbone import MahaModel, MahaPreTrainedModel
from maha_attn.models.cache import MahaCache
from maha_attn.models.configuration import MahaConfig
from maha_attn.models.generation import MahaGenerationMixin
from maha_attn.models.outputs import MahaLMOutput
from maha_attn.ops.cross_entropy import IGNORED, linear_cross_entropy


class MahaLanguageModel(MahaPreTrainedModel):
    """What both language models are; which tokens see each other belongs to the class."""

    causal: ClassVar[bool]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MahaConfig) -> None:
        config = copy.deepcopy(config)
        config.causal = self.causal
        super().__init__(config)
        self.model = MahaModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: MahaCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_fusion_weights: bool = False,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MahaLMOutput:
        """Predict tokens: the next ones, or in a masked model those at their own place.

        ``labels`` ``[B, N]`` are the true token ids where each stands (a causal model shifts them
        itself), -100 where nothing is to be predicted. The loss is a mean over labels, or with
        ``num_items_in_batch`` their sum divided by it. ``logits_to_keep`` limits the logits to the
        last so many positions (0: all), or to those in a tensor. Everything else is as in
        :meth:`MahaModel.forward`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_fusion_weights=output_fusion_weights,
            **kwargs,
        )
        loss, logits = predict(self, outputs.last_hidden_state, labels, logits_to_keep, **kwargs)
        return MahaLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            fusion_weights=outputs.fusion_weights,
        )


class MahaForCausalLM(MahaLanguageModel, MahaGenerationMixin):
    """A language model: predicts each token from those before it.

    Args:
        config: Its ``causal`` is taken to be True.
    """

    causal = True

    def new_cache(self, capacity: int = 0) -> MahaCache:
        """An empty cache for this model."""
        return MahaCache(self.config, capacity)


class MahaForMaskedLM(MahaLanguageModel):
    """A masked language model: predicts tokens from both sides.

    Args:
        config: Its ``causal`` is taken to be False.
    """

    causal = False


def predict(
    model: PreTrainedModel,
    hidden_states: Tensor,
    labels: Tensor | None,
    logits_to_keep: int | Tensor,
    **kwargs: Any,
) -> tuple[Tensor | None, Tensor | None]:
    """Loss and logits of a model with an ``lm_head``, as its ``forward`` describes them.

    While training with ``config.loss_chunk`` there are no logits, and the loss never holds more
    than so many rows of them.
    """
    if labels is not None and model.training and model.config.loss_chunk is not None:
        if model.loss_type == "ForCausalLM":
            labels = pad(labels[:, 1:], (0, 1), value=IGNORED)
        total, count = linear_cross_entropy(
            hidden_states, model.lm_head.weight, labels, model.config.loss_chunk
        )
        shared = kwargs.get("num_items_in_batch")
        return total / (count if shared is None else shared), None
    keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    logits = model.lm_head(hidden_states[:, keep])
    if labels is None:
        return None, logits
    # The library flattens labels by view, which a slice does not allow.
    loss = model.loss_function(logits, labels.contiguous(), model.config.vocab_size, **kwargs)
    return loss, logits
