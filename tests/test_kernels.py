"""What is faster or smaller than torch's own computes the same."""

from unittest import mock

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from toys import rng, tiny_model

from data.lib import kernels
from data.lib.kernels import Dropout, cross_entropy
from data.lib.machine import autocast

CAN_PACK = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def test_cross_entropy_is_that_of_torch():
    """Values and gradients agree at every dtype of the logits, however many rows are taken at a time."""
    for dtype, rows in ((torch.float32, 1), (torch.float32, 100), (torch.bfloat16, 7)):
        logits = torch.randn(50, 11, generator=rng()).to(dtype)
        logits[:, 4] = -torch.inf
        target, weights = torch.arange(50) % 4, torch.rand(50, generator=rng())
        ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        with mock.patch("data.lib.kernels.rows_at_a_time", lambda logits, rows=rows: rows):
            nats = cross_entropy(ours * 1, target)
            (weights * nats).sum().backward()
        expected = F.cross_entropy(theirs.float(), target, reduction="none")
        (weights * expected).sum().backward()
        torch.testing.assert_close(nats, expected)
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_autocast_asks_the_machine(monkeypatch):
    cpu = torch.device("cpu")
    for capability, dtype in (("amx_bf16", torch.bfloat16), ("avx512_bf16", torch.bfloat16), ("avx2", None)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda capability=capability: {capability: True})
        context = autocast(cpu, "auto")
        assert (context.fast_dtype if context._enabled else None) == dtype
    assert autocast(cpu, "float16").fast_dtype == torch.float16


def test_dropout_zeroes_with_its_probability_and_keeps_the_mean():
    for p in (0.1, 0.5):
        x = torch.ones(400_003)
        out = Dropout(p).train()(x)
        zeros = (out == 0).float()
        assert zeros.mean().item() == pytest.approx(p, abs=0.003)
        assert (zeros[:-1] * zeros[1:]).mean().item() == pytest.approx(p * p, abs=0.003)  # neighbours are independent
        assert out.unique().tolist() == pytest.approx([0, 1 / (1 - p)])
        assert Dropout(p).eval()(x) is x
    assert Dropout(0.0).train()(x).equal(x)


@pytest.mark.parametrize("K", [None, 1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_that_is_written_out_is_the_same_attention(K, dtype, monkeypatch):
    """A CPU takes it with dropout and in bfloat16. If nothing is dropped, it agrees with the fused kernel."""
    x0 = torch.tensor([[0, 1, 2, 4, 0, 0, 3, 3], [1, 1, 1, 2, 2, 2, 0, 0]])
    model = tiny_model(V=5, T=8, dropout=0.5, block=K, shift_id=5 if K == 1 else None)
    expected = model(torch.full_like(x0, 5), clean=x0)
    monkeypatch.setattr(Dropout, "forward", lambda self, x: x)
    with torch.autocast("cpu", dtype, enabled=dtype == torch.bfloat16):
        logits = model.train()(torch.full_like(x0, 5), clean=x0)
    tolerance = {"atol": 1.0, "rtol": 0.1} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(logits.float(), expected, **tolerance)


@torch.no_grad()
@pytest.mark.parametrize("sight", ["all", "causal", "mask"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_written_out_is_that_of_torch(dtype, sight, device):
    """Training in bfloat16 takes it, and so does dropout in any precision. Here dropout is too small to drop any."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 64, 8, dtype=dtype, device=device)
    mask = (torch.rand(64, 64, device=device) < 0.5) | torch.eye(64, dtype=torch.bool, device=device)
    flags = {"sees": mask if sight == "mask" else None, "causal": sight == "causal"}
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), flags["sees"], is_causal=flags["causal"])
    y = kernels.attend(q, k, v, Dropout(1e-9).train(), **flags)
    assert y.dtype == dtype
    torch.testing.assert_close(y.float(), expected, atol=0.02 if dtype == torch.bfloat16 else 1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("n", [1, 5, 32, 33])
@pytest.mark.parametrize("bias", [True, False])
def test_a_product_with_a_packed_matrix_is_that_of_torch(bias, n):
    if not CAN_PACK:
        pytest.skip("this CPU packs no matrices")
    layer, x = nn.Linear(40, 70, bias), torch.randn(1, n, 40, generator=rng())
    packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.bfloat16(), 1)
    with autocast(torch.device("cpu"), "bfloat16"):
        before, _ = layer(x), layer.weight.zero_()  # the packed matrix is a copy, which isn't used for more rows
        expected = layer(x) if n > 32 else before
        torch.testing.assert_close(kernels.product(layer, packed, x), expected, atol=0.02, rtol=0.02)


@torch.no_grad()
def test_only_a_model_that_reads_few_rows_is_packed():
    """Its logits stay what they are in bfloat16. In float32, and for a canvas, nothing changes."""
    idx = torch.tensor([[0, 1, 2, 4]])
    for block, dtype in ((1, "bfloat16"), (4, "bfloat16"), (1, "float32"), (None, "bfloat16")):
        model = tiny_model(V=5, T=4, block=block, shift_id=5 if block == 1 else None)
        context = autocast(torch.device("cpu"), dtype)
        with context:
            expected = model(idx)
            kernels.pack(model, context.fast_dtype)
            torch.testing.assert_close(model(idx), expected, atol=0.05, rtol=0.05)
        assert ("forward" in vars(model.head)) == (CAN_PACK and dtype == "bfloat16" and block is not None)
