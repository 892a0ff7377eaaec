"""Noise levels, masking rates, holes and their weights."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import SurerWithMoreToSee, chi_square_p, corrupted, level, nats_of_mask, rng, tiny_model

from data.lib.corpus import spaced_windows
from data.lib.flags import Rate, Span
from data.lib.noise import rates_of
from data.lib.training import Run
from model import ModelConfig
from train import TrainConfig, corrupt, draw_batch, draw_levels, loss_of, nelbo, uniform_rates, which_maskable, widened


@given(st.integers(1, 300), st.integers(1, 4), st.integers(0, 10**6))
@settings(deadline=None, max_examples=50)
def test_uniform_levels_are_stratified(B, n, seed):
    """Each segment has B levels, one in each of B intervals of length 1/B."""
    t = draw_levels(level("uniform"), B, n, rng(seed))
    assert t.shape == (B, n)
    assert ((t > 0) & (t <= 1)).all()
    gaps = t.sort(0).values.diff(dim=0)
    assert B == 1 or (gaps - 1 / B).abs().max() < 1e-5


@pytest.mark.parametrize(("i", "j"), [(0, 1), (1, 2)])
def test_levels_of_segments_are_independent(i, j):
    """Whatever order the levels of segment i have in the batch, all orders of those of segment j are equally likely."""
    B, draws, generator = 3, 3000, rng()
    t = torch.stack([draw_levels(level("uniform"), B, 3, generator) for _ in range(draws)])  # (draws, B, 3)
    one, other = t[..., i], t[..., j]
    first, second, _ = other.gather(1, one.argsort(1)).argsort(1).unbind(1)  # places of its lowest levels, (draws,)
    orders = (1 - torch.eye(B)).flatten() / 6  # by their first and second place
    assert chi_square_p((first * B + second).bincount(minlength=B * B), orders) > 1e-3
    offsets = torch.stack((one, other))[..., 0] * B % 1  # where in its interval of 1/B each level is, (2, draws)
    assert abs(torch.corrcoef(offsets)[0, 1]) < 4.5 / draws**0.5


def test_stratified_levels_lower_the_variance_of_the_loss():
    """In batches of 16 the mean is that of independent levels, and the variance is at most a third."""
    generator, n_batches = rng(), 500
    x0 = torch.zeros(n_batches * 16, 64, dtype=torch.int64)

    def losses(draw):
        t = torch.cat([draw() for _ in range(n_batches)])
        u = torch.rand(x0.shape, generator=generator)
        batch = corrupted(x0, torch.ones(x0.shape, dtype=torch.bool), t, u, 3)
        return loss_of(SurerWithMoreToSee(), x0, *batch).view(n_batches, -1).sum(1) * n_batches

    stratified = losses(lambda: draw_levels(level("uniform"), 16, 1, generator))
    independent = losses(lambda: 1 - torch.rand(16, 1, generator=generator))
    assert stratified.var() < independent.var() / 3
    assert stratified.mean() == pytest.approx(independent.mean().item(), rel=0.02)


def test_bell_levels_are_the_sigmoid_of_a_normal():
    """2605.13026."""
    t = draw_levels(level("bell:0.8"), 100_000, 1, rng())
    normal = torch.distributions.Normal(0.0, 0.8)
    for at in (0.05, 0.3, 0.5, 0.9):
        below = normal.cdf(torch.logit(torch.tensor(at))).item()
        assert (t < at).float().mean().item() == pytest.approx(below, abs=1e-4)


def test_a_bell_widens_over_the_run_and_no_other_level_does():
    def level_at(step, name="bell:1.2", **flags):
        run = Run(TrainConfig(max_iters=8, level=level(name), **flags), tiny_model(), torch.device("cpu"))
        run.step = step
        return widened(run.config, run.progress())

    assert [level_at(step).value for step in (0, 2, 8)] == pytest.approx([0, 0.3, 1.2])
    assert [level_at(step, widen=0.5).value for step in (2, 4, 8)] == pytest.approx([0.6, 1.2, 1.2])
    assert level_at(0, widen=0).value == 1.2
    assert level_at(2, "grid:10") == level("grid:10")
    assert draw_levels(level_at(0), 64, 1, rng()).tolist() == [[0.5]] * 64


@given(st.floats(0.01, 1), st.integers(0, 20), st.integers(0, 10**6))
@settings(deadline=None, max_examples=50)
def test_prompt_is_never_masked(t, prompt_len, seed):
    x0 = torch.zeros(50, 20, dtype=torch.int64)
    text = which_maskable(x0, torch.full((50, 1), prompt_len), ())
    u = torch.rand(x0.shape, generator=rng(seed))
    xt, holes = corrupt(x0, torch.full(x0.shape, t), text, u, 3)
    assert xt.equal(x0.masked_fill(holes, 3))
    assert not holes[:, :prompt_len].any()
    assert t < 1 or holes[:, prompt_len:].all()


def test_special_tokens_are_never_masked_and_never_counted():
    """Token 1 is not text, so it stays visible, and only the other tokens count in the bound."""
    model = tiny_model(V=3, T=3, special_ids=(1, 3))
    x0 = torch.tensor([[0, 1, 2]])
    batch = torch.arange(1000).numpy() % 3
    config = TrainConfig(context=3, batch_size=64, level=level("1"), prompt_len=Span(0, 0))
    _, _, holes, weights = draw_batch(batch, config, rng(), model.config)
    assert holes.float().mean() == pytest.approx(2 / 3)
    assert weights.unique().tolist() == pytest.approx([1 / (2 * 64)])
    first, last = torch.eye(3, dtype=torch.bool)[[0, 2]]
    total = sum(nats_of_mask(model, x0, mask) for mask in (first | last, first, last))
    expected = total / 4  # the mean of the two orders, over two tokens
    assert nelbo(model, x0, draws=20_000, batch_size=20_000) == pytest.approx(expected.item(), rel=0.02)


@pytest.mark.parametrize("block", [None, 64])
def test_one_level_for_the_whole_batch(block):
    """RoBERTa diffusion draws t from 0.1, 0.2 .. 1 for each batch (nathan.rs). Blocks share it, too."""
    flags = {"one_level": True, "context": 4096, "batch_size": 4, "prompt_len": Span(0, 0)}
    config, levels = TrainConfig(level=level("grid:10"), **flags), set()
    for seed in range(60):
        _, _, holes, _ = draw_batch(torch.zeros(5000).numpy(), config, rng(seed), ModelConfig(block=block))
        rates = holes.float().mean(1)
        assert rates.max() - rates.min() < 0.06
        levels.add(round(rates.mean().item(), 1))
    assert levels == {k / 10 for k in range(1, 11)}


def test_each_token_is_masked_with_the_probability_of_its_level():
    t = torch.tensor([[0.1], [0.5], [0.9]])
    everything = torch.ones(3, 100, dtype=torch.bool)
    draws = [torch.rand(3, 100, generator=rng(i)) for i in range(400)]
    holes = torch.stack([corrupt(everything.long(), t.expand(3, 100), everything, u, 3)[1] for u in draws]).float()
    torch.testing.assert_close(holes.mean((0, 2))[:, None], t, atol=0.01, rtol=0)
    pairs = (holes[..., ::2] * holes[..., 1::2]).mean((0, 2))[:, None]  # independent of its neighbour
    torch.testing.assert_close(pairs, t**2, atol=0.01, rtol=0)


def test_weights_of_holes():
    t = torch.tensor([[0.25], [1.0]])
    u = torch.tensor([[0.9, 0.1, 0.9, 0.9], [0.9, 0.9, 0.9, 0.9]])
    x0 = torch.zeros(2, 4, dtype=torch.int64)
    text = which_maskable(x0, torch.tensor([[0], [1]]), ())
    _, holes, mean = corrupted(x0, text, t, u, 3, "mean")
    assert holes.tolist() == [[False, True, False, False], [False, True, True, True]]
    assert mean[holes].tolist() == [0.25] * 4  # an average, so the weights add up to 1
    _, _, elbo = corrupted(x0, text, t, u, 3, "elbo")
    torch.testing.assert_close(elbo, (1 / t / 7).expand(2, 4))  # 4 + 3 tokens could have been masked
    _, _, elbo = corrupted(x0, text, t, u, 3, "elbo", lambda t, x0: (t**2, 2 * t))
    torch.testing.assert_close(elbo, (2 / t / 7).expand(2, 4))  # rate'/rate
    assert corrupted(x0, text, t, torch.ones(2, 4), 3, "mean")[2].isfinite().all()  # without any hole


@given(st.floats(0, 1), st.integers(2, 40), st.floats(0.01, 50), st.floats(0.01, 2), st.integers(0, 10**6))
@settings(deadline=None, max_examples=200)
def test_rates_rise_from_0_to_1(t, T, slant, spindle, seed):
    occurrences = torch.randint(1000, (7,), generator=rng(seed)).tolist()
    x0 = torch.randint(7, (3, T), generator=rng(seed))
    slanted = rates_of(Rate("slant", slant), uniform_rates, ModelConfig())
    spindled = rates_of(Rate("spindle", spindle), uniform_rates, ModelConfig(), occurrences)
    for rates in (uniform_rates, slanted, spindled):
        for at in (0.0, t / 2, t, 1.0):
            rate, _ = rates(torch.full((3, T), at), x0)
            assert rate.shape == (3, T)
            assert ((rate >= 0) & (rate <= 1)).all()
        assert rates(torch.zeros(3, T), x0)[0].max() < 1e-5
        assert rates(torch.ones(3, T), x0)[0].min() > 1 - 1e-5
    before, after = (slanted(torch.full((3, T), at), x0)[0] for at in (t / 2, t))
    assert (before <= after + 1e-6).all()
    assert (after.diff() >= -1e-6).all()  # the right end is masked first
    rate, slope = uniform_rates(torch.full((3, T), t), x0)
    assert rate.eq(rate.new_tensor(t)).all()
    assert slope == 1


def test_the_slope_of_a_slanted_rate_is_its_derivative_and_each_block_is_slanted():
    rates, x0 = rates_of(Rate("slant", 0.7), uniform_rates, ModelConfig(block=4)), torch.zeros(50, 8, dtype=torch.int64)
    t = (torch.arange(50)[:, None] + 0.5).expand(50, 8) / 50
    rate, slope = rates(t, x0)
    below, above = rates(t - 1e-3, x0)[0], rates(t + 1e-3, x0)[0]
    smooth = (below > 0) & (above < 1) | (below == 1)  # not where the rate begins or ceases to rise
    torch.testing.assert_close((slope * torch.ones(50, 8))[smooth], ((above - below) / 2e-3)[smooth], atol=1e-3, rtol=0)
    assert rate[:, :4].equal(rate[:, 4:])
    assert rate[25, 0] < rate[25, 1] < rate[25, 2] < rate[25, 3]


def test_informative_tokens_are_masked_first():
    """Their rate is larger by 0.3 sin(pi t) (1 - mean / own), 0 for a token of mean information (2211.15029)."""
    occurrences, x0 = [70, 20, 7], torch.tensor([[0, 1, 2, 0]])
    nats = -torch.tensor([0.71, 0.21, 0.08]).log()[x0]  # each counts once more
    information = 1 - nats.mean() / nats
    rates = rates_of(Rate("spindle", 0.3), uniform_rates, ModelConfig(), occurrences)(torch.full((1, 4), 0.5), x0)[0][0]
    assert rates[0] == rates[3] < rates[1] < rates[2]
    torch.testing.assert_close(rates[2], 0.5 + 0.3 * information[0, 2])
    by_blocks = rates_of(Rate("spindle", 0.3), uniform_rates, ModelConfig(block=2), occurrences)(
        torch.full((1, 4), 0.5), x0
    )[0]
    nats = nats.view(2, 2)  # a block is a text of its own
    information = (1 - nats.mean(1, keepdim=True) / nats).view(1, 4)
    torch.testing.assert_close(by_blocks, (0.5 + 0.3 * information).clamp(0, 1))


def test_batches_are_windows_of_the_corpus_with_prompts_of_every_length():
    corpus = np.arange(1000, dtype=np.uint16)
    config = TrainConfig(batch_size=400, context=16, prompt_len=Span(2, 5), level=level("1"))
    x0, xt, holes, weights = draw_batch(corpus, config, rng(), ModelConfig(mask_id=1000))
    assert xt.equal(x0.masked_fill(holes, 1000))
    assert (x0.diff(dim=1) == 1).all()
    assert x0.min() < 20
    assert x0.max() > 980
    assert set((~holes).sum(1).tolist()) == {2, 3, 4, 5}
    assert weights.shape == (400, 16)


def test_a_share_of_the_visible_has_a_loss_and_half_of_it_is_replaced():
    """BERT keeps 10% and replaces 10% (1810.04805). Prompts, holes and special tokens stay as they are."""
    config = TrainConfig(batch_size=3000, context=64, level=level("0.5"), prompt_len=Span(8, 8), visible=0.2)
    shape = ModelConfig(vocab_size=13, mask_id=12, special_ids=(3, 12))
    split = torch.randint(0, 12, (5000,), generator=rng()).numpy()
    x0, xt, asked, weights = draw_batch(split, config, rng(), shape)
    masked, special = xt == 12, x0 == 3
    assert not asked[:, :8].any()
    assert not (asked & special).any()
    assert (masked <= asked).all()
    visible = ~masked & ~special & (torch.arange(64) >= 8)
    assert asked[visible].float().mean() == pytest.approx(0.2, abs=0.01)
    assert xt[~asked].equal(x0[~asked])
    replaced = xt[asked & ~masked] != x0[asked & ~masked]
    assert replaced.float().mean() == pytest.approx(0.5 * 10 / 11, abs=0.02)  # one of 11 is the same by chance
    assert not torch.isin(xt[asked & ~masked], torch.tensor([3, 12])).any()
    assert (weights[asked] * asked.sum()).unique().tolist() == pytest.approx([1])


def test_windows_cover_the_split_once():
    tokens, prompt_len = spaced_windows(np.arange(103, dtype=np.uint16), 10, 10**9)
    assert tokens.shape == (10, 10)
    assert len(np.unique(tokens)) == 100
    assert prompt_len.tolist() == [[0]] * 10  # no text has a prompt of its own
    assert spaced_windows(np.arange(103, dtype=np.uint16), 10, 35)[0].shape == (3, 10)
