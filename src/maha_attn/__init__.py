"""Multiscale Aggregated Hierarchical Attention (arXiv 2512.14925): well posed, causal, measured."""

from importlib.metadata import version

from maha_attn.layers.attention import FusionInfo, MultiscaleAttention
from maha_attn.layers.block import MahaBlock
from maha_attn.layers.cache import AttentionCache
from maha_attn.spec import AttentionSpec

__all__ = ["AttentionCache", "AttentionSpec", "FusionInfo", "MahaBlock", "MultiscaleAttention"]
__version__ = version("maha-attn")
