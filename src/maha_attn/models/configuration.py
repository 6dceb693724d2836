"""Configuration of the models: AttentionSpec's options, flat, beside Hugging Face's own."""

from dataclasses import field, fields, make_dataclass
from difflib import get_close_matches
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from maha_attn.baselines.registry import ATTENTIONS, layer_spec
from maha_attn.spec import AttentionSpec

_OPTIONS = [f for f in fields(AttentionSpec) if f.name not in ("hidden_size", "num_heads")]
# Typed Any, so that the values reach AttentionSpec and its own messages come back.
_AttentionOptions = make_dataclass(
    "_AttentionOptions",
    [(f.name, Any, field(default=f.default)) for f in _OPTIONS],
    kw_only=True,
)
_STORED_AS = {"temperature": "fusion_temperature", "layer_types": "attention_layer_types"}


@strict
class MahaConfig(PreTrainedConfig, _AttentionOptions):
    """What a MAHA model is: the size of its backbone and the options of its attention.

    Every option of :class:`~maha_attn.AttentionSpec` is an option here, with the same name and
    default (``num_heads`` is also called ``num_attention_heads``). Beside them:

    Args:
        vocab_size: Tokens in the vocabulary.
        hidden_size: Width ``D``.
        intermediate_size: Inner width of the feed-forward part (SwiGLU).
        num_hidden_layers: Blocks.
        num_attention_heads: Heads ``H`` of every attention layer.
        layer_types: Per layer a name of `maha_attn.baselines.ATTENTIONS`: ``maha``, ``full`` (full
            attention), ``sliding`` (a sliding window of ``window`` tokens), or a baseline; None
            means ``maha`` everywhere. All share everything but the attention.
        norm: ``pre``: normalise before attention and feed-forward; ``post``: after each residual.
        rms_norm_eps: Added to the mean square in the normalisations.
        max_position_embeddings: Longest sequence meant for the model. Tokenizers and evaluation
            harnesses read it; positions are rotary, so nothing in the model ends there, but for
            the baselines that have a length (`Attention.any_length`).
        initializer_range: Standard deviation of new projections and embeddings.
        tie_word_embeddings: Share the input embedding with the output projection.
        loss_chunk: Compute the loss of training this many tokens at a time, and return no logits
            with it: for vocabularies whose logits do not fit the memory. None: all at once.
        use_cache: Return a decoding cache outside training (causal models).
        classifier_pooling: What a sequence classifier sees: the ``mean`` of the real tokens, the
            ``first`` or the ``last`` of them; None means ``last`` in a causal model, ``mean`` in a
            bidirectional one.

    ``causal`` belongs to the class of the language models: :class:`MahaForCausalLM` sets it,
    :class:`MahaForMaskedLM` clears it. A bare :class:`MahaModel`, a classifier and a question
    answerer follow the configuration.

    Raises:
        TypeError, ValueError: AttentionSpec's own; a size is below 1; ``layer_types`` does not fit;
            an unknown option is spelt much like a known one.
    """

    model_type = "maha"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {"num_heads": "num_attention_heads"}

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    layer_types: list[str] | None = None
    norm: Literal["pre", "post"] = "pre"
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    loss_chunk: int | None = None
    use_cache: bool = True
    classifier_pooling: Literal["mean", "first", "last"] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name, stored in _STORED_AS.items():
            setattr(self, name, kwargs.pop(stored, getattr(self, name)))
        for name in kwargs:  # transformers keeps whatever it is given as an attribute.
            close = get_close_matches(name, self.__dataclass_fields__, 1, cutoff=0.88)
            if close and not hasattr(type(self), name):
                raise ValueError(f"unknown option {name!r}; did you mean {close[0]!r}?")
        super().__post_init__(**kwargs)
        for name in ("vocab_size", "intermediate_size", "num_hidden_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.loss_chunk is not None and self.loss_chunk < 1:
            raise ValueError(f"loss_chunk must be at least 1, got {self.loss_chunk}")
        self.validate_layer_type()
        for layer_idx in range(self.num_hidden_layers):
            self.attention_spec(layer_idx)

    def attention_spec(self, layer_idx: int) -> AttentionSpec:
        """The attention of one layer."""
        spec = AttentionSpec(
            hidden_size=self.hidden_size,
            num_heads=self.num_attention_heads,
            **{f.name: getattr(self, f.name) for f in _OPTIONS},
        )
        return layer_spec(self.layer_type(layer_idx), spec)

    def layer_type(self, layer_idx: int) -> str:
        """The name of one layer's attention."""
        return "maha" if self.layer_types is None else self.layer_types[layer_idx]

    @property
    def uncached_layer_types(self) -> list[str]:
        """The layers' attentions that have no decoding cache."""
        return [name for name in self.layer_types or [] if not ATTENTIONS[name].cache]

    def validate_layer_type(self) -> None:
        """Check ``layer_types`` (the base class knows other names)."""
        if self.layer_types is None:
            return
        unknown = set(self.layer_types) - set(ATTENTIONS)
        if unknown:
            raise ValueError(
                f"layer_types must hold one of {', '.join(ATTENTIONS)} for each layer, got "
                f"{', '.join(map(repr, sorted(unknown)))}"
            )
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types must hold a name for each of the {self.num_hidden_layers} layers "
                f"(num_hidden_layers), got {len(self.layer_types)}: {self.layer_types}"
            )

    def to_dict(self) -> dict[str, Any]:
        """The options as a dictionary, two of them under names of their own.

        transformers reads a ``temperature`` that it finds in a model's dictionary or file as the
        sampling temperature of ``generate``, and refuses ``layer_types`` that it does not know
        where it reads a file without knowing the model (the Trainer, when it resumes).
        """
        output = super().to_dict()
        for name, stored in _STORED_AS.items():
            output[stored] = output.pop(name)
        return output

    def _get_generation_parameters(self) -> dict[str, Any]:
        """Settings of ``generate`` found here; ``temperature`` is none (see ``to_dict``)."""
        parameters = super()._get_generation_parameters()
        parameters.pop("temperature", None)
        return parameters


