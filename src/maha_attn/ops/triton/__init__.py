"""Triton kernels behind the signatures of `maha_attn.ops`; imported only where they run."""
