"""What the models return: transformers' outputs, and on request what weight every scale had.

``fusion_weights`` holds per layer ``[B, H, N, S]`` (``S = 1``: all ones).
"""

from dataclasses import dataclass

from torch import Tensor
from transformers.modeling_outputs import (
    BaseModelOutputWithPast,
    CausalLMOutputWithPast,
    QuestionAnsweringModelOutput,
    Seq2SeqLMOutput,
    Seq2SeqModelOutput,
    SequenceClassifierOutput,
)


@dataclass
class MahaModelOutput(BaseModelOutputWithPast):
    """Of the backbone."""

    fusion_weights: tuple[Tensor, ...] | None = None


@dataclass
class MahaLMOutput(CausalLMOutputWithPast):
    """Of the language models, causal and masked."""

    fusion_weights: tuple[Tensor, ...] | None = None


@dataclass
class MahaSequenceClassifierOutput(SequenceClassifierOutput):
    """Of sequence classification."""

    fusion_weights: tuple[Tensor, ...] | None = None


@dataclass
class MahaQuestionAnsweringOutput(QuestionAnsweringModelOutput):
    """Of question answering."""

    fusion_weights: tuple[Tensor, ...] | None = None


@dataclass
class MahaSeq2SeqModelOutput(Seq2SeqModelOutput):
    """Of encoder and decoder."""

    decoder_fusion_weights: tuple[Tensor, ...] | None = None
    encoder_fusion_weights: tuple[Tensor, ...] | None = None


@dataclass
class MahaSeq2SeqLMOutput(Seq2SeqLMOutput):
    """Of the sequence-to-sequence language model."""

    decoder_fusion_weights: tuple[Tensor, ...] | None = None
    encoder_fusion_weights: tuple[Tensor, ...] | None = None
