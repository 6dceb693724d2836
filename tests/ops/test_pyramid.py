"""Downsampling and upsampling against their slow twins, token by token."""

import pytest
import torch

from maha_attn.ops import pyramid, reference

LENGTHS = [1, 2, 3, 7, 8, 9, 63, 257]


def weight_for(method, taps, width=6):
    shape = {"conv": (taps, width), "dense_conv": (width, width, taps)}.get(method)
    return None if shape is None else torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("method", ["conv", "dense_conv", "max", "mean"])
@pytest.mark.parametrize(("ratio", "taps"), [(2, 3), (2, 2), (3, 4), (3, 6), (4, 4)])
@pytest.mark.parametrize("length", LENGTHS)
def test_downsample(length, ratio, taps, method, causal):
    torch.manual_seed(length)
    x = torch.randn(2, length, 6, dtype=torch.float64)
    weight = weight_for(method, taps)
    y = pyramid.downsample(x, weight, ratio=ratio, method=method, causal=causal)
    for row in range(2):
        expected = reference.downsample(x[row], weight, ratio=ratio, method=method, causal=causal)
        torch.testing.assert_close(y[row], expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", ["conv", "dense_conv", "max", "mean"])
def test_downsample_gradients(method):
    torch.manual_seed(0)
    x = torch.randn(1, 9, 6, dtype=torch.float64, requires_grad=True)
    weight = weight_for(method, 3)
    inputs = [x] if weight is None else [x, weight.requires_grad_()]

    def run(x, weight=None):
        options = {"ratio": 2, "method": method, "causal": False}
        return pyramid.downsample(x, weight, **options, lengths=torch.tensor([7]))

    # The function expects zeros beyond a row's length.
    x.data[:, 7:] = 0
    assert torch.autograd.gradcheck(run, inputs, atol=1e-6)


@pytest.mark.parametrize("method", ["conv", "dense_conv", "max", "mean"])
def test_bidirectional_rows_of_different_length_equal_the_rows_alone(method):
    torch.manual_seed(0)
    x = torch.randn(4, 11, 6, dtype=torch.float64)
    lengths = torch.tensor([11, 8, 5, 0])
    x = torch.where(torch.arange(11)[:, None] < lengths[:, None, None], x, 0)
    weight = weight_for(method, 3)
    y = pyramid.downsample(x, weight, ratio=2, method=method, causal=False, lengths=lengths)
    assert y.shape == (4, 6, 6)
    for row, n in enumerate(lengths.tolist()):
        coarse = -(-n // 2)
        expected = reference.downsample(x[row, :n], weight, ratio=2, method=method, causal=False)
        torch.testing.assert_close(y[row, :coarse], expected, rtol=0, atol=1e-12)
        assert (y[row, coarse:] == 0).all()


def test_block_mean_weights_make_the_convolution_a_mean():
    x = torch.randn(1, 12, 6)
    weight = torch.tensor([0.0, 0.5, 0.5])[:, None].expand(3, 6)
    y = pyramid.downsample(x, weight, ratio=2, method="conv", causal=True)
    mean = pyramid.downsample(x, None, ratio=2, method="mean", causal=True)
    torch.testing.assert_close(y, mean)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("stride", [1, 2, 3, 8])
@pytest.mark.parametrize("length", LENGTHS)
def test_upsample_and_availability(length, stride, causal):
    blocks = pyramid.coarse_length(length, stride, causal=causal)
    y = torch.randn(2, blocks, 5)
    up = pyramid.upsample(y, stride=stride, length=length, causal=causal)
    there = pyramid.availability((stride,), length, causal=causal, device=y.device)[:, 0]
    assert up.shape == (2, length, 5)
    for row in range(2):
        expected = reference.upsample(y[row], stride=stride, length=length, causal=causal)
        for t, block in enumerate(expected):
            assert there[t].item() == (block is not None)
            assert torch.equal(up[row, t], torch.zeros(5) if block is None else block)


def test_dilated_convolution_continues_from_its_context():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 20, 6), torch.randn(3, 6)
    whole = pyramid.dilated_convolution(x, weight, dilation=3, causal=True)
    rest = pyramid.dilated_convolution(x[:, 9:], weight, dilation=3, causal=True, context=x[:, 3:9])
    torch.testing.assert_close(rest, whole[:, 9:])