@strict
class MahaSeq2SeqConfig(MahaConfig):
    """A bidirectional MAHA encoder and a causal MAHA decoder that attends to it.

    Every option of :class:`MahaConfig` holds for both; ``causal`` means nothing here. Beside them:

    Args:
        num_hidden_layers: Blocks of the encoder.
        num_decoder_layers: Blocks of the decoder; None means as many as the encoder has.
        layer_types: Of the encoder.
        decoder_layer_types: As ``layer_types``, of the decoder.
        tie_word_embeddings: One matrix for both input embeddings and the output projection; else
            three.
        decoder_start_token_id: First input of the decoder, often that of padding.

    Raises:
        TypeError, ValueError: As :class:`MahaConfig`, for either half.
    """

    model_type = "maha-seq2seq"

    is_encoder_decoder: bool = True
    num_decoder_layers: int | None = None
    decoder_layer_types: list[str] | None = None
    decoder_start_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.num_decoder_layers is None:
            self.num_decoder_layers = self.num_hidden_layers
        self.encoder_config()
        try:
            self.decoder_config()
        except ValueError as error:
            message = f"in the decoder (num_decoder_layers, decoder_layer_types): {error}"
            raise ValueError(message) from None

    def encoder_config(self) -> MahaConfig:
        """The bidirectional backbone that reads."""
        return self._half(causal=False)

    def decoder_config(self) -> MahaConfig:
        """The causal backbone that writes."""
        return self._half(
            causal=True,
            num_hidden_layers=self.num_decoder_layers,
            layer_types=self.decoder_layer_types,
        )

    def _half(self, **options: Any) -> MahaConfig:
        shared = {f.name: getattr(self, f.name) for f in fields(MahaConfig) if f.init}
        return MahaConfig(**(shared | {"is_encoder_decoder": False} | options))
