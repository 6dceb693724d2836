"""MAHA models in Hugging Face form. Importing this package registers them with the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

from maha_attn.models.backbone import MahaModel
from maha_attn.models.cache import MahaCache
from maha_attn.models.configuration import MahaConfig
from maha_attn.models.language_modeling import MahaForCausalLM, MahaForMaskedLM

AutoConfig.register("maha", MahaConfig, exist_ok=True)
AutoModel.register(MahaConfig, MahaModel, exist_ok=True)
AutoModelForCausalLM.register(MahaConfig, MahaForCausalLM, exist_ok=True)
AutoModelForMaskedLM.register(MahaConfig, MahaForMaskedLM, exist_ok=True)

__all__ = ["MahaCache", "MahaConfig", "MahaForCausalLM", "MahaForMaskedLM", "MahaModel"]
