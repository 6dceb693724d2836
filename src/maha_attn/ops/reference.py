"""Slow twins of the operations, in the paper's order: one row, no padding, loops, any dtype.

Imported by tests alone. Each function follows the definition in docs/formulation.md word for word
and shares no code with the operation that it checks; run it in fp64. Gradients come from autograd
through the loops, and through the final linear system of the fusion problem.
"""

from typing import Any

import torch
from torch import Tensor

from maha_attn.ops.reference_qp import solve_qp_by_enumeration


def downsample(
    x: Tensor, weight: Tensor | None, *, ratio: int, method: str, causal: bool
) -> Tensor:
    """``[n, D]`` to the next scale, token by token (§1)."""
    length = x.shape[0]
    coarse = length // ratio if causal else -(-length // ratio)
    tokens = []
    for j in range(coarse):
        block = x[ratio * j : ratio * (j + 1)]
        if method == "mean":
            tokens.append(block.mean(0))
        elif method == "max":
            tokens.append(block.amax(0))
        else:
            assert weight is not None
            taps = weight.shape[0] if method == "conv" else weight.shape[2]
            token = torch.zeros_like(x[0])
            for i in range(taps):
                t = ratio * j + ratio - taps + i
                if 0 <= t < length:
                    token = token + (
                        weight[i] * x[t] if method == "conv" else weight[:, :, i] @ x[t]
                    )
            tokens.append(token)
    return torch.stack(tokens) if tokens else x[:0]


def attend(
    q: Tensor, k: Tensor, v: Tensor, *, stride: int, window: int | None, causal: bool
) -> Tensor:
    """Queries ``[n, K]`` over keys ``[n_k, K]``, visible by definition (§2)."""
    rows = []
    for i in range(q.shape[0]):
        last = (i + 1) // stride - 1 if causal else i // stride
        visible = [
            j
            for j in range(k.shape[0])
            if (j <= last if causal else True)
            and (window is None or (last - j < window if causal else abs(last - j) <= window / 2))
        ]
        if visible:
            scores = k[visible] @ q[i] / q.shape[1] ** 0.5
            rows.append(scores.softmax(0) @ v[visible])
        else:
            rows.append(torch.zeros_like(v[0]) if len(v) else q.new_zeros(q.shape[1]))
    return torch.stack(rows)


