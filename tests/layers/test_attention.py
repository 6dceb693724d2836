"""The whole layer: its definition, causality, padding, dtypes, compilation, errors."""

import copy
import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F

from maha_attn import AttentionSpec, MultiscaleAttention
from maha_attn.ops import reference
from maha_attn.ops.qp import solve_qp
from maha_attn.ops.rotary import rotate

FUSIONS = ["mean", "static", "gate", "convex", "nash"]
DOWNSAMPLES = ["conv", "dense_conv", "max", "mean"]
HYBRID = {"gating": True, "dilation": 2}


# --- the definition -------------------------------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("queries", ["coarse", "fine"])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_equals_the_reference_forward_and_every_gradient(make_layer, fusion, queries, causal):
    options = {"fusion": fusion, "queries": queries, "causal": causal, "bias": True}
    layer = make_layer(dtype=torch.float64, **options)
    for length in (1, 2, 13):
        x = torch.randn(1, length, 16, dtype=torch.float64, requires_grad=True)
        y, info = layer(x, return_info=True)
        expected, weights = reference.layer(layer, x[0])
        torch.testing.assert_close(y[0], expected, rtol=0, atol=1e-9)
        torch.testing.assert_close(info.weights[0].transpose(0, 1), weights, rtol=0, atol=1e-9)
    grad = torch.randn_like(y)
    inputs = [x, *layer.parameters()]
    got = torch.autograd.grad(y, inputs, grad)
    wanted = torch.autograd.grad(expected[None], inputs, grad, allow_unused=True)
    names = ["x", *dict(layer.named_parameters())]
    for name, a, b in zip(names, got, wanted, strict=True):
        b = torch.zeros_like(a) if b is None else b
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    "options",
    [
        *({"downsample": d, **HYBRID} for d in DOWNSAMPLES),
        *(
            {"target": t, "prior": p}
            for t, p in itertools.product(
                ["value", "learned", "finest", "none"], ["none", "static"]
            )
        ),
        {"temperature": 0.0, "ridge": 0.5},
        {"temperature": 0.0, "constraint": "capped", "sparsity": 0.3, "ridge": 0.5},
        {"constraint": "capped", "sparsity": 0.5},
        {"fusion": "nash", "sparsity": 0.3},
        {"ratio": 3, "num_scales": 2},
        {"ratio": 2, "kernel_size": 5},
        {"preset": "paper"},
        {"preset": "window"},
        {"causal": False, **HYBRID},
    ],
    ids=str,
)
def test_options_equal_the_reference(make_layer, options):
    layer = make_layer(dtype=torch.float64, **options)
    x = torch.randn(1, 19, 16, dtype=torch.float64)
    y, info = layer(x, return_info=True)
    expected, weights = reference.layer(layer, x[0])
    torch.testing.assert_close(y[0], expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(info.weights[0].transpose(0, 1), weights, rtol=0, atol=1e-9)


def test_one_full_scale_is_scaled_dot_product_attention(make_layer):
    layer = make_layer(num_scales=1, preset="paper", hidden_size=64, num_heads=4, std=0.1)
    x = torch.randn(2, 100, 64)
    table = layer.table(torch.arange(100))
    q, k = (rotate(t, table).transpose(1, 2) for t in layer.project_qk(0, x, x))
    v = layer.split(layer.v_proj(x)).transpose(1, 2)
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    expected = layer.out_proj(o.transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("causal", [True, False])
def test_linear_below_the_window_is_paper(make_layer, causal):
    layer = make_layer(window=64, preset="linear", causal=causal)
    paper = MultiscaleAttention(dataclasses.replace(layer.spec, preset="paper"))
    paper.load_state_dict(layer.state_dict())
    x = torch.randn(2, 32, 16)
    torch.testing.assert_close(layer(x), paper(x), rtol=0, atol=1e-6)


def test_a_new_layer_begins_as_a_sliding_window():
    spec = AttentionSpec(hidden_size=32, num_heads=2, num_scales=4, window=8)
    for fusion in ("static", "gate", "convex"):
        layer = MultiscaleAttention(dataclasses.replace(spec, fusion=fusion))
        _, info = layer(torch.randn(1, 64, 32), return_info=True)
        assert info.weights[..., 0].mean() > 0.7


# --- causality ------------------------------------------------------------------------------------


def assert_causal(layer, length, cuts):
    """Row ``i`` of a second batch differs from the first from token ``cuts[i]`` on."""
    torch.manual_seed(1)
    x = torch.randn(1, length, layer.spec.hidden_size).repeat(len(cuts), 1, 1)
    changed = torch.arange(length) >= torch.tensor(cuts)[:, None]
    other = torch.where(changed[..., None], 3 * torch.randn_like(x), x)
    with torch.no_grad():
        y, z = layer(x), layer(other)
    same = (y == z).all(-1)
    for row, cut in enumerate(cuts):
        assert same[row, :cut].all(), f"token {cut} changed token {int((~same[row]).nonzero()[0])}"
    # A token whose weights are all 0 (nash) shows no change of its own.
    assert same[torch.arange(len(cuts)), torch.tensor(cuts)].float().mean() < 0.1


@pytest.mark.parametrize("queries", ["coarse", "fine"])
@pytest.mark.parametrize("downsample", DOWNSAMPLES)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_future_changes_nothing_bitwise(make_layer, fusion, downsample, queries):
    layer = make_layer(
        num_scales=4, fusion=fusion, downsample=downsample, queries=queries, **HYBRID
    )
    assert_causal(layer, 70, list(range(1, 70)))


@pytest.mark.parametrize("ratio", [2, 3])
@pytest.mark.parametrize("queries", ["coarse", "fine"])
@pytest.mark.parametrize("fusion", ["convex", "nash"])
def test_the_future_changes_nothing_at_block_boundaries_of_long_inputs(
    make_layer, fusion, queries, ratio
):
    layer = make_layer(
        num_scales=4, fusion=fusion, queries=queries, ratio=ratio, window=16, **HYBRID
    )
    block = ratio**4
    cuts = [c + d for c in range(block, 400, block * (1 + 400 // block // 8)) for d in (-1, 0, 1)]
    assert_causal(layer, 421, cuts)


def test_a_leak_would_be_caught(make_layer):
    layer = make_layer()
    bidirectional = MultiscaleAttention(dataclasses.replace(layer.spec, causal=False))
    bidirectional.load_state_dict(layer.state_dict())
    with pytest.raises(AssertionError, match="changed token"):
        assert_causal(bidirectional, 70, list(range(1, 70)))


# --- padding --------------------------------------------------------------------------------------


def padded(rows, length, side, fill):
    x = torch.full((len(rows), length, rows[0].shape[-1]), fill)
    mask = torch.zeros(len(rows), length, dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(0, len(row)) if side == "right" else slice(length - len(row), length)
        x[i, where], mask[i, where] = row, True
    return x, mask


@pytest.mark.parametrize("fill", [0.0, float("nan")])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        *({"fusion": f, **HYBRID} for f in FUSIONS),
        *({"downsample": d, "queries": "fine"} for d in DOWNSAMPLES),
    ],
    ids=str,
)
def test_a_padded_row_equals_the_row_alone(make_layer, options, causal, side, fill):
    layer = make_layer(causal=causal, bias=True, **options)
    rows = [torch.randn(n, 16) for n in (1, 5, 8, 40, 61)]
    x, mask = padded(rows, 61, side, fill)
    y, info = layer(x, mask, return_info=True)
    assert (y[~mask] == 0).all()
    assert (info.weights.transpose(1, 2)[~mask] == 0).all()
    for i, row in enumerate(rows):
        alone, alone_info = layer(row[None], return_info=True)
        torch.testing.assert_close(y[i, mask[i]], alone[0], rtol=0, atol=1e-5)
        weights = info.weights[i][:, mask[i]]
        torch.testing.assert_close(weights, alone_info.weights[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("fill", [0.0, float("nan")])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_rows_without_a_token_give_zeros_and_finite_gradients(make_layer, fusion, causal, fill):
    layer = make_layer(fusion=fusion, causal=causal, bias=True, **HYBRID)
    x, mask = padded([torch.randn(0, 16), torch.randn(9, 16)], 21, "right", fill)
    x.requires_grad_()
    y = layer(x, mask)
    y.square().sum().backward()
    assert (y[0] == 0).all()
    assert (x.grad[~mask] == 0).all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


def test_sequence_granularity_ignores_padding(make_layer):
    layer = make_layer(causal=False, granularity="sequence")
    row = torch.randn(23, 16)
    x, mask = padded([row, torch.randn(40, 16)], 40, "left", 0.0)
    y, info = layer(x, mask, return_info=True)
    torch.testing.assert_close(y[0, mask[0]], layer(row[None])[0], rtol=0, atol=1e-5)
    weights = info.weights[0][:, mask[0]]
    assert torch.equal(weights, weights[:, :1].expand_as(weights))


# --- lengths, dtypes, strides, compilation --------------------------------------------------------


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 63, 257, 1009])
def test_any_length(make_layer, length, causal):
    layer = make_layer(num_scales=4, window=16, causal=causal)
    x = torch.randn(2, length, 16, requires_grad=True)
    y, info = layer(x, return_info=True)
    y.sum().backward()
    assert y.shape == x.shape
    assert info.weights.shape == (2, 2, length, 4)
    assert y.isfinite().all()
    assert x.grad.isfinite().all()
    torch.testing.assert_close(info.weights.sum(-1), torch.ones(2, 2, length))
    assert (info.status == 0).all()
    assert (info.residual <= 1e-6).all()


def test_non_contiguous_input(make_layer):
    layer = make_layer()
    x = torch.randn(16, 50, 3).permute(2, 1, 0)
    torch.testing.assert_close(layer(x), layer(x.contiguous()), rtol=0, atol=1e-6)


def plain_layer(layer, x):
    """The layer out of textbook operators in the dtype of ``x``, but for the solver's fp32.

    Causal, coarse queries, ``conv``. Shares nothing with the layer but its weights and the solver.
    """
    spec, (batch, length, _) = layer.spec, x.shape

    def pyramid(t):
        scales = [t]
        for weight in layer.pyramid.down:
            padded = F.pad(scales[-1], (0, 0, spec.taps - spec.ratio, 0))
            windows = padded.unfold(1, spec.taps, spec.ratio)[
                :, : scales[-1].shape[1] // spec.ratio
            ]
            scales.append((windows * weight.T.to(t.dtype)).sum(-1))
        return scales

    def heads(t):
        return t.unflatten(-1, (spec.num_heads, spec.head_dim)).transpose(1, 2)

    def rotated(t):
        cos, sin = layer.table(torch.arange(t.shape[2])).to(t.dtype).unbind(-2)
        return t * cos + t.roll(spec.head_dim // 2, -1) * sin

    def upsampled(t, stride):
        blocks = F.pad(t.repeat_interleave(stride, 2), (0, 0, stride - 1, 0))
        return F.pad(blocks, (0, 0, 0, length))[:, :, :length]

    base = layer.v_proj(x)
    outputs = []
    for s, (feature, value) in enumerate(zip(pyramid(x), pyramid(base), strict=True)):
        q, k = (rotated(heads(p[s](feature))) for p in (layer.q_proj, layer.k_proj))
        scores = q @ k.mT * spec.head_dim**-0.5
        seen = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        seen = seen.triu(1 - spec.spans[s]) if spec.spans[s] else seen
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        outputs.append(upsampled(weights.to(value.dtype) @ heads(value), spec.strides[s]))
    u = torch.stack(outputs, 3)
    available = torch.arange(1, length + 1)[:, None] >= torch.tensor(spec.strides)
    logits = torch.zeros(batch, spec.num_heads, length, spec.num_scales, dtype=u.dtype)
    if layer.fusion.logits is not None:
        logits = logits + layer.fusion.logits[:, None]
    if layer.fusion.gate_proj is not None:
        gate = layer.fusion.gate_proj(x).unflatten(-1, (spec.num_heads, -1))
        logits = logits + gate.transpose(1, 2)
    if spec.fusion in ("convex", "nash"):
        gram = u @ u.mT * spec.head_dim**-0.5
        matrix, linear, constraint = gram, gram.diagonal(dim1=-2, dim2=-1), "box"
        if spec.fusion == "convex":
            against = (u @ heads(base)[..., None])[..., 0] * spec.head_dim**-0.5
            linear, constraint = against + logits, "simplex"
            matrix = gram * layer.fusion.log_gram.exp()[:, None, None, None]
        at_least = torch.promote_types(x.dtype, torch.float32)
        matrix = matrix.to(at_least) + spec.ridge * torch.eye(spec.num_scales, dtype=at_least)
        temperature = spec.temperature if spec.fusion == "convex" else 0.0
        weights = solve_qp(matrix, linear.to(at_least), constraint, temperature, available).weights
    else:
        weights = logits.masked_fill(~available, -torch.inf).softmax(-1)
    fused = weights.to(u.dtype)[..., None, :] @ u
    return layer.out_proj(fused[..., 0, :].transpose(1, 2).flatten(2))


@pytest.mark.parametrize("mode", ["cast", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fusion", FUSIONS)
def test_low_precision_errs_little_more_than_textbook_operators_in_it(
    make_layer, fusion, dtype, mode
):
    """Output at most twice, every gradient at most three times as far from fp64."""
    layer = make_layer(fusion=fusion, hidden_size=64, num_heads=4, num_scales=4, window=32, std=0.1)
    layer.pyramid.reset_parameters()  # Random taps would shrink each scale tenfold.
    double, low = (copy.deepcopy(layer).to(d) for d in (torch.float64, dtype))
    x, grad = torch.randn(2, 2, 150, 64).unbind(0)

    def run(module, forward, x, **autocast):
        x = x.clone().requires_grad_()
        with torch.autocast("cpu", **autocast):
            y = forward(x)
        gradients = torch.autograd.grad(y, [x, *module.parameters()], grad.to(y.dtype))
        names = ["output", "x", *dict(module.named_parameters())]
        return dict(zip(names, (t.detach().double() for t in (y, *gradients)), strict=True))

    def low_precision(plain):
        module, tokens = (low, x.to(dtype)) if mode == "cast" else (layer, x)
        forward = (lambda t: plain_layer(module, t)) if plain else module
        return run(module, forward, tokens, dtype=dtype, enabled=mode == "autocast")

    exact = run(double, double, x.double(), enabled=False)
    for name, wanted in run(
        double, lambda t: plain_layer(double, t), x.double(), enabled=False
    ).items():
        torch.testing.assert_close(wanted, exact[name], rtol=1e-9, atol=1e-9)
    got, plain = low_precision(False), low_precision(True)
    for name, wanted in exact.items():
        error, allowed = ((t[name] - wanted).norm() for t in (got, plain))
        assert error <= (2 if name == "output" else 3) * allowed, name


@pytest.mark.parametrize(
    "options", [{}, {"fusion": "nash"}, {"queries": "fine", **HYBRID}, {"causal": False}], ids=str
)
def test_compiled_without_a_graph_break_equals_eager(make_layer, options):
    layer = make_layer(**options)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 40, 16, requires_grad=True)
    mask = torch.arange(40) < torch.tensor([[40], [17]])
    for arguments in ((x,), (x, mask)):
        y, z = layer(*arguments), compiled(*arguments)
        torch.testing.assert_close(z, y, rtol=0, atol=1e-6)
        grads = [torch.autograd.grad(o.square().sum(), [x, *layer.parameters()]) for o in (y, z)]
        # Eager heads are paired, compiled ones are not: their sums are rounded in another order.
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "mask", "error", "named"),
    [
        (torch.randn(5, 16), None, ValueError, ["x", "[B, N, 16]", "[5, 16]"]),
        (torch.randn(2, 5, 8), None, ValueError, ["x", "[B, N, 16]", "[2, 5, 8]"]),
        (torch.randn(2, 0, 16), None, ValueError, ["x", "at least one token", "[2, 0, 16]"]),
        (torch.zeros(2, 5, 16, dtype=torch.long), None, TypeError, ["x", "floating", "int64"]),
        (torch.zeros(2, 5, 16, dtype=torch.float64), None, TypeError, ["x", "float32", "float64"]),
        (torch.zeros(2, 5, 16).numpy(), None, TypeError, ["x", "Tensor", "ndarray"]),
        (
            torch.randn(2, 5, 16),
            torch.ones(2, 5),
            TypeError,
            ["padding_mask", "boolean", "float32"],
        ),
        (
            torch.randn(2, 5, 16),
            torch.ones(2, 4).bool(),
            ValueError,
            ["padding_mask", "[2, 5]", "[2, 4]"],
        ),
    ],
)
def test_wrong_inputs_are_named(make_layer, x, mask, error, named):
    with pytest.raises(error) as caught:
        make_layer()(x, mask)
    for word in named:
        assert word in str(caught.value)
