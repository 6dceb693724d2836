"""What an attention layer is: every option in one frozen object, and all of their validation.

Letters (docs/formulation.md): ``D`` hidden_size, ``H`` num_heads, ``K = D/H`` head_dim,
``S`` num_scales, ``r`` ratio; scale ``s = 0 … S-1`` has stride ``r^s``, 0 is the finest.
"""

from dataclasses import dataclass, fields
from typing import Literal, get_args

Preset = Literal["linear", "paper", "window"]
Downsample = Literal["conv", "dense_conv", "max", "mean"]
Queries = Literal["coarse", "fine"]
Fusion = Literal["mean", "static", "gate", "convex", "nash"]
Granularity = Literal["token", "sequence"]
Constraint = Literal["simplex", "capped"]
Target = Literal["value", "learned", "finest", "none"]
Prior = Literal["none", "static", "gate"]
Backend = Literal["auto", "torch", "triton"]

MAX_SCALES = 8
"""The fusion solver's limit; at ratio 2 the eighth scale already sums up 128 tokens."""


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """The options of one multiscale attention layer.

    Args:
        hidden_size: Width ``D`` of the tokens; a multiple of ``num_heads``.
        num_heads: Heads ``H``. The head width ``D/H`` is even (rotary embedding).
        num_scales: Scales ``S`` of the pyramid, 1 to 8. One scale is plain attention.
        ratio: Compression ``r`` from one scale to the next, at least 2.
        window: Tokens of a scale that a query sees where the scale is windowed. Causal: the last
            ``window`` of them, itself included; bidirectional: ``window/2`` to either side.
        preset: ``linear``: windows, the coarsest scale full; ``paper``: every scale full (paper
            Eq. 9); ``window``: every scale windowed (with one scale: a sliding window).
        downsample: ``conv`` (depthwise), ``dense_conv``, ``max``, ``mean`` (formulation §1).
        kernel_size: Taps of the two convolutions, at least ``ratio``; None means ``ratio + 1``.
        queries: ``coarse``: the queries of a scale are its own tokens (paper); ``fine``: every
            token queries every scale.
        fusion: ``convex`` (paper Eq. 7), ``nash`` (Eq. 8), or the baselines ``mean``, ``static``,
            ``gate`` (formulation §4).
        causal: No output depends on a later token.
        granularity: One weight vector per token and head, or (bidirectional only) per ``sequence``.
        constraint: Feasible set of ``convex``: weights on the ``simplex``, or ``capped`` (sum ≤ 1).
        target: What ``convex`` reconstructs: the token's own ``value``, a ``learned`` projection of
            it, the ``finest`` scale's output, or ``none``.
        prior: Linear term of ``convex``: ``none``, ``static`` per head, or a ``gate`` of the token.
        prior_init: Start of the finest scale's prior (``convex``) or logit (``static``, ``gate``);
            the other scales start at 0, so that a new layer begins as a sliding window.
        ridge: ``ρ > 0`` of the fusion problem.
        sparsity: ``λ ≥ 0``, the price of a weight in ``nash`` and in ``convex`` over ``capped``.
        temperature: ``τ ≥ 0``, the entropy term of ``convex``; 0 gives exact zeros.
        learned_gram: Learn the Gram matrix's scale ``γ ≥ 0`` per head (``convex``); else ``γ = 1``.
        rope_theta: Base of the rotary embedding.
        bias: Biases in the projections.
        gating: Cross-scale gating (paper IV-D).
        dilation: Dilation of a convolution before each scale's attention (paper IV-D); 0: none.
        recompute: Rebuild the coarse scales in the backward pass instead of keeping them: less
            memory in training, for the time of computing them once more.
        backend: ``auto`` takes kernels where they run, ``torch`` composed operators, ``triton``
            kernels or an error.

    Options of another fusion than the chosen one are accepted and unused, so that an ablation
    changes one option at a time.

    Raises:
        TypeError: An option has the wrong type.
        ValueError: An option has no such value, or two options contradict each other.
    """

    hidden_size: int
    num_heads: int
    num_scales: int = 4
    ratio: int = 2
    window: int = 128
    preset: Preset = "linear"
    downsample: Downsample = "conv"
    kernel_size: int | None = None
    queries: Queries = "coarse"
    fusion: Fusion = "convex"
    causal: bool = True
    granularity: Granularity = "token"
    constraint: Constraint = "simplex"
    target: Target = "value"
    prior: Prior = "gate"
    prior_init: float = 3.0
    ridge: float = 1e-2
    sparsity: float = 0.0
    temperature: float = 1.0
    learned_gram: bool = True
    rope_theta: float = 10000.0
    bias: bool = False
    gating: bool = False
    dilation: int = 0
    recompute: bool = False
    backend: Backend = "auto"

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, _typed(field.name, getattr(self, field.name)))
        for name, minimum in _MINIMUM.items():
            value = getattr(self, name)
            if value is not None and not value >= minimum:
                raise ValueError(f"{name} must be at least {minimum}, got {value}")
        for name in ("ridge", "rope_theta"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be greater than 0, got {getattr(self, name)}")
        if self.num_scales > MAX_SCALES:
            raise ValueError(f"num_scales must be at most {MAX_SCALES}, got {self.num_scales}")
        if self.hidden_size % self.num_heads:
            raise ValueError(
                f"hidden_size must be a multiple of num_heads, got hidden_size={self.hidden_size} "
                f"and num_heads={self.num_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(
                f"hidden_size / num_heads must be even for the rotary embedding, got "
                f"{self.hidden_size} / {self.num_heads} = {self.head_dim}"
            )
        if self.kernel_size is not None and self.kernel_size < self.ratio:
            raise ValueError(
                f"kernel_size must be at least ratio, or tokens are skipped; got "
                f"kernel_size={self.kernel_size} and ratio={self.ratio}"
            )
        if self.granularity == "sequence" and self.causal:
            raise ValueError(
                "granularity='sequence' needs causal=False: weights averaged over the sequence "
                "would let every token see the future; use granularity='token'"
            )
        if self.fusion == "convex" and self.constraint == "simplex" and self.sparsity > 0:
            raise ValueError(
                f"sparsity must be 0 when constraint='simplex', got {self.sparsity}: the weights "
                "sum to 1 there, so the penalty is a constant; use constraint='capped'"
            )

    @property
    def head_dim(self) -> int:
        """``K = D/H``."""
        return self.hidden_size // self.num_heads

    @property
    def taps(self) -> int:
        """Tokens of the finer scale that one coarse token is made of."""
        if self.downsample in ("max", "mean"):
            return self.ratio
        return self.ratio + 1 if self.kernel_size is None else self.kernel_size

    @property
    def strides(self) -> tuple[int, ...]:
        """``r^s`` for every scale."""
        return tuple(self.ratio**s for s in range(self.num_scales))

    @property
    def spans(self) -> tuple[int | None, ...]:
        """Per scale its window in tokens of that scale; None where it is full."""
        if self.preset == "paper":
            return (None,) * self.num_scales
        coarsest = None if self.preset == "linear" else self.window
        return (self.window,) * (self.num_scales - 1) + (coarsest,)


_MINIMUM = {
    "hidden_size": 1,
    "num_heads": 1,
    "num_scales": 1,
    "ratio": 2,
    "window": 1,
    "kernel_size": 1,
    "dilation": 0,
    "sparsity": 0,
    "temperature": 0,
}
_TYPES = {field.name: field.type for field in fields(AttentionSpec)}


def _typed(name: str, value: object) -> object:
    """Return ``value`` as the field's type, or say what was expected."""
    kind = _TYPES[name]
    if choices := get_args(kind) if get_args(kind) and type(None) not in get_args(kind) else ():
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}; got {value!r}")
        return value
    if kind is bool:
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be True or False, got {value!r}")
        return value
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float:
        if not is_number or value != value or value in (float("inf"), float("-inf")):
            raise TypeError(f"{name} must be a finite number, got {value!r}")
        return float(value)  # pyright: ignore[reportArgumentType]
    if value is None and kind is not int:
        return None
    if not is_number or isinstance(value, float):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    return value
