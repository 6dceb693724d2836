"""Every attention by its name: who computes it, and what it can and cannot do.

The properties are what the tests of ``tests/baselines`` find, in both directions: one that is wrong
fails there. Tables print them, and `build_attention` refuses what they exclude; nothing is worked
around. Importing this module imports no library.
"""

import importlib
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from maha_attn.spec import AttentionSpec

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Attention:
    """One kind of attention layer.

    Attributes:
        module: Where its class is, ``module:class``.
        source: Who computes it.
        causal: It has a causal form, in which no output depends on a later token.
        bidirectional: It has a form in which every output depends on tokens of both sides.
        padding: What padding does to bidirectional rows of one batch. ``exact``: a padded row
            equals the row alone; ``masked``: padding is not attended to, but its length moves
            blocks; ``counted``: it acts as tokens do, and the layer refuses it. (Causal rows are
            always exact: padding lies in their future.)
        any_length: Rows of every length; else up to the length that the layer was made for.
        bf16: Forward and backward run in bfloat16, weights and activations.
        autocast: They run with fp32 weights under bfloat16 autocast, as the Trainer's ``bf16``.
        deterministic: Two passes over the same tokens agree bitwise, in training and evaluation.
        cache: It decodes from a cache.
        needs_gpu: It runs on a CUDA device alone.
        one_way: Why there is one direction only.
        note: What a reader of a table should know beside.
    """

    module: str
    source: str
    causal: bool = True
    bidirectional: bool = True
    padding: Literal["exact", "masked", "counted"] = "exact"
    any_length: bool = True
    bf16: bool = True
    autocast: bool = True
    deterministic: bool = True
    cache: bool = False
    needs_gpu: bool = False
    one_way: str = ""
    note: str = ""

    def load(self) -> Any:
        """Import the class.

        Raises:
            ModuleNotFoundError: Its library is not installed; the message says what to install.
        """
        module, name = self.module.split(":")
        try:
            return getattr(importlib.import_module(module), name)
        except ModuleNotFoundError as error:
            package = "flash-linear-attention" if error.name == "fla" else "maha-attn[baselines]"
            raise ModuleNotFoundError(
                f"{error.name} is not installed; pip install '{package}'", name=error.name
            ) from error

    def properties(self) -> str:
        """What it cannot do, for a table; empty where it can do everything."""
        limits = {
            "not causal": not self.causal,
            "causal only": not self.bidirectional,
            "padding moves blocks": self.padding == "masked",
            "no padding": self.padding == "counted",
            "length fixed when made": not self.any_length,
            "no bf16": not self.bf16,
            "no autocast": not self.autocast,
            "random": not self.deterministic,
            "no cache": self.causal and not self.cache,
            "GPU only": self.needs_gpu,
        }
        return ", ".join(limit for limit, holds in limits.items() if holds)


_OURS = {"module": "maha_attn.layers.attention:MultiscaleAttention", "cache": True}

