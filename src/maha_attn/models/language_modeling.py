"""The language models: the backbone and a projection onto the vocabulary, causal or masked."""

# ruff: noqa: RUF012 - transformers declares its class attributes without ClassVar.

import copy
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast, MaskedLMOutput
from transformers.utils.generic import can_return_tuple

from maha_attn.models.backbone import MahaModel, MahaPreTrainedModel
from maha_attn.models.cache import MahaCache
from maha_attn.models.configuration import MahaConfig


@dataclass
class MahaCausalLMOutput(CausalLMOutputWithPast):
    """``fusion_weights`` as in `MahaModelOutput`."""

    fusion_weights: tuple[Tensor, ...] | None = None


@dataclass
class MahaMaskedLMOutput(MaskedLMOutput):
    """``fusion_weights`` as in `MahaModelOutput`."""

    fusion_weights: tuple[Tensor, ...] | None = None


class MahaForCausalLM(MahaPreTrainedModel, GenerationMixin):
    """A language model: the causal backbone and a projection onto the vocabulary.

    Args:
        config: Its ``causal`` is taken to be True.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MahaConfig) -> None:
        super().__init__(_with_causal(config, True))
        self.model = MahaModel(self.config)
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
    ) -> MahaCausalLMOutput:
        """Predict each token from those before it.

        ``labels`` ``[B, N]`` are the token ids themselves, not shifted; -100 is ignored. The loss
        is a mean over labels, or with ``num_items_in_batch`` their sum divided by it.
        ``logits_to_keep`` limits the logits to the last so many positions (0: all), or to those in
        a tensor. Everything else is as in :meth:`MahaModel.forward`.
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
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return MahaCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            fusion_weights=outputs.fusion_weights,
        )

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Give ``generate`` a MahaCache; the base class checks one that the caller gave."""
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                "cache_implementation must be None: MAHA has one cache of its own, got "
                f"{generation_config.cache_implementation!r}"
            )
        if generation_config.is_assistant:
            raise ValueError("a MAHA model cannot be an assistant model: its cache does not rewind")
        cache = model_kwargs.get("past_key_values")
        if cache is not None and not generation_config.use_cache:
            raise ValueError("use_cache must be True to continue from past_key_values")
        if cache is None and generation_config.use_cache:
            model_kwargs["past_key_values"] = MahaCache(self.config)
            return None
        base: Any = super()
        return base._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)


class MahaForMaskedLM(MahaPreTrainedModel):
    """A masked language model: the bidirectional backbone and a projection onto the vocabulary.

    Its parameters have the names and shapes of :class:`MahaForCausalLM`'s, so each loads the
    other's checkpoint.

    Args:
        config: Its ``causal`` is taken to be False.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MahaConfig) -> None:
        super().__init__(_with_causal(config, False))
        self.model = MahaModel(self.config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_fusion_weights: bool = False,
        **kwargs: Any,
    ) -> MahaMaskedLMOutput:
        """Predict tokens from both sides.

        ``labels`` ``[B, N]`` are the true token ids at masked positions, -100 elsewhere. The loss
        is a mean over labels, or with ``num_items_in_batch`` their sum divided by it. Everything
        else is as in :meth:`MahaModel.forward`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            output_fusion_weights=output_fusion_weights,
            **kwargs,
        )
        logits = self.lm_head(outputs.last_hidden_state)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        return MahaMaskedLMOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            fusion_weights=outputs.fusion_weights,
        )


def _with_causal(config: MahaConfig, causal: bool) -> MahaConfig:
    """A copy of ``config`` for a class that decides about causality itself."""
    config = copy.deepcopy(config)
    config.causal = causal
    return config
