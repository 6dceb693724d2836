"""MAHA models in Hugging Face form. Importing this package registers them with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
)

from maha_attn.models.backbone import MahaModel
from maha_attn.models.cache import MahaCache
from maha_attn.models.classification import MahaForSequenceClassification
from maha_attn.models.configuration import MahaConfig, MahaSeq2SeqConfig
from maha_attn.models.language_modeling import MahaForCausalLM, MahaForMaskedLM
from maha_attn.models.question_answering import MahaForQuestionAnswering
from maha_attn.models.seq2seq import MahaForSeq2SeqLM, MahaSeq2SeqModel

for _config in (MahaConfig, MahaSeq2SeqConfig):
    AutoConfig.register(_config.model_type, _config, exist_ok=True)
for _auto, _model in (
    (AutoModel, MahaModel),
    (AutoModel, MahaSeq2SeqModel),
    (AutoModelForCausalLM, MahaForCausalLM),
    (AutoModelForMaskedLM, MahaForMaskedLM),
    (AutoModelForSequenceClassification, MahaForSequenceClassification),
    (AutoModelForQuestionAnswering, MahaForQuestionAnswering),
    (AutoModelForSeq2SeqLM, MahaForSeq2SeqLM),
):
    _auto.register(_model.config_class, _model, exist_ok=True)

__all__ = [
    "MahaCache",
    "MahaConfig",
    "MahaForCausalLM",
    "MahaForMaskedLM",
    "MahaForQuestionAnswering",
    "MahaForSeq2SeqLM",
    "MahaForSequenceClassification",
    "MahaModel",
    "MahaSeq2SeqConfig",
    "MahaSeq2SeqModel",
]
