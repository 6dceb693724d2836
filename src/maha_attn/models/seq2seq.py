"""Sequence to sequence: a bidirectional MAHA encoder, a causal MAHA decoder that attends to it."""

# ruff: noqa: RUF012 - transformers declares its class attributes without ClassVar.

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutput
from transformers.utils.generic import can_return_tuple
from transformers.utils.output_capturing import capture_outputs

from maha_attn.layers.block import MahaCrossBlock
from maha_attn.models.backbone import MahaModel, MahaPreTrainedModel, refuse
from maha_attn.models.cache import MahaCache
from maha_attn.models.configuration import MahaSeq2SeqConfig
from maha_attn.models.generation import MahaGenerationMixin
from maha_attn.models.language_modeling import predict
from maha_attn.models.outputs import MahaModelOutput, MahaSeq2SeqLMOutput, MahaSeq2SeqModelOutput


class MahaDecoderLayer(GradientCheckpointingLayer, MahaCrossBlock):
    """A block that attends to the encoder, whose keys and values it keeps while decoding."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        hidden_states: Tensor,
        memory: Tensor,
        memory_mask: Tensor | None = None,
        past: EncoderDecoderCache | None = None,
        layer_idx: int = 0,
        **kwargs: Any,
    ) -> Any:
        """As `MahaCrossBlock.forward`; ``memory`` is not read again once ``past`` is filled."""
        if past is not None and past.is_updated.get(layer_idx):
            kept: Any = past.cross_attention_cache.layers[layer_idx]
            keys, values = kept.keys, kept.values
        else:
            keys, values = self.cross_attention.project(memory)
            if past is not None:
                past.cross_attention_cache.update(keys, values, layer_idx)
                past.is_updated[layer_idx] = True
        return super().forward(hidden_states, keys, values, memory_mask, **kwargs)


class MahaDecoder(MahaModel):
    """A causal backbone whose blocks also attend to an encoder's output."""

    layer_class = MahaDecoderLayer
    _no_split_modules = ["MahaDecoderLayer"]
    _can_record_outputs = {"hidden_states": MahaDecoderLayer}

    @capture_outputs
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_fusion_weights: bool = False,
        **kwargs: Any,
    ) -> MahaModelOutput:
        """As :meth:`MahaModel.forward`, with an encoder's output.

        Args:
            encoder_hidden_states: ``[B, M, D]``.
            encoder_attention_mask: ``[B, M]``, nonzero at real tokens. A row without any attends to
                zeros.
            past_key_values: An ``EncoderDecoderCache`` of a :class:`MahaCache` and the cache of the
                encoder's keys and values.
        """
        refuse(kwargs, self.config)
        hidden_states = self._embed(input_ids, inputs_embeds)
        memory, memory_mask = self._memory(encoder_hidden_states, encoder_attention_mask)
        if past_key_values is not None and not isinstance(past_key_values, EncoderDecoderCache):
            raise TypeError(
                "past_key_values must be an EncoderDecoderCache, got "
                f"{type(past_key_values).__name__}"
            )
        given = None if past_key_values is None else past_key_values.self_attention_cache
        cache = self._cache(given, use_cache)
        if cache is not None and past_key_values is None:
            past_key_values = EncoderDecoderCache(cache, DynamicCache())
        arguments = [(memory, memory_mask, past_key_values, i) for i in range(len(self.layers))]
        output = self._run(hidden_states, attention_mask, cache, output_fusion_weights, arguments)
        output.past_key_values = past_key_values
        return output

    def _memory(
        self, hidden_states: Tensor | None, attention_mask: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The encoder's output, zero at padding, and what of it may be seen."""
        if hidden_states is None:
            raise ValueError("encoder_hidden_states must be given: the decoder attends to them")
        if attention_mask is None:
            return hidden_states, None
        if attention_mask.shape != hidden_states.shape[:2]:
            raise ValueError(
                f"attention_mask of the encoder must have shape {list(hidden_states.shape[:2])} "
                f"(nonzero = real token), got {list(attention_mask.shape)}"
            )
        real = attention_mask != 0
        memory = torch.where(real[..., None], hidden_states, 0)
        return memory, real | ~real.any(1, keepdim=True)


class MahaSeq2SeqPreTrainedModel(MahaPreTrainedModel):
    """What differs from the models of one backbone."""

    config: MahaSeq2SeqConfig  # pyright: ignore[reportIncompatibleVariableOverride]
    config_class = MahaSeq2SeqConfig
    _no_split_modules = ["MahaLayer", "MahaDecoderLayer"]
    _can_record_outputs = {}

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Resize the encoder's embedding, and with it or beside it the decoder's."""
        resized = super().resize_token_embeddings(*args, **kwargs)
        if not self.config.tie_word_embeddings:
            self.get_decoder().resize_token_embeddings(*args, **kwargs)
        return resized


class MahaSeq2SeqModel(MahaSeq2SeqPreTrainedModel):
    """Encoder and decoder.

    Args:
        config: Of both.
    """

    _tied_weights_keys = {"decoder.embed_tokens.weight": "encoder.embed_tokens.weight"}

    def __init__(self, config: MahaSeq2SeqConfig) -> None:
        super().__init__(config)
        self.encoder = MahaModel(config.encoder_config())
        self.decoder = MahaDecoder(config.decoder_config())
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The encoder's."""
        return self.encoder.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the encoder's."""
        self.encoder.set_input_embeddings(value)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[Tensor, ...] | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_fusion_weights: bool = False,
        **kwargs: Any,
    ) -> MahaSeq2SeqModelOutput:
        """Read, then write.

        Args:
            input_ids: ``[B, M]`` token ids for the encoder.
            inputs_embeds: ``[B, M, D]`` in their place.
            attention_mask: ``[B, M]``, nonzero at the encoder's real tokens, wherever they stand.
            encoder_outputs: What the encoder returned for them, to read only once.
            decoder_input_ids: ``[B, N]`` token ids for the decoder.
            decoder_inputs_embeds: ``[B, N, D]`` in their place.
            decoder_attention_mask: ``[B, N]``, or with a cache ``[B, tokens seen + N]``.
            past_key_values: An ``EncoderDecoderCache`` to continue.
            use_cache: Return a new cache if none is given.
            output_fusion_weights: Return what weight each scale had.
            kwargs: ``output_hidden_states``, ``return_dict``; arguments of the loss pass through.

        Raises:
            TypeError, ValueError: An argument is not as above.
        """
        if (decoder_input_ids is None) == (decoder_inputs_embeds is None):
            raise ValueError("give exactly one of decoder_input_ids and decoder_inputs_embeds")
        encoded: Any = encoder_outputs
        if encoded is None:
            encoded = self.encoder(
                input_ids=input_ids,
                attention_mask=attention_mask,
                inputs_embeds=inputs_embeds,
                output_fusion_weights=output_fusion_weights,
                **kwargs,
            )
        memory = encoded[0]
        outputs = self.decoder(
            input_ids=decoder_input_ids,
            attention_mask=decoder_attention_mask,
            encoder_hidden_states=memory,
            encoder_attention_mask=attention_mask,
            past_key_values=past_key_values,
            inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            output_fusion_weights=output_fusion_weights,
            **kwargs,
        )
        return MahaSeq2SeqModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.past_key_values,
            decoder_hidden_states=outputs.hidden_states,
            encoder_last_hidden_state=memory,
            encoder_hidden_states=getattr(encoded, "hidden_states", None),
            decoder_fusion_weights=outputs.fusion_weights,
            encoder_fusion_weights=getattr(encoded, "fusion_weights", None),
        )