def upsample(y: Tensor, *, stride: int, length: int, causal: bool) -> list[Tensor | None]:
    """Per token its block of ``y`` ``[n_s, C]``, or None before the first complete one (§3)."""
    blocks = [(t + 1) // stride - 1 if causal else t // stride for t in range(length)]
    return [y[j] if j >= 0 else None for j in blocks]


def convex_weights(
    matrix: Tensor, linear: Tensor, *, constraint: str, temperature: float
) -> Tensor:
    """``argmin ½wᵀMw - qᵀw + τ Σ w log w`` for one problem (§4)."""
    if temperature > 0:
        return _entropic(matrix, linear, constraint, temperature)
    return solve_qp_by_enumeration(matrix, linear, constraint)


def _entropic(matrix: Tensor, linear: Tensor, constraint: str, temperature: float) -> Tensor:
    """Fixed point ``w = softmax((q - Mw)/τ)`` by damped iteration: slow and plain."""
    damping = temperature / (temperature + float(torch.linalg.matrix_norm(matrix.detach(), 2)))
    log_w = torch.full_like(linear, 1.0).log_softmax(0)
    for _ in range(int(36 / damping)):
        proposed = (linear - matrix @ log_w.exp()) / temperature - 1
        log_w = (1 - damping) * log_w + damping * proposed
        excess = log_w.logsumexp(0)
        if constraint == "simplex" or excess > 0:
            log_w = log_w - excess
    return log_w.exp()


def fusion_weights(
    outputs: list[Tensor],
    *,
    method: str,
    logits: Tensor | None,
    target: Tensor | None,
    gram_scale: Tensor | float,
    ridge: float,
    sparsity: float,
    temperature: float,
    constraint: str,
) -> Tensor:
    """Weights of one token and head over its available ``u_s`` ``[K]`` (§4)."""
    u = torch.stack(outputs)
    if method == "mean":
        return torch.full((len(u),), 1 / len(u), dtype=u.dtype)
    if method in ("static", "gate"):
        assert logits is not None
        return logits.softmax(0)
    gram = u @ u.T / u.shape[1] ** 0.5
    identity = torch.eye(len(u), dtype=u.dtype)
    if method == "nash":
        linear = gram.diagonal() - sparsity
        return convex_weights(gram + ridge * identity, linear, constraint="box", temperature=0)
    linear = torch.full((len(u),), -sparsity, dtype=u.dtype)
    if target is not None:
        linear = linear + u @ target / u.shape[1] ** 0.5
    if logits is not None:
        linear = linear + logits
    matrix = gram_scale * gram + ridge * identity
    return convex_weights(matrix, linear, constraint=constraint, temperature=temperature)


def rotate(x: Tensor, positions: list[float], theta: float) -> Tensor:
    """Rotary embedding of ``x`` ``[n, K]``: pairs ``(i, i + K/2)`` as complex numbers."""
    half = x.shape[1] // 2
    rows = []
    for row, p in zip(x, positions, strict=True):
        angles = torch.tensor(
            [p * theta ** (-2 * i / x.shape[1]) for i in range(half)], dtype=x.dtype
        )
        turned = torch.complex(row[:half], row[half:]) * torch.polar(
            torch.ones_like(angles), angles
        )
        rows.append(torch.cat((turned.real, turned.imag)))
    return torch.stack(rows)


def layer(module: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """The whole layer for one row ``[n, D]`` with the weights of a `MultiscaleAttention`.

    Returns:
        ``y`` ``[n, D]`` and the fusion weights ``[n, H, S]``.
    """
    spec, p = module.spec, dict(module.named_parameters())
    length, heads, width = len(x), spec.num_heads, spec.head_dim

    def linear(name: str, t: Tensor) -> Tensor:
        y = t @ p[f"{name}.weight"].T
        return y + p[f"{name}.bias"] if f"{name}.bias" in p else y

    def pyramid(t: Tensor) -> list[Tensor]:
        scales = [t]
        for s in range(spec.num_scales - 1):
            weight = p.get(f"pyramid.down.{s}")
            scales.append(
                downsample(
                    scales[-1], weight, ratio=spec.ratio, method=spec.downsample, causal=spec.causal
                )
            )
        return [t for t in scales if len(t)]

    scales, values = pyramid(x), pyramid(linear("v_proj", x))
    features = list(scales)
    if spec.gating:
        for s in range(len(scales) - 1):
            gates = linear(f"pyramid.gates.{s}", scales[s + 1]).sigmoid()
            blocks = upsample(gates, stride=spec.ratio, length=len(scales[s]), causal=spec.causal)
            rows = [row if g is None else g * row for g, row in zip(blocks, scales[s], strict=True)]
            features[s] = torch.stack(rows)
    if spec.dilation:
        features = [
            _dilated(f, p[f"pyramid.dilated.{s}"], spec.dilation, spec.causal)
            for s, f in enumerate(features)
        ]
    upsampled = []
    for s, feature in enumerate(features):
        fine = spec.queries == "fine" and s > 0
        stride = spec.ratio**s
        q = linear(f"q_proj.{s}", features[0] if fine else feature)
        k = linear(f"k_proj.{s}", feature)
        rows = range(len(q))
        q_positions = [(t + 1) / stride - 1 for t in rows] if fine else [float(t) for t in rows]
        k_positions = [float(t) for t in range(len(k))]
        per_head = []
        for h in range(heads):
            part = slice(h * width, (h + 1) * width)
            o = attend(
                rotate(q[:, part], q_positions, spec.rope_theta),
                rotate(k[:, part], k_positions, spec.rope_theta),
                values[s][:, part],
                stride=stride if fine else 1,
                window=spec.spans[s],
                causal=spec.causal,
            )
            if fine:
                seen = upsample(values[s], stride=stride, length=length, causal=spec.causal)
                per_head.append([None if seen[t] is None else o[t] for t in range(length)])
            else:
                per_head.append(upsample(o, stride=stride, length=length, causal=spec.causal))
        upsampled.append(per_head)
    logits = p.get("fusion.logits")
    gate = (
        linear("fusion.gate_proj", x).reshape(length, heads, -1)
        if "fusion.gate_proj.weight" in p
        else None
    )
    target = linear("fusion.target_proj", x) if "fusion.target_proj.weight" in p else values[0]
    fused, weights = [], torch.zeros(length, heads, spec.num_scales, dtype=x.dtype)
    for t in range(length):
        row = []
        for h in range(heads):
            there = [s for s in range(len(scales)) if upsampled[s][h][t] is not None]
            u = [upsampled[s][h][t] for s in there]
            prior = (
                None
                if logits is None
                else logits[h, there] + (0 if gate is None else gate[t, h, there])
            )
            y = {
                "none": None,
                "finest": u[0],
                "value": target[t, h * width : (h + 1) * width],
                "learned": target[t, h * width : (h + 1) * width],
            }[spec.target]
            w = (
                fusion_weights(
                    u,
                    method=spec.fusion,
                    logits=prior,
                    target=y,
                    gram_scale=p["fusion.log_gram"][h].exp() if "fusion.log_gram" in p else 1.0,
                    ridge=spec.ridge,
                    sparsity=spec.sparsity,
                    temperature=spec.temperature,
                    constraint=spec.constraint,
                )
                if spec.num_scales > 1
                else torch.ones(1, dtype=x.dtype)
            )
            weights[t, h, there] = w.detach()
            row.append(w @ torch.stack(u))
        fused.append(torch.cat(row))
    return linear("out_proj", torch.stack(fused)), weights


def _dilated(x: Tensor, weight: Tensor, dilation: int, causal: bool) -> Tensor:
    taps = len(weight)
    shift = 0 if causal else (taps - 1) * dilation // 2 + (taps - 1) * dilation % 2
    rows = []
    for t in range(len(x)):
        total = torch.zeros_like(x[0])
        for i in range(taps):
            at = t - (taps - 1 - i) * dilation + shift
            if 0 <= at < len(x):
                total = total + weight[i] * x[at]
        rows.append(total.relu())
    return torch.stack(rows)
