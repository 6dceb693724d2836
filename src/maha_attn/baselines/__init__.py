"""The attentions that MAHA is compared with, behind the interface of `MultiscaleAttention`."""

from maha_attn.baselines.registry import ATTENTIONS, Attention, build_attention, obstacle

__all__ = ["ATTENTIONS", "Attention", "build_attention", "obstacle"]
