"""Append and set on one dial: blocks of K tokens, from GPT (K = 1) to one canvas (K = T)."""

import math
from itertools import permutations, product

import pytest
import torch
import torch.nn.functional as F
from toys import all_texts, chi_square_p, tiny_model

import sample
from data.lib.fast import Cache
from data.lib.flags import Attention, Level, Span
from data.lib.training import Run
from model import ModelConfig, Transformer
from sample import Recorded, denoise, draw, log_likelihood
from train import (
    TrainConfig,
    block_levels,
    corrupt,
    draw_batch,
    loss_of,
    nelbo,
    sequence_bounds,
    train,
)

MASK = 5
KS = 1, 2, 3, 4, 8  # of T = 8; 3 does not divide it
SHAPES = [
    {"shift_id": shift_id, "conv": conv, "position": position}
    for shift_id in (None, MASK)
    for conv, position in ((0, "rope"), (5, "rope"), (4, "learned"))
]
LLAMA = {"conv": 0, "qk_norm": False, "rms": True, "gated": True, "n_kv_head": 1}
SHAPES += [{"shift_id": None, **LLAMA}]
CAUSAL = {"block": 1, "shift_id": MASK}


def dial(K, T=8, **shape):
    return tiny_model(V=5, T=T, block=K, **shape)


def texts(B=3, T=8, seed=0):
    """Clean and corrupted tokens, and the holes, (B, T) each."""
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randint(0, 5, (B, T), generator=generator)
    holes = torch.rand(B, T, generator=generator) < 0.5
    return x0, x0.masked_fill(holes, MASK), holes


def width(K, T=8):
    """Tokens of a block of a canvas of T."""
    return min(K, T) if K else T


# --- who sees whom -------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("K", KS)
def test_nothing_leaks_and_all_that_may_be_seen_is(K, shape, device):
    """A noisy position sees the noisy tokens of its own block, and the clean ones of those before it."""
    model = dial(K, **shape).to(device)
    x0, xt, _ = (tensor.to(device) for tensor in texts())
    x0[1], xt[1] = x0[0], xt[0]  # two rows alike: whatever changes in the second, the first keeps its logits
    before = model(xt, clean=x0)
    for j in range(8):
        for noisy in (True, False):
            x0_changed, xt_changed = x0.clone(), xt.clone()
            changed = xt_changed if noisy else x0_changed
            changed[1, j] = (changed[1, j] + 1) % 5
            moved = (model(xt_changed, clean=x0_changed) - before)[..., :5].abs().amax(-1).cpu()  # (B, T)
            assert moved[[0, 2]].max() == 0
            i = torch.arange(8)
            if noisy:
                seen = i // K == j // K
                if shape["shift_id"] is not None and K < 8:  # the token before, clean at the start of a block
                    seen &= torch.tensor(j % K < K - 1 and j < 7)
            else:
                seen = i // K > j // K
            assert (moved[1][~seen] < 1e-6).all(), (j, noisy)
            assert (moved[1][seen] > 1e-5).all(), (j, noisy)


@torch.no_grad()
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("K", KS)
def test_the_doubled_pass_one_half_and_the_cache_agree(K, shape, device):
    """Mask, convolution, positions and cache at once: training, scoring and sampling see the same."""
    model, K = dial(K, **shape).to(device), width(K)
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
    """Appending costs one position a token; a block costs itself a step, and once more to become final."""
    for shape, expected in (
        (CAUSAL, [1] * 8),
        ({"block": 4}, [4, 4, 4, 4, 8, 4, 4, 4]),  # the fifth pass makes the first block final
        ({"block": 1}, [1] + [2] * 7),
        # Longer than the window, which moves by a quarter of it, or a block, and is read again.
        (CAUSAL, [1] * 8 + [7, 1] * 6),
        ({"block": 4}, [4, 4, 4, 4, 8, 4, 4, 4, 8, 4, 4, 4]),
    ):
        model, read = tiny_model(V=5, T=8, **shape), []
        model.token_embedding.register_forward_hook(lambda _, idx, out, read=read: read.append(idx[0].shape[1]))
        *_, _ = denoise(model, torch.full((2, len(expected)), MASK), len(expected))
        assert read == expected


def test_a_block_of_all_positions_is_the_canvas():
    """Of a network that sees 16, where blocks of 8 are read as blocks are."""
    x0, xt, holes = texts()
    weights = torch.rand(3, 8, generator=torch.Generator().manual_seed(1))
    losses, gradients = [], []
    for K in (0, 8):
        model = dial(K, T=16)
        assert model.config.K == (K or 2**31)
        losses.append(loss_of(model, x0, xt, holes, weights))
        losses[-1].sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert losses[0].equal(losses[1])
    assert all(a.equal(b) for a, b in zip(*gradients))


