"""The backbone: token embedding, MAHA blocks, final norm; what every model here stands on.

Positions are rotary and live inside attention, counted over a row's real tokens, so the models take
no position ids and padding may stand on either side.
"""

# ruff: noqa: RUF012 - transformers declares its class attributes without ClassVar.

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils.output_capturing import capture_outputs

from maha_attn.baselines.registry import build_attention
from maha_attn.layers.block import MahaBlock
from maha_attn.models.cache import MahaCache
from maha_attn.models.configuration import MahaConfig
from maha_attn.models.outputs import MahaModelOutput


class MahaLayer(GradientCheckpointingLayer, MahaBlock):
    """A block whose activations transformers can checkpoint."""


class MahaPreTrainedModel(PreTrainedModel):
    """Initial values, and what transformers may and may not do with these models."""

    config: MahaConfig
    config_class = MahaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["MahaLayer"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _can_record_outputs = {"hidden_states": MahaLayer}
    _is_stateful = True  # The cache cannot be cropped: assisted decoding is refused.
    _supports_context_parallel = False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Normal projections and embeddings; what else has parameters has values of its own."""
        reset = getattr(module, "reset_parameters", None)
        if reset is None or isinstance(module, nn.Linear | nn.Embedding):
            super()._init_weights(module)
            return
        loaded = [p for p in module.parameters() if getattr(p, "_is_hf_initialized", False)]
        values = [p.clone() for p in loaded]
        reset()
        for parameter, value in zip(loaded, values, strict=True):
            parameter.copy_(value)

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        """Initialise what no checkpoint filled.

        For classes outside its own package the library leaves out every module whose own parameters
        are all loaded, which holds for one that keeps them in its children, as the pyramid does.
        ``_init_weights`` protects loaded values itself, so nothing need be left out.
        """
        super()._initialize_weights(module, is_custom_code=False)


class MahaModel(MahaPreTrainedModel):
    """The backbone: token embedding, blocks, final norm.

    Args:
        config: ``config.causal`` decides whether tokens see later ones.
    """

    layer_class: ClassVar[type[MahaBlock]] = MahaLayer

    def __init__(self, config: MahaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            self.layer_class(
                config.attention_spec(layer_idx),
                attention=_attention(config, layer_idx),
                intermediate_size=config.intermediate_size,
                norm=config.norm,
                norm_eps=config.rms_norm_eps,
            )
            for layer_idx in range(config.num_hidden_layers)
        )
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: MahaCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_fusion_weights: bool = False,
        **kwargs: Any,
    ) -> MahaModelOutput:
        """Run the backbone.

        Args:
            input_ids: ``[B, N]`` integer token ids.
            inputs_embeds: ``[B, N, D]``, in place of ``input_ids``.
            attention_mask: ``[B, N]``, nonzero at real tokens, which may stand anywhere in a row.
                With a cache also ``[B, tokens seen + N]``, of which the last ``N`` count.
            past_key_values: A :class:`MahaCache` to continue (causal models).
            use_cache: Return a new cache if none is given. None: as ``config.use_cache`` says, in
                causal models outside training.
            output_fusion_weights: Return what weight each scale had.
            kwargs: ``output_hidden_states``, ``return_dict``; arguments of the loss pass through.

        Raises:
            TypeError, ValueError: An argument is not as above.
        """
        refuse(kwargs, self.config)
        hidden_states = self._embed(input_ids, inputs_embeds)
        cache = self._cache(past_key_values, use_cache)
        return self._run(hidden_states, attention_mask, cache, output_fusion_weights)

    def _run(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        cache: MahaCache | None,
        output_fusion_weights: bool,
        arguments: Sequence[tuple[Any, ...]] | None = None,
    ) -> MahaModelOutput:
        """Every layer and the final norm; ``arguments``: what each layer takes beside."""
        padding_mask = None
        if attention_mask is not None:
            seen = 0 if cache is None else cache.get_seq_length()
            padding_mask = _padding_mask(attention_mask, hidden_states, seen)
        fusion_weights = []
        for layer_idx, layer in enumerate(self.layers):
            output = layer(
                hidden_states,
                *(arguments[layer_idx] if arguments else ()),
                padding_mask=padding_mask,
                cache=None if cache is None else cache.layers[layer_idx],
                return_info=output_fusion_weights,
            )
            if output_fusion_weights:
                hidden_states, info = output
                fusion_weights.append(info.weights)
            else:
                hidden_states = output
        return MahaModelOutput(
            last_hidden_state=self.norm(hidden_states),
            past_key_values=cache,
            fusion_weights=tuple(fusion_weights) if output_fusion_weights else None,
        )

    def _embed(self, input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
        """The embedded tokens ``[B, N, D]``, whichever way they came."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if input_ids is not None:
            _check_ids(input_ids)
            return self.embed_tokens(input_ids)
        assert inputs_embeds is not None
        _check_embeds(inputs_embeds, self.config.hidden_size)
        return inputs_embeds

    def _cache(self, cache: Cache | None, use_cache: bool | None) -> MahaCache | None:
        """The cache to fill: the one given, a new one, or none."""
        if cache is None:
            if use_cache is None:
                possible = self.config.causal and not self.config.uncached_layer_types
                use_cache = self.config.use_cache and possible and not self.training
            if not use_cache:
                return None
            cache = MahaCache(self.config)
        if not isinstance(cache, MahaCache):
            raise TypeError(f"past_key_values must be a MahaCache, got {type(cache).__name__}")
        if not self.config.causal:
            raise ValueError("use_cache needs a causal model; this one sees later tokens")
        if self.training and any(layer.gradient_checkpointing for layer in self.layers):
            raise ValueError(
                "use_cache must be False while training with gradient checkpointing, which runs "
                "each layer twice; call model.eval() first to generate"
            )
        return cache


def _attention(config: MahaConfig, layer_idx: int) -> nn.Module:
    """The attention that ``config.layer_types`` chooses."""
    return build_attention(
        config.layer_type(layer_idx),
        config.attention_spec(layer_idx),
        max_length=config.max_position_embeddings,
        layer_idx=layer_idx,
    )


def refuse(kwargs: dict[str, Any], config: MahaConfig) -> None:
    """Say no to what would otherwise be ignored in silence."""
    if kwargs.get("output_attentions", config.output_attentions):
        raise ValueError(
            "output_attentions is not supported: no attention matrix is ever formed; "
            "output_fusion_weights=True returns the weight of every scale"
        )
    if kwargs.get("position_ids") is not None:
        raise ValueError(
            "position_ids is not supported: positions count the tokens that attention_mask marks"
        )


def _check_ids(input_ids: Tensor) -> None:
    if input_ids.is_floating_point() or input_ids.dtype == torch.bool:
        raise TypeError(f"input_ids must hold integer token ids, got {input_ids.dtype}")
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(
            f"input_ids must have shape [B, N] with N at least 1, got {list(input_ids.shape)}"
        )


def _check_embeds(inputs_embeds: Tensor, width: int) -> None:
    shape = list(inputs_embeds.shape)
    if len(shape) != 3 or shape[1] == 0 or shape[2] != width:
        raise ValueError(
            f"inputs_embeds must have shape [B, N, {width}] with N at least 1, got {shape}"
        )
    if not inputs_embeds.is_floating_point():
        raise TypeError(f"inputs_embeds must be floating point, got {inputs_embeds.dtype}")


def _padding_mask(attention_mask: Tensor, embedded: Tensor, seen: int) -> Tensor:
    """The chunk's boolean mask ``[B, N]`` out of one that may cover the tokens seen before."""
    batch, length = embedded.shape[:2]
    expected = [[batch, length], [batch, seen + length]]
    if list(attention_mask.shape) not in expected:
        raise ValueError(
            f"attention_mask must have shape {' or '.join(str(e) for e in expected)} "
            f"(nonzero = real token), got {list(attention_mask.shape)}"
        )
    return attention_mask[:, -length:] != 0