ATTENTIONS: dict[str, Attention] = {
    "maha": Attention(source="maha-attn", **_OURS),
    "full": Attention(
        source="maha-attn, one full scale",
        note="PyTorch's scaled_dot_product_attention without kernels",
        **_OURS,
    ),
    "sliding": Attention(source="maha-attn, its finest scale alone", **_OURS),
    "sdpa": Attention(
        module="maha_attn.baselines.full:SdpaAttention",
        source="PyTorch scaled_dot_product_attention",
        note="full attention; by cuDNN, else flash, on a GPU",
    ),
    "materialised": Attention(
        module="maha_attn.baselines.full:MaterialisedAttention",
        source="own code",
        note="full attention that forms its N × N matrices",
    ),
    "longformer": Attention(
        module="maha_attn.baselines.longformer:Longformer",
        source="transformers LongformerSelfAttention",
        causal=False,
        one_way="its window reaches to both sides",
        note="padded to a multiple of the window",
    ),
    "bigbird": Attention(
        module="maha_attn.baselines.bigbird:BigBird",
        source="transformers BigBirdBlockSparseAttention",
        causal=False,
        padding="masked",
        one_way="its blocks are seen whole, in the library's decoder too",
        autocast=False,
        note="padded to whole blocks; full up to 11 blocks; random blocks in training only; the "
        "library fills an N × N matrix of weights beside",
    ),
    "reformer": Attention(
        module="maha_attn.baselines.reformer:Reformer",
        source="transformers LSHSelfAttention",
        causal=False,
        padding="masked",
        deterministic=False,
        one_way="the library's leaks: later tokens move earlier ones between chunks",
        note="padded to whole chunks",
    ),
    "performer": Attention(
        module="maha_attn.baselines.performer:Performer",
        source="performer-pytorch, softmax features",
        causal=False,
        padding="counted",
        one_way="the library's leaks: its features are scaled by a maximum over all positions",
    ),
    "performer_relu": Attention(
        module="maha_attn.baselines.performer:ReluPerformer",
        source="performer-pytorch, ReLU features",
        padding="counted",
        note="no estimate of the softmax",
    ),
    "linformer": Attention(
        module="maha_attn.baselines.linformer:Linformer",
        source="linformer",
        causal=False,
        any_length=False,
        one_way="every projected key is a sum over all positions",
        note="parameters grow with the length",
    ),
    "mamba2": Attention(
        module="maha_attn.baselines.recurrent:Mamba2",
        source="transformers Mamba2Mixer",
        bidirectional=False,
        one_way="it is a recurrence",
    ),
    "gated_deltanet": Attention(
        module="maha_attn.baselines.recurrent:GatedDeltaNet",
        source="transformers Qwen3NextGatedDeltaNet",
        bidirectional=False,
        one_way="it is a recurrence",
    ),
    "native_sparse": Attention(
        module="maha_attn.baselines.native_sparse:NativeSparseAttention",
        source="flash-linear-attention, window by maha-attn",
        bidirectional=False,
        one_way="the kernels are causal",
        needs_gpu=True,
        note="heads a multiple of 16",
    ),
}


def layer_spec(name: str, spec: AttentionSpec) -> AttentionSpec:
    """The options of a layer ``name``: ``full`` and ``sliding`` are MAHA's layer with one scale."""
    if name == "full":
        return replace(spec, num_scales=1, preset="paper")
    if name == "sliding":
        return replace(spec, num_scales=1, preset="window")
    return spec


def obstacle(name: str, *, causal: bool) -> str | None:
    """Why the attention ``name`` has no form of this direction; None where it has one."""
    attention = ATTENTIONS[name]
    if attention.causal if causal else attention.bidirectional:
        return None
    return f"{name} has no {'causal' if causal else 'bidirectional'} form: {attention.one_way}"


def build_attention(
    name: str, spec: AttentionSpec, *, max_length: int, layer_idx: int = 0
) -> "nn.Module":
    """Make an attention layer with the interface of `MultiscaleAttention`.

    Args:
        name: A key of `ATTENTIONS`.
        spec: The options; a baseline reads those that it has a meaning for.
        max_length: Longest row meant for the layer.
        layer_idx: Place in the model: what is drawn once differs from layer to layer.

    Raises:
        ModuleNotFoundError: Its library is not installed.
        ValueError: There is no such attention, or it lacks the direction that ``spec`` asks for.
    """
    if name not in ATTENTIONS:
        raise ValueError(f"attention must be one of {', '.join(ATTENTIONS)}; got {name!r}")
    if reason := obstacle(name, causal=spec.causal):
        able = [n for n in ATTENTIONS if obstacle(n, causal=spec.causal) is None]
        raise ValueError(f"{reason}; choose one of {', '.join(able)}")
    attention = ATTENTIONS[name]
    spec = layer_spec(name, spec)
    if attention.cache:
        return attention.load()(spec)
    layer = attention.load()(spec, max_length=max_length, layer_idx=layer_idx)
    layer.registered = attention
    layer.reset_parameters()
    return layer
