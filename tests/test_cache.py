"""Training, scoring and writing with or without the KV cache see the same."""

import pytest
import torch
from toys import CAUSAL, KS, MASK, SHAPES, dial, every_shape, texts, tiny_model

import data.lib.corpus
import data.lib.window
from data.lib.cache import Cache
from sample import denoise


@torch.no_grad()
@every_shape
@pytest.mark.parametrize("K", KS)
def test_the_doubled_pass_one_half_and_the_cache_agree(K, shape, device):
    """Training, scoring and sampling see the same: mask, convolution, positions and cache are tested at once."""
    model, K = dial(K, **shape).to(device), K or 8
    x0, xt, _ = (tensor.to(device) for tensor in texts())
    doubled = model(xt, clean=x0)[..., :5]
    cache = Cache(8) if K < 8 else None
    for start in range(0, 8, K):
        end = min(start + K, 8)
        canvas = torch.cat((x0[:, :start], xt[:, start:end]), 1)
        where = torch.arange(end, device=device).ge(start).expand(3, -1)
        one_half = model(canvas, where=where)[:, :5].view(3, -1, 5)
        torch.testing.assert_close(one_half, doubled[:, start:end], atol=1e-5, rtol=1e-5)
        for _ in range(2 if cache else 0):  # the second pass finds the blocks before it in the cache
            cache.length, cache.final = min(cache.length, start), start
            cached = model(canvas, where=where, cache=cache)[:, :5].view(3, -1, 5)
            torch.testing.assert_close(cached, one_half, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_pass_reads_only_what_the_cache_does_not_know():
    """GPT reads one position for each token. A block is read in each step, and once more when it is final."""
    for shape, T, expected in (
        (CAUSAL, 8, [1] * 8),
        ({"block": 4}, 8, [4, 4, 4, 4, 8, 4, 4, 4]),  # the fifth pass makes the first block final
        ({"block": 1}, 8, [1] + [2] * 7),
        # A longer canvas slides by a quarter of the context, or by a block, and all in sight is read again.
        (CAUSAL, 20, [1] * 8 + [6, 1, 1] * 6),
        ({"block": 4}, 12, [4, 4, 4, 4, 8, 4, 4, 4, 8, 4, 4, 4]),
    ):
        model, read = tiny_model(V=5, T=8, **shape), []
        model.token_embedding.register_forward_hook(lambda _, idx, out, read=read: read.append(idx[0].shape[1]))
        *_, _ = denoise(model, torch.full((2, T), MASK), T)
        assert read == expected


WAYS = {
    "random": {},
    "left": {},
    "confidence": {"guidance": 1.5},
    "entropy": {"steps": 3},
    "threshold": {"tau": 0.4},
    "entropy-bound": {"gamma": 0.5},
    "remask": {"steps": 20},
    "margin": {"steps": 5},
}


@pytest.mark.parametrize("T", [6, 8, 21])  # shorter than the context, as long, and longer, so that it slides
@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("order", WAYS)
def test_with_and_without_the_cache_the_same_is_written(order, K, T, monkeypatch, device):
    for shape in SHAPES.values():
        model = dial(K, **shape).to(device)
        x0, canvas, _ = texts(T=T, seed=K)
        canvas[0, : T // 2] = x0[0, : T // 2]  # prompts of several lengths
        canvas[1] = MASK
        if not (model.config.conv or model.config.learned_positions):
            canvas[:, 0] = x0[:, 0]  # in an empty first block all positions are alike, and rounding would choose one
        runs, log_p = [], []
        for kind in (Cache, lambda W: None):
            monkeypatch.setattr(data.lib.window, "Cache", kind)
            log_p.append(torch.zeros(canvas.shape))
            runs.append(list(denoise(model, canvas.to(device), order=order, log_p=log_p[-1], **WAYS[order])))
        assert len(runs[0]) == len(runs[1])
        assert all(a.equal(b) for a, b in zip(*runs))
        assert not (runs[0][-1] == MASK).any()
        torch.testing.assert_close(*log_p, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shift_id", [None, MASK])
def test_guidance_by_a_prompt_that_no_earlier_block_sees(shift_id, monkeypatch):
    """The cache keeps rows with and without the prompt from the first block on."""
    model = dial(2, shift_id=shift_id)
    canvas = torch.tensor([[MASK] * 5 + [2, MASK, MASK]])
    runs = []
    for kind in (Cache, lambda W: None):
        monkeypatch.setattr(data.lib.window, "Cache", kind)
        runs.append(list(denoise(model, canvas, guidance=1.5)))
    assert all(a.equal(b) for a, b in zip(*runs))