def test_attention_is_read_and_written():
    for text in ("canvas", "block:4", "causal"):
        assert str(Attention.from_text(text)) == text
    for text in ("block", "block:0", "block:-1", "canvas:3", "causal:2", "all", ""):
        with pytest.raises(ValueError, match="block:K"):
            Attention.from_text(text)


# --- likelihood ----------------------------------------------------------------------------------


def block_nats(model, text, start, order):
    """Nats of the block of a text (T,) that begins at start, by the chain rule, in an order of its places."""
    canvas = text[: start + len(order)].clone()
    canvas[start:] = model.config.mask_id
    nats = 0.0
    for i in order:
        nats -= model(canvas[None])[0, start + i].log_softmax(-1)[text[start + i]]
        canvas[start + i] = text[start + i]
    return nats


@torch.no_grad()
def exact_bound(model, text):
    """The mean over all orders inside the blocks, one half at a time."""
    T = len(text)
    K = min(model.config.K, T)
    orders = list(permutations(range(K)))
    return sum(block_nats(model, text, s, order) for s in range(0, T, K) for order in orders) / len(orders)


BLOCKS = [(K, shift) for K in (1, 2, 4) for shift in (None, 3)]


@torch.no_grad()
@pytest.mark.parametrize(("K", "shift"), BLOCKS)
def test_the_block_bound_is_the_mean_over_orders_inside_blocks(K, shift):
    """By all sets of holes, each of k holes counting 1 / (k C(K, k)), through the doubled pass."""
    model = tiny_model(V=3, T=4, block=K, shift_id=shift)
    x0 = all_texts(3, 4)[[3, 17, 44, 80]]
    total = torch.zeros(len(x0))
    for places in product((False, True), repeat=K):
        if any(places):
            k = sum(places)
            holes = torch.tensor(places).repeat(4 // K).expand_as(x0)
            weights = torch.full(x0.shape, 1 / (k * math.comb(K, k)))
            total += loss_of(model, x0, x0.masked_fill(holes, 3), holes, weights)
    expected = torch.stack([exact_bound(model, text) for text in x0])
    torch.testing.assert_close(total, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("K", "shift"), [(2, None), (2, 3), (4, None)])
def test_the_draws_of_corrupt_meet_the_block_bound(K, shift, seed):
    model = tiny_model(V=3, T=4, block=K, shift_id=shift)
    text = all_texts(3, 4)[44]
    expected = exact_bound(model, text).item()

    generator = torch.Generator().manual_seed(seed)
    x0, n = text.expand(3000, -1), 3000 * 4 // K  # independent levels
    t, u = 1 - torch.rand(n, 1, generator=generator), torch.rand(n, K, generator=generator)
    corrupted = corrupt(x0.reshape(-1, K), torch.ones(n, K, dtype=torch.bool), t, u, 3, "elbo")
    nats = loss_of(model, x0, *(tensor.view(x0.shape) for tensor in corrupted)) * x0.numel()
    assert abs(nats.mean() - expected) < 3.5 * nats.std() / len(nats) ** 0.5

    # Batches as they are trained on, with stratified levels: independent of each other.
    config = TrainConfig(batch_size=4, context=4, level=Level("uniform"), weight="elbo", prompt_len=Span(0, 0))
    split, generator = text.numpy(), torch.Generator().manual_seed(seed)
    batches = [draw_batch(split, config, generator, model.config) for _ in range(1000)]
    x0, xt, holes, weights = map(torch.cat, zip(*batches))
    nats = 4 * loss_of(model, x0, xt, holes, weights).view(1000, 4).sum(1)
    assert abs(nats.mean() - expected) < 3.5 * nats.std() / 1000**0.5

    # And those of the bound.
    nats, _ = sequence_bounds(model, text.expand(20, -1), draws=60, seed=seed)
    nats = nats.view(60, 20).mean(1)
    assert abs(nats.mean() - expected) < 3.5 * nats.std() / 60**0.5


def test_levels_of_blocks_cover_each_text_and_belong_to_no_place():
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([block_levels(Level("uniform"), 4, 8, generator).view(4, 8) for _ in range(2000)])
    within = (draws * 8).ceil().sort(-1).values  # one in each eighth of (0, 1], or next to it, in every text
    assert (within - torch.arange(1, 9)).abs().max() <= 1
    for levels in draws[:50]:  # and one in each of 32 parts in every batch
        gaps = levels.flatten().sort().values.diff()
        torch.testing.assert_close(gaps, torch.full_like(gaps, 1 / 32), atol=1e-5, rtol=0)
    assert (draws.mean(0) - 0.5).abs().max() < 4.5 * (1 / 12 / 2000) ** 0.5
    blocks = draws.permute(2, 0, 1).flatten(1)
    correlation = torch.corrcoef(blocks)[~torch.eye(8, dtype=torch.bool)]
    assert (correlation + 1 / 7).abs().max() < 0.06  # as of any draw without replacement, at every distance


@torch.no_grad()
def test_the_bound_of_one_token_blocks_is_the_chain_rule_and_exact():
    for shift_id in (None, 3):
        model = tiny_model(V=3, T=4, block=1, shift_id=shift_id)
        x0 = all_texts(3, 4)
        nats, _ = sequence_bounds(model, x0, draws=2)
        torch.testing.assert_close(nats[0], nats[1], atol=1e-5, rtol=0)
        assert (-nats[0]).exp().sum().item() == pytest.approx(1, abs=1e-5)
        expected = torch.stack([block_nats(model, text, i, (0,)) for text in x0[:9] for i in range(4)])
        torch.testing.assert_close(nats[0, :9].float(), expected.view(9, 4).sum(1))


@torch.no_grad()
def test_of_a_causal_model_score_bound_and_loss_are_one_number():
    model = dial(1, shift_id=MASK)
    x0, _, _ = texts(B=16)
    config = TrainConfig(
        batch_size=16,
        context=8,
        level=Level("fixed", 1.0),
        prompt_len=Span(0, 0),
        attention=Attention("causal", 1),
    )
    everything = torch.full((16, 8), MASK), torch.ones(16, 8, dtype=torch.bool), torch.full((16, 8), 1 / 128)
    loss = loss_of(model, x0, *everything).sum().item()
    logits = model(x0)[..., :5]  # what the holes are does not matter: nobody reads them
    assert F.cross_entropy(logits.flatten(0, 1), x0.flatten()).item() == pytest.approx(loss, abs=1e-5)
    assert float(nelbo(model, x0)) == pytest.approx(loss, abs=1e-5)
    score = -log_likelihood(model, x0.flatten(), None, order="left") / 128
    assert score == pytest.approx(loss, abs=1e-5)
    _, xt, holes, weights = draw_batch(x0[0].numpy(), config, torch.Generator(), model.config)
    assert holes.all()
    assert (xt == MASK).all()
    assert weights.unique().tolist() == [1 / 128]


@torch.no_grad()
@pytest.mark.parametrize("order", ["left", "confidence"])
def test_probabilities_of_all_texts_sum_to_one_in_blocks(order):
    model = tiny_model(V=3, T=4, block=2)
    nats = [-log_likelihood(model, text, 4, order=order) for text in all_texts(3, 4)]
    assert torch.tensor(nats).neg().exp().sum().item() == pytest.approx(1, abs=1e-5)


# --- writing -------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("shift_id", [None, 3])
def test_a_causal_model_draws_its_distribution(shift_id, device):
    model = tiny_model(V=3, T=3, block=1, shift_id=shift_id).to(device)
    nats, _ = sequence_bounds(model, all_texts(3, 3))
    *_, written = denoise(model, torch.full((4000, 3), 3, device=device), seeds=range(4000))
    counts = (written.cpu() * torch.tensor([9, 3, 1])).sum(1).bincount(minlength=27)
    assert chi_square_p(counts, (-nats[0]).exp().float()) > 1e-3


@torch.no_grad()
def test_blocks_draw_their_distribution_in_any_order_inside():
    """p(text) is the product over blocks of the mean over both orders of their two tokens."""
    model = tiny_model(V=3, T=4, block=2)
    p = []
    for text in all_texts(3, 4):
        both = [[block_nats(model, text, start, order).neg().exp() for order in ((0, 1), (1, 0))] for start in (0, 2)]
        p.append(math.prod(sum(block) / 2 for block in both))
    *_, written = denoise(model, torch.full((4000, 4), 3), 4, seeds=range(4000))
    counts = (written * torch.tensor([27, 9, 3, 1])).sum(1).bincount(minlength=81)
    assert chi_square_p(counts, torch.stack(p)) > 1e-3


WAYS = {
    "random": {},
    "left": {},
    "confidence": {"guidance": 1.5},
    "entropy": {"steps": 3},
    "threshold": {"tau": 0.4},
    "remask": {"steps": 20},
    "margin": {"revise": 0.3, "steps": 30},
}


@pytest.mark.parametrize("T", [6, 8, 21])  # shorter than the window, as long, and longer: it slides
@pytest.mark.parametrize("K", [1, 2, 4])
@pytest.mark.parametrize("order", WAYS)
def test_with_and_without_the_cache_the_same_is_written(order, K, T, monkeypatch, device):
    for shape in SHAPES:
        model = dial(K, **shape).to(device)
        x0, canvas, _ = texts(T=T, seed=K)
        canvas[0, : T // 2] = x0[0, : T // 2]  # prompts of several lengths
        canvas[1] = MASK
        runs, log_p = [], []
        for kind in (Cache, lambda W: None):
            monkeypatch.setattr(sample, "Cache", kind)
            take = Recorded(draw, canvas.to(device))
            runs.append(list(denoise(model, canvas.to(device), order=order, take=take, **WAYS[order])))
            log_p.append(take.log_p)
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
        monkeypatch.setattr(sample, "Cache", kind)
        runs.append(list(denoise(model, canvas, guidance=1.5)))
    assert all(a.equal(b) for a, b in zip(*runs))


def test_what_stands_after_a_block_is_not_seen():
    for shape in (CAUSAL, {"block": 2}):
        model = tiny_model(V=5, T=8, **shape)
        canvas = torch.tensor([[1, 2, MASK, MASK, 3, 4, 1, MASK], [1, 2, MASK, MASK, 0, 0, 0, MASK]])
        *_, written = denoise(model, canvas, seeds=[7, 7])
        assert written[0, :4].equal(written[1, :4])


@pytest.mark.parametrize("K", [1, 4])
def test_a_row_is_written_the_same_beside_longer_and_shorter_prompts(K):
    model = dial(K, conv=5, shift_id=MASK)
    _, canvas, _ = texts(B=5)
    *_, together = denoise(model, canvas, 8, seeds=range(5))
    for seed, row in enumerate(canvas):
        *_, alone = denoise(model, row[None], 8, seeds=[seed])
        assert alone[0].equal(together[seed])


def test_blocks_of_the_sampler_must_divide_those_of_the_model():
    with pytest.raises(ValueError, match="divide"):
        next(denoise(dial(4), torch.full((1, 8), MASK), block=3))


# --- from append to set --------------------------------------------------------------------------


def opening(steps, open_steps=4):
    """A causal model's weights on a canvas, at a step of its opening; and its config as it was."""
    causal = dial(1, shift_id=MASK, conv=0)
    opened = Transformer(ModelConfig(**{**vars(causal.config), "block": 0}))
    opened.load_state_dict(causal.state_dict())
    run = Run(TrainConfig(max_iters=9, open_steps=open_steps), opened, torch.device("cpu"))
    run.step = steps
    opened.opened = run.opened()
    return causal, opened


def test_an_opening_model_begins_causal_and_ends_as_a_canvas():
    x0, xt, _ = texts()
    causal, opened = opening(0)
    # At step 0 it sees what the causal one would see of the same tokens: xt.
    torch.testing.assert_close(opened.train()(xt), causal(xt))
    for end in (opening(4)[1], opening(0, open_steps=0)[1]):
        assert end.opened is None
        torch.testing.assert_close(end.train()(xt), opened.eval()(xt))  # which is evaluated as what it becomes


@torch.no_grad()
def test_an_opened_canvas_sees_all_but_by_a_shift():
    """Position i reads token i - 1, the last token at position T, and each predicts its own."""
    opened = opening(0, open_steps=0)[1]
    x0, xt, holes = texts()
    plain = Transformer(ModelConfig(**{**vars(opened.config), "shift_id": None, "context": 9}))
    plain.load_state_dict(opened.state_dict())
    read = F.pad(xt, (1, 0), value=MASK)
    torch.testing.assert_close(opened(xt), plain(read)[:, :8])
    weights = torch.full((3, 8), 1 / holes.sum().item())
    nats = F.cross_entropy(plain(read)[:, :8][holes], x0[holes])
    assert loss_of(opened, x0, xt, holes, weights).sum().item() == pytest.approx(nats.item(), abs=1e-5)


def test_a_pair_is_visible_with_the_probability_of_the_step():
    opened = opening(1)[1].train()
    torch.manual_seed(0)
    shares = torch.stack([opened.sight(0, 9, None, "cpu")[0].sees for _ in range(500)]).float().mean(0)
    assert (shares.tril() == torch.ones(9, 9).tril()).all()
    above = shares[torch.ones(9, 9, dtype=torch.bool).triu(1)]
    assert (above - 0.25).abs().max() < 4.5 * (0.25 * 0.75 / 500) ** 0.5


def test_training_opens_a_model_step_by_step():
    _, opened = opening(0)
    run = Run(TrainConfig(max_iters=9, open_steps=2, context=8), opened.train(), torch.device("cpu"))
    batch = *texts()[:2], texts()[2], torch.full((3, 8), 0.1)
    seen = []
    for _ in train(run, [batch] * 3):
        seen.append(opened.opened)
    assert [None if share is None else share.item() for share in seen] == [0, 0.5, None]
