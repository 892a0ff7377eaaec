"""What holds for the networks with any weights."""

import math

import pytest
import torch
import torch.nn.functional as F
from toys import NETWORKS, tiny_model

from data.weights import bert, gpt2, llada, mdlm
from model import Transformer, rotary_angles, rotate

every_shape = pytest.mark.parametrize("shape", NETWORKS.values(), ids=NETWORKS)


@pytest.fixture
def canvas(device):
    return torch.randint(0, 6, (3, 8), generator=torch.Generator().manual_seed(0)).to(device)


def with_unit_norms(model):
    """The model, whose norms neither scale nor shift any more. BERT's would make small random values smaller."""
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.reset_parameters()
    return model


@every_shape
def test_where_gives_the_same_logits_as_the_full_pass(shape, canvas, device):
    model = tiny_model(V=5, T=8, **shape).to(device)
    where = canvas == model.config.mask_id
    assert where.any()
    torch.testing.assert_close(model(canvas, where=where), model(canvas)[where])


@every_shape
def test_mask_is_never_predicted(shape, canvas, device):
    model = tiny_model(V=5, T=8, **shape).to(device)
    logits = model(canvas)
    assert logits.dtype == torch.float32
    assert logits.softmax(-1)[..., model.config.mask_id].eq(0).all()
    assert logits[..., : model.config.mask_id].isfinite().all()


@every_shape
def test_on_a_canvas_every_token_sees_all_others(shape, canvas, device):
    changed = canvas.clone()
    changed[:, 5] = (canvas[:, 5] + 1) % 5
    model = tiny_model(V=5, T=8, **shape).to(device)
    moved = (model(canvas) - model(changed))[..., :5].abs().amax(-1)  # (B, T)
    assert moved.gt(1e-5).all()


def test_learned_positions_tell_order_apart_and_rotary_ones_only_distance():
    same = torch.zeros(1, 8, dtype=torch.int64)  # the tokens are equal, so only positions can differ
    for shape in ({"conv": 0}, {"network": mdlm.Network}, {"network": llada.Network}):
        rotary = tiny_model(V=5, T=8, **shape)(same)[..., :5]
        torch.testing.assert_close(rotary, rotary[:, :1].expand_as(rotary))
    for network in (bert.Network, gpt2.Network):
        learned = with_unit_norms(tiny_model(V=5, T=8, network=network))(same)[..., :5]
        assert (learned - learned[:, :1])[:, 1:].abs().amax(-1).gt(1e-3).all()


def test_rotary_products_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 16)
    angles = rotary_angles(torch.arange(10), 16, 1e4)
    q, k = (rotate(x.expand(1, 10, 1, 16), *angles)[0, :, 0] for x in (q, k))  # (T, D) each
    products = q @ k.T  # (T, T)
    for distance in range(-9, 10):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("network", [Transformer, gpt2.Network])
def test_attention_is_softmax_of_scaled_products(network):
    """Queries and keys are normalised and rotated, but not those of a network with a table of positions."""
    model = tiny_model(V=5, T=8, network=network)
    attention = model.layers[0].attention
    x = torch.randn(3, 8, 16)
    q, k, v = (f(x).view(3, 8, 2, 8) for f in (attention.query, attention.key, attention.value))
    if network is Transformer:
        q, k = attention.query_norm(q), attention.key_norm(k)
        q, k = (rotate(y, *rotary_angles(torch.arange(8), 8)) for y in (q, k))
    scores = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(8)
    mixed = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v).reshape(3, 8, 16)
    torch.testing.assert_close(attention(x, model.plan(8, torch.arange(0), 1)[0]), attention.out(mixed))


@pytest.mark.parametrize("conv", [1, 4, 5])
@pytest.mark.parametrize("K", [1, 2, 3, 7, None])
def test_convolution_is_a_weighted_sum_of_the_neighbours_that_are_seen(K, conv):
    """If their number is even, one more is to the left, and with K = 1 all are. Tokens after a block's end count 0."""
    model = tiny_model(T=7, conv=conv, block=K)
    layer = model.layers[0].convolution
    x = torch.randn(2, 7, 16)
    w, K = layer.weight[:, 0, 0], K or 7  # w: (C, conv)
    right = min((conv - 1) // 2, K - 1)
    expected = x.clone()
    for i in range(7):
        for tap in range(conv):
            j = i + tap - (conv - 1 - right)
            if 0 <= j < 7 and j // K <= i // K:
                expected[:, i] += w[:, tap] * x[:, j]
    torch.testing.assert_close(layer(x, model.plan(7, torch.arange(0), 1)[0]), expected)


def test_only_bert_normalises_what_a_layer_writes():
    for network in (Transformer, gpt2.Network, mdlm.Network, bert.Network):
        model = with_unit_norms(tiny_model(V=5, T=8, network=network))
        out = model.layers[0](torch.randn(1, 8, 16), model.plan(8, torch.arange(0), 1)[0])
        assert torch.allclose(out, F.layer_norm(out, (16,)), atol=1e-3) == (network is bert.Network)