class MahaForSeq2SeqLM(MahaSeq2SeqPreTrainedModel, MahaGenerationMixin):
    """A sequence-to-sequence language model: encoder, decoder, projection onto the vocabulary.

    Args:
        config: Of all of it.
    """

    _tied_weights_keys = {"lm_head.weight": "model.encoder.embed_tokens.weight"}

    def __init__(self, config: MahaSeq2SeqConfig) -> None:
        super().__init__(config)
        self.model = MahaSeq2SeqModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_type = "ForMaskedLM"  # Labels are not shifted: the decoder's inputs are.
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: BaseModelOutput | tuple[Tensor, ...] | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_fusion_weights: bool = False,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MahaSeq2SeqLMOutput:
        """Predict each token of a text from those before it and from another text.

        ``labels`` ``[B, N]`` are that text's tokens, -100 where nothing is to be predicted; without
        ``decoder_input_ids`` the decoder reads them, shifted by one. The loss is a mean over
        labels, or with ``num_items_in_batch`` their sum divided by it. Everything else is as in
        :meth:`MahaSeq2SeqModel.forward` and :meth:`MahaForCausalLM.forward`.
        """
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            encoder_outputs=encoder_outputs,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            decoder_inputs_embeds=decoder_inputs_embeds,
            use_cache=use_cache,
            output_fusion_weights=output_fusion_weights,
            **kwargs,
        )
        loss, logits = predict(self, outputs.last_hidden_state, labels, logits_to_keep, **kwargs)
        taken = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return MahaSeq2SeqLMOutput(loss=loss, logits=logits, **taken)

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """The decoder's inputs: the labels one place later, behind the start token.

        Raises:
            ValueError: The configuration has no ``decoder_start_token_id`` or no ``pad_token_id``.
        """
        config = self.config
        for name in ("decoder_start_token_id", "pad_token_id"):
            if getattr(config, name) is None:
                raise ValueError(f"{name} of the configuration must be set to train from labels")
        start = torch.full_like(labels[:, :1], config.decoder_start_token_id)
        shifted = torch.cat((start, labels[:, :-1]), 1)
        return shifted.masked_fill(shifted == -100, config.pad_token_id)

    def new_cache(self, capacity: int = 0) -> EncoderDecoderCache:
        """An empty cache for this model."""
        cache = MahaCache(self.model.decoder.config, capacity)
        return EncoderDecoderCache(cache, DynamicCache())
