"""Noise, loss, likelihood and learning: the facts that the method rests on."""

import math
import sys
from itertools import permutations, product
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode
from toys import Conditionals, all_texts, chi_square_p, make_book, tiny_model

import data.lib.corpus
import train
from data.lib.corpus import spaced_windows
from data.lib.flags import Level, Rate, Span
from data.lib.kernels import cross_entropy, rows_at_once
from data.lib.noise import rates_of, relative_information, unigram_nats
from data.lib.optimizer import Muon, orthogonalised
from data.lib.report import standard_error
from data.lib.train_settings import attention_of
from data.lib.training import Run
from model import ModelConfig, load_checkpoint
from sample import denoise, log_likelihood
from train import (
    METHODS,
    STRATA,
    TrainConfig,
    corrupt,
    draw_batch,
    draw_levels,
    hole_weights,
    learning_rate,
    loss_of,
    nelbo,
    sequence_bounds,
    uniform_rates,
    update,
    which_maskable,
    widened,
)

ATTENTIONS = [{}, {"shift_id": 8}, {"block": 4}, {"block": 1, "shift_id": 8}]  # of models with V = 8


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def level(text):
    return Level.from_text(text)


def corrupted(x0, maskable, t, u, mask_id, weight="elbo", rates=uniform_rates):
    """The corrupted text, its holes and their weights, (B, T) each, at levels t (B, 1)."""
    rate, slope = rates(t.expand(x0.shape), x0)
    xt, holes = corrupt(x0, rate, maskable, u, mask_id)
    return xt, holes, hole_weights(weight, rate, slope, holes, maskable)


def nats_of_mask(model, x0, holes):
    """-log p of each text's tokens at the holes (T,), together, given the rest: (N,)."""
    xt = x0.masked_fill(holes, model.config.mask_id)
    nats = F.cross_entropy(model(xt).flatten(0, 1), x0.flatten(), reduction="none").view(x0.shape)
    return (nats * holes).sum(-1)


def mean_nats_over_all_orders(model, x0):
    """Nats per token of each text, by the chain rule, averaged over every order of generation: (N,)."""
    T = x0.shape[1]
    orders = list(permutations(range(T)))
    total = torch.zeros(len(x0))
    for order in orders:
        holes = torch.ones(T, dtype=torch.bool)
        for i in order:
            alone = torch.zeros(T, dtype=torch.bool)
            alone[i] = True
            xt = x0.masked_fill(holes, model.config.mask_id)
            nats = F.cross_entropy(model(xt).flatten(0, 1), x0.flatten(), reduction="none").view(x0.shape)
            total += (nats * alone).sum(-1)
            holes[i] = False
    return total / len(orders) / T


# --- the bound -----------------------------------------------------------------------------------


@torch.no_grad()
def test_nelbo_equals_mean_over_all_orders(device):
    """The bound is the likelihood under a random order (2406.03736, 2110.02037)."""
    model = tiny_model(V=3, T=3)
    x0 = all_texts(3, 3)[[1, 5, 10, 15, 26]]
    exact = mean_nats_over_all_orders(model, x0).mean().item()
    estimate = nelbo(model.to(device), x0, draws=20_000, batch_size=20_000)
    assert estimate == pytest.approx(exact, rel=0.01)


@torch.no_grad()
def test_nelbo_equals_the_integral_over_levels():
    """Each set of k holes has probability t^k (1-t)^(T-k), which with weight 1/t integrates to a beta function."""
    model = tiny_model(V=3, T=4)
    x0 = all_texts(3, 4)[[7, 40]]
    exact = 0.0
    for holes in product((False, True), repeat=4):
        if k := sum(holes):
            beta = math.gamma(k) * math.gamma(5 - k) / math.gamma(5)
            exact += beta * nats_of_mask(model, x0, torch.tensor(holes)).mean().item() / 4
    assert mean_nats_over_all_orders(model, x0).mean().item() == pytest.approx(exact, rel=1e-5)
    assert nelbo(model, x0, draws=50_000, batch_size=50_000) == pytest.approx(exact, rel=0.01)


def test_nelbo_of_the_perfect_denoiser_is_the_entropy():
    """No bound is tighter, because every order of the true conditionals gives the text's own probability."""
    joint = torch.rand(2, 2, 2, generator=rng(3)) + 0.05
    model = Conditionals(joint)
    texts = all_texts(2, 3)
    nats = torch.tensor([nelbo(model, text[None], draws=3000, batch_size=3000) for text in texts])
    probability = model.joint.flatten()
    entropy = -(probability * probability.log()).sum().item() / 3
    assert (probability * nats).sum().item() == pytest.approx(entropy, rel=0.02)


@torch.no_grad()
@pytest.mark.parametrize("N", [1, 2, 4])
def test_grid_with_elbo_is_the_d3pm_bound(N):
    """It is the sum over N steps of KL(q(x_{n-1} | x_n, x0) || p(x_{n-1} | x_n)), enumerated here (2107.03006)."""
    V, T = 3, 3
    model = tiny_model(V, T)
    x0 = all_texts(V, T)[[5]]
    d3pm, ours = 0.0, 0.0
    for n in range(1, N + 1):
        t, s = n / N, (n - 1) / N
        for pattern in product((False, True), repeat=T):
            holes = torch.tensor(pattern)[None]
            k = int(holes.sum())
            if k == 0 or t**k * (1 - t) ** (T - k) == 0:
                continue
            chance = t**k * (1 - t) ** (T - k)
            p = model(x0.masked_fill(holes, V)).softmax(-1)[0]  # (T, V + 1)
            for i in holes[0].nonzero().flatten():
                stay = s / t  # the chance that a hole at step n was one at n - 1
                q_step = (1 - stay) * F.one_hot(x0[0, i], V + 1) + stay * F.one_hot(torch.tensor(V), V + 1)
                p_step = (1 - stay) * p[i] + stay * F.one_hot(torch.tensor(V), V + 1)
                d3pm += chance * torch.special.xlogy(q_step, q_step / p_step).nansum().item()
            everything, t = torch.ones(1, T, dtype=torch.bool), torch.tensor([[t]])
            batch = corrupted(x0, everything, t, 1.0 - holes.float(), V)  # u is 0 at the holes
            assert batch[1].equal(holes)
            ours += chance / N * loss_of(model, x0, *batch).item() * T
    assert ours == pytest.approx(d3pm, rel=1e-5)
    levels = draw_levels(level(f"grid:{N}"), 10 * N, 1, rng())
    flags = {"level": level(f"grid:{N}"), "draws": 20_000, "batch_size": 20_000}
    assert nelbo(model, x0, **flags) * T == pytest.approx(d3pm, rel=0.02)
    values, counts = levels.unique(return_counts=True)
    torch.testing.assert_close(values, torch.arange(1, N + 1) / N)
    assert counts.tolist() == [10] * N


@torch.no_grad()
@pytest.mark.parametrize(("name", "rate"), [("uniform", "t"), ("grid:1000", "t"), ("uniform", "slant:0.7")])
def test_the_elbo_loss_is_the_bound(name, rate):
    """They agree in expectation. D3PM's bound is the same with many steps. Under a slant the weight is rate'/rate."""
    model, rate = tiny_model(V=3, T=3), Rate.from_text(rate)
    x0 = all_texts(3, 3)[[5]].expand(200_000, -1)
    t = draw_levels(level(name), len(x0), 1, rng())
    everything = torch.ones(len(x0), 3, dtype=torch.bool)
    rates, expected = uniform_rates, mean_nats_over_all_orders(model, x0[:1]).item()
    if rate.kind == "slant":
        rates = rates_of(rate, uniform_rates, model.config)
        expected = nelbo(model, x0[:1], rate=rate, draws=40_000, batch_size=40_000)
    batch = corrupted(x0, everything, t, torch.rand(x0.shape, generator=rng(1)), 3, rates=rates)
    assert loss_of(model, x0, *batch).sum().item() == pytest.approx(expected, rel=0.02)


def test_nelbo_repeats_itself_and_leaves_the_model_as_it_was():
    model = tiny_model().train()
    texts = all_texts(3, 3)
    assert nelbo(model, texts, seed=4) == nelbo(model, texts, seed=4) != nelbo(model, texts, seed=5)
    assert model.training


def test_nelbo_does_not_depend_on_how_it_is_batched():
    model, texts = tiny_model(), all_texts(3, 3)
    assert nelbo(model, texts, batch_size=1) == pytest.approx(nelbo(model, texts, batch_size=100), rel=1e-5)


def test_a_pass_has_no_more_rows_than_its_logits_allow(monkeypatch):
    """64 rows of a small model fit, but only one of LLaDA, with 4,096 positions and a vocabulary of 126,464."""
    assert rows_at_once(64, 256, 257) == 64
    assert rows_at_once(64, 256, 50_265) == 41
    assert rows_at_once(64, 4096, 126_464) == 1
    model, texts, sizes = tiny_model(), all_texts(3, 3), []
    model.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    monkeypatch.setattr("data.lib.kernels.rows_at_once", lambda most, T, V: 2)
    monkeypatch.setattr("sample.rows_at_once", lambda most, T, V: 2)
    nelbo(model, texts)
    log_likelihood(model, texts.flatten(), order="left")
    assert max(sizes) == 2


def test_prompt_is_not_counted_by_nelbo():
    """Given its first two tokens, a text of three can only be written in one order, from left to right."""
    model, text = tiny_model(V=3, T=3), all_texts(3, 3)[[11]]
    last = nats_of_mask(model, text, torch.tensor([False, False, True])).item()
    assert nelbo(model, text, prompt_len=2, draws=50_000, batch_size=50_000) == pytest.approx(last, rel=0.02)


# --- levels, holes, weights ----------------------------------------------------------------------


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


class SurerWithMoreToSee(torch.nn.Module):
    """Gives token 0 the larger probability the fewer masks there are, as any good denoiser does."""

    config = ModelConfig(vocab_size=4, mask_id=3)

    def __init__(self):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))  # says which device the model is on

    def forward(self, idx, where, clean=None, cache=None):
        masked = (idx == 3).float().mean(1, keepdim=True)  # (B, 1)
        right = (1 - masked * 2 / 3)[..., None].expand(*idx.shape, 1)
        wrong = (1 - right) / 2
        return torch.cat((right, wrong, wrong, torch.zeros_like(right)), -1).log()[where]


@pytest.mark.parametrize("levels", ["uniform", "grid:4"])
def test_the_bound_is_the_same_whatever_rates_and_weights_one_trains_with(levels, monkeypatch):
    """If you try other rates or weights by hand, you still read a bound."""
    x0 = torch.randint(3, (8, 16), generator=rng())
    before = nelbo(SurerWithMoreToSee(), x0, level=level(levels))
    monkeypatch.setattr("train.uniform_rates", lambda t, x0: (t**2, 2 * t))
    monkeypatch.setattr("train.hole_weights", lambda weight, rate, *_: torch.ones_like(rate))
    assert nelbo(SurerWithMoreToSee(), x0, level=level(levels)) == before


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


@pytest.mark.parametrize(("name", "values"), [("grid:4", {0.25, 0.5, 0.75, 1.0}), ("0.25", {0.25}), ("1", {1.0})])
def test_levels_of_a_grid_and_fixed_levels(name, values):
    assert set(draw_levels(level(name), 64, 1, rng()).flatten().tolist()) == values


@pytest.mark.parametrize("name", ["uniform", "bell:1.2", "bell:0.123456789", "grid:100", "0.15", "1"])
def test_a_level_is_its_text(name):
    assert Level.from_text(str(Level.from_text(name))) == Level.from_text(name)


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


def test_a_rate_is_its_text():
    for text in ("t", "slant:1", "slant:0.25", "spindle:0.3"):
        assert str(Rate.from_text(text)) == text
    for text in ("t:1", "slant", "slant:0", "slant:-1", "slant:inf", "spindle:", "spindle:x", "u", ""):
        with pytest.raises(ValueError, match="slant:W"):
            Rate.from_text(text)


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
    occurrences = [70, 20, 7]
    nats = unigram_nats(occurrences)
    torch.testing.assert_close(nats, -torch.tensor([0.71, 0.21, 0.08]).log())  # each counts once more
    x0 = torch.tensor([[0, 1, 2, 0]])
    information = relative_information(x0, nats)
    torch.testing.assert_close(information, 1 - nats[x0].mean() / nats[x0])
    rates = rates_of(Rate("spindle", 0.3), uniform_rates, ModelConfig(), occurrences)(torch.full((1, 4), 0.5), x0)[0][0]
    assert rates[0] == rates[3] < rates[1] < rates[2]
    torch.testing.assert_close(rates[2], 0.5 + 0.3 * information[0, 2])
    by_blocks = rates_of(Rate("spindle", 0.3), uniform_rates, ModelConfig(block=2), occurrences)(
        torch.full((1, 4), 0.5), x0
    )[0]
    information = relative_information(x0.view(2, 2), nats).view(1, 4)  # a block is a text of its own
    torch.testing.assert_close(by_blocks, (0.5 + 0.3 * information).clamp(0, 1))


@pytest.mark.parametrize("prompt_len", [0, 1])
def test_the_slanted_bound_is_an_integral_over_levels(prompt_len):
    """Slow sums over levels and over all sets of holes, with weight rate'/rate, give the same number."""
    model, slant, T = tiny_model(V=3, T=3), 0.7, 3
    x0, exact, n = all_texts(3, T)[[5]], 0.0, 4000
    with torch.no_grad():
        nats = {
            holes: F.cross_entropy(model(x0.masked_fill(torch.tensor(holes), 3))[0], x0[0], reduction="none").tolist()
            for holes in product((False, True), repeat=T)
            if not any(holes[:prompt_len])
        }
    for k in range(n):
        t = (k + 0.5) / n
        raw = [t * (1 + slant) - slant * (1 - i / (T - 1)) for i in range(T)]
        rates = [min(max(rate, 0), 1) for rate in raw]
        for holes in nats:
            chance = math.prod(rates[i] if holes[i] else 1 - rates[i] for i in range(prompt_len, T))
            for i in range(T):
                if holes[i] and 0 < raw[i] < 1:
                    exact += chance * (1 + slant) / rates[i] * nats[holes][i] / n / (T - prompt_len)
    flags = {"draws": 100_000, "batch_size": 50_000, "prompt_len": prompt_len}
    assert nelbo(model, x0, rate=Rate("slant", slant), **flags) == pytest.approx(exact, rel=0.01)


def test_the_slanted_bound_of_the_perfect_denoiser_is_the_entropy_and_its_end_is_left_to_right():
    joint = torch.rand(2, 2, 2, generator=rng(3)) + 0.05
    model = Conditionals(joint)
    flags = {"draws": 10_000, "batch_size": 10_000, "rate": Rate("slant", 1.0)}
    nats = torch.tensor([nelbo(model, text[None], **flags) for text in all_texts(2, 3)])
    probability = model.joint.flatten()
    entropy = -(probability * probability.log()).sum().item() / 3
    assert (probability * nats).sum().item() == pytest.approx(entropy, rel=0.02)
    model, text = tiny_model(V=3, T=3), all_texts(3, 3)[[11]]
    ahead = [torch.tensor([i >= k for i in range(3)]) for k in range(3)]
    with torch.no_grad():
        chain = 0.0
        for k, holes in enumerate(ahead):
            logits = model(text.masked_fill(holes, 3))[0, k]
            chain += F.cross_entropy(logits[None], text[:, k]).item() / 3
    flags = {"draws": 50_000, "batch_size": 50_000, "rate": Rate("slant", 4.0)}  # 2 or more: no two rates overlap
    assert nelbo(model, text, **flags) == pytest.approx(chain, rel=0.03)


@pytest.mark.parametrize("strata", [STRATA, 1])
def test_standard_error_is_the_spread_over_seeds(strata):
    """It is not larger because some texts are harder than others."""
    x0 = (torch.arange(200)[:, None] % 3 == 0).long().expand(-1, 64)
    assert standard_error.__defaults__ == (STRATA,)
    bounds, squares = [], []
    for seed in range(300):
        nats, n_maskable = sequence_bounds(SurerWithMoreToSee(), x0, draws=2, strata=strata, seed=seed)
        bounds.append(nats.mean(0).sum().item() / n_maskable.sum().item())
        squares.append(standard_error(nats, n_maskable, strata) ** 2)
    spread = torch.tensor(bounds).std().item()
    assert (sum(squares) / len(squares)) ** 0.5 == pytest.approx(spread, rel=0.15)


def test_stratified_levels_lower_the_variance_of_the_bound():
    """It is at most a third of that of independent levels."""
    x0 = torch.zeros(200, 64, dtype=torch.int64)
    stratified, independent = (
        sequence_bounds(SurerWithMoreToSee(), x0, draws=300, strata=strata)[0].sum(1).var() for strata in (STRATA, 1)
    )
    assert stratified < independent / 3


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


# --- methods -------------------------------------------------------------------------------------

TABLE = {  # level, rate, weight and attention of each method
    "default": ("bell:1.2", "t", "mean", "canvas"),
    "bert": ("0.15", "t", "mean", "canvas"),
    "roberta-diffusion": ("grid:10", "t", "mean", "canvas"),
    "d3pm": ("grid:100", "t", "elbo", "canvas"),
    "mdlm": ("uniform", "t", "elbo", "canvas"),
    "ar-diffusion": ("uniform", "slant:1", "elbo", "canvas"),
    "diffusionbert": ("uniform", "spindle:0.3", "mean", "canvas"),
    "block-diffusion": ("uniform", "t", "elbo", "block:16"),
    "gpt": ("1.0", "t", "mean", "causal"),
    "diffugpt": ("uniform", "t", "elbo", "shifted"),
}


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    folder = tmp_path_factory.mktemp("book")
    make_book(folder)
    return folder / "data"


def test_the_table_has_all_methods():
    assert METHODS.keys() == TABLE.keys()


@pytest.mark.parametrize("method", TABLE)
def test_a_method_trains_as_the_table_says(method, book, tmp_path, monkeypatch):
    """The config, the model and the batches have this level, rate, weight and attention."""
    steps = []

    def watch(*args):
        *args, rates = args  # what train.py passes last

        def watched(t, x0):
            steps.append([t, rates])
            return rates(t, x0)

        batch = draw_batch(*args, watched)
        steps[-1] += batch
        return batch

    monkeypatch.setattr("train.draw_batch", watch)
    monkeypatch.setattr(data.lib.corpus, "DATA", book)
    small = "--n_layer 1 --n_embd 16 --context 32 --batch_size 4 --eval_tokens 64 --device cpu --dtype float32"
    flags = f"--method {method} --data book --out_dir {tmp_path}/out --max_iters 2 --evals 1 {small}"
    monkeypatch.setattr(sys, "argv", ["train.py", *flags.split()])
    train.main()

    level, rate, weight, attention = TABLE[method]
    model, _, checkpoint = load_checkpoint(tmp_path / "out" / "last.pt")
    config = checkpoint["train"]
    assert checkpoint["step"] == len(steps) == 2
    assert (config["level"], config["rate"], config["weight"], config["attention"]) == TABLE[method]
    assert str(attention_of(model.config)) == attention
    assert all(p.isfinite().all() for p in model.parameters())

    t, rates, x0, _, holes, weights = steps[-1]
    by_segment = t.unflatten(1, (-1, model.config.block or 32))  # (B, segments, K)
    assert by_segment.eq(by_segment[..., :1]).all()
    one_level = level in ("0.15", "1.0") or method == "roberta-diffusion"
    assert len(t.unique()) == (1 if one_level else by_segment[..., 0].numel())
    assert method != "gpt" or holes.all()

    half = torch.full((1, 32), 0.5)
    alike, mixed = torch.full((1, 32), ord("e")), torch.full((1, 32), ord("e")).index_fill(1, torch.arange(9), ord("~"))
    alike, mixed = rates(half, alike)[0], rates(half, mixed)[0]
    assert torch.allclose(alike, half) == (not rate.startswith("slant"))  # which depends on the place
    assert torch.allclose(alike, mixed) == (not rate.startswith("spindle"))  # which depends on the token

    token_rate, slope = rates(t, x0)
    mean = torch.full_like(t, 1 / holes.sum())
    elbo = slope / token_rate / holes.numel()
    torch.testing.assert_close(weights[holes], {"mean": mean, "elbo": elbo}[weight][holes])


# --- learning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_training_overfits_one_batch(optimizer, device):
    torch.manual_seed(0)
    config = TrainConfig(
        batch_size=4,
        context=16,
        level=level("0.5"),
        lr=0.01,
        max_iters=60,
        warmup=0,
        optimizer=optimizer,
        prompt_len=Span(0, 0),
    )
    model = tiny_model(V=8, T=16, n_embd=32).to(device)
    run = Run(config, model.train(), device)
    batch = draw_batch(np.arange(200, dtype=np.uint16) * 7 % 8, config, rng(), model.config)
    losses = [update(run, batch)[0] for _ in range(60)]
    assert losses[0] > 1.5
    assert losses[-1] < 0.1


def test_accumulated_micro_batches_have_the_gradient_of_the_whole_batch():
    """This holds for weight mean too, where micro-batches have different numbers of holes."""
    corpus = torch.randint(0, 3, (500,), generator=rng()).numpy().astype(np.uint16)
    gradients = []
    for grad_accum in (1, 4):
        model = tiny_model(V=3, T=8)
        config = TrainConfig(
            batch_size=8,
            context=8,
            grad_accum=grad_accum,
            prompt_len=Span(0, 3),
            dtype="float32",
            grad_clip=0,
            max_iters=9,
        )
        run = Run(config, model, torch.device("cpu"))
        run.optimizer.zero_grad = lambda: None  # keep them to be compared
        update(run, draw_batch(corpus, config, rng(), model.config))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients)


def test_in_float16_an_update_with_a_gradient_that_is_not_finite_changes_no_weight():
    """It is enough that one of Muon's parameters has one, although all of AdamW's gradients are finite."""
    model = tiny_model(V=3, T=8)
    config = TrainConfig(batch_size=4, context=8, prompt_len=Span(0, 0), dtype="float16", max_iters=9)
    run = Run(config, model, torch.device("cpu"))
    before = [p.clone() for p in model.parameters()]
    model.layers[0].mlp.up.weight.register_hook(lambda gradient: gradient * torch.inf)
    _, norm = update(run, draw_batch(np.arange(100, dtype=np.uint16) % 3, config, rng(), model.config))
    assert not math.isfinite(norm)
    assert all(p.equal(q) for p, q in zip(model.parameters(), before))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_layer_computed_again_has_the_same_gradient_and_keeps_less(dropout):
    gradients, kept = [], []
    for again in (False, True):
        model = tiny_model(V=8, T=64, n_layer=4, dropout=dropout)
        config = TrainConfig(batch_size=4, context=64, prompt_len=Span(0, 0), max_iters=9, grad_checkpoint=again)
        run = Run(config, model.train(), torch.device("cpu"))
        run.optimizer.zero_grad = lambda: None  # keep them to be compared
        batch = draw_batch(np.arange(200, dtype=np.uint16) % 8, config, rng(), model.config)
        sizes = []

        def keep(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            update(run, batch)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        kept.append(sum(sizes))
    assert gradients[0].equal(gradients[1])
    assert kept[1] < kept[0]


@pytest.mark.parametrize("attention", ATTENTIONS, ids=str)
def test_the_number_of_holes_changes_and_the_model_is_compiled_once(attention):
    counter = CompileCounter()
    model = tiny_model(V=8, T=128, **attention)
    model.compile(backend=counter, fullgraph=True)
    config = TrainConfig(batch_size=6, context=128, grad_accum=2, compile=True, max_iters=9)
    config.prompt_len = Span(0, 3)
    run, split = Run(config, model.train(), torch.device("cpu")), np.arange(999, dtype=np.uint16) % 8
    batches = [draw_batch(split, config, rng(seed), model.config, level=level("0.6")) for seed in range(9)]
    assert len({holes.sum().item() for _, _, holes, _ in batches}) > 2
    for batch in batches:
        update(run, batch)
    assert counter.frame_count == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no cuda on this machine")
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("attention", ATTENTIONS, ids=str)
def test_a_step_does_not_wait_for_the_device(attention, optimizer):
    device = torch.device("cuda")
    model = tiny_model(V=8, T=16, dropout=0.1, **attention).to(device)
    config = TrainConfig(batch_size=4, context=16, grad_accum=2, max_iters=9, optimizer=optimizer)
    config.prompt_len = Span(0, 3)
    run, split = Run(config, model.train(), device), np.arange(200, dtype=np.uint16) % 8
    batches = [draw_batch(split, config, rng(seed), model.config) for seed in range(5)]
    update(run, batches[0])  # what is made once may wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches[1:]:
            update(run, batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_clipping_bounds_the_step_and_reports_the_norm_before_it():
    corpus = np.arange(100, dtype=np.uint16) % 3
    norms = {}
    for clip in (0, 1e-3):
        model = tiny_model(V=3, T=8)
        config = TrainConfig(
            batch_size=4, context=8, prompt_len=Span(0, 0), grad_clip=clip, max_iters=9, dtype="float32"
        )
        run = Run(config, model, torch.device("cpu"))
        run.optimizer.zero_grad = lambda: None
        _, norm = update(run, draw_batch(corpus, config, rng(), model.config))
        norms[clip] = norm, torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert norms[0][0] == pytest.approx(norms[1e-3][0]) == pytest.approx(norms[0][1])
    assert norms[1e-3][1] == pytest.approx(1e-3, rel=1e-3)


def test_muon_takes_the_layers_matrices_and_adamw_the_rest():
    model = tiny_model()
    adamw, muon = Run(TrainConfig(max_iters=1), model, torch.device("cpu")).optimizer.parts
    matrices = {id(p) for p in muon.param_groups[0]["params"]}
    assert matrices == {id(p) for p in model.layers.parameters() if p.ndim == 2}
    decayed, not_decayed = adamw.param_groups
    assert not_decayed["weight_decay"] == 0
    assert all(p.ndim == 1 for p in not_decayed["params"])
    assert len(decayed["params"]) + len(not_decayed["params"]) + len(matrices) == len(list(model.parameters()))


def test_learning_rate_follows_the_limit_that_binds():
    run = Run(TrainConfig(max_iters=100, max_minutes=10, lr=1.0, warmup=0.1), tiny_model(), torch.device("cpu"))
    for step, minutes, progress in ((5, 0.1, 0.05), (5, 5.5, 0.55), (55, 0.1, 0.55), (10, 10, 1.0)):
        run.step, run.minutes = step, minutes
        assert run.progress() == progress
        assert learning_rate(run.config, run.progress()) == pytest.approx(min(progress / 0.1, (1 - progress) / 0.9))


def test_a_run_is_bounded_by_ten_minutes_unless_steps_are_given():
    minutes = {"max_iters": None, "max_minutes": None}
    for flags, expected in (({}, 0.5), ({"max_minutes": 50}, 0.1), ({"max_iters": 10}, 0.0)):
        run = Run(TrainConfig(**{**minutes, **flags}), tiny_model(), torch.device("cpu"))
        run.minutes = 5
        assert run.progress() == expected


# --- Muon, and the precision of products ---------------------------------------------------------

SHAPES = [(8, 8), (8, 8), (24, 8), (8, 24), (24, 8)]


def optimise(optimizer_of, steps=4):
    """Matrices after some steps on random gradients, with weight decay."""
    matrices = [torch.randn(shape, generator=rng(i)).requires_grad_() for i, shape in enumerate(SHAPES)]
    optimizer = optimizer_of(matrices)
    for step in range(steps):
        for i, p in enumerate(matrices):
            p.grad = torch.randn(p.shape, generator=rng(100 * step + i))
        optimizer.step()
    starts = [torch.randn(shape, generator=rng(i)) for i, shape in enumerate(SHAPES)]
    return torch.cat([(p.detach() - start).flatten() for p, start in zip(matrices, starts)])


def torch_muon(matrices):
    return torch.optim.Muon(matrices, lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 0.01), (torch.float32, 0.02)])
def test_muon_is_that_of_torch(dtype, tolerance):
    """torch computes in bfloat16, so they differ by rounding."""
    expected = optimise(torch_muon)
    moved = optimise(lambda matrices: Muon(matrices, 0.1, 0.1, dtype))
    assert (moved - expected).norm() < tolerance * expected.norm()


def test_muon_goes_on_from_the_state_of_torch_s():
    matrices = [torch.randn(shape, generator=rng(i)).requires_grad_() for i, shape in enumerate(SHAPES)]
    theirs, ours = torch_muon(matrices), Muon(matrices, 0.3, 0.2, torch.float32)
    for p in matrices:
        p.grad = torch.randn(p.shape, generator=rng(9))
    theirs.step()
    ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["lr"] == 0.1
    for p in matrices:
        assert ours.state[p]["momentum_buffer"].equal(theirs.state[p]["momentum_buffer"])
    ours.step()


def test_muon_s_steps_are_nearly_orthogonal():
    """Their singular values are near 1, whatever those of the gradient, tall or wide (2502.16982, sec. 2.1)."""
    for shape in ((2, 16, 16), (2, 16, 40), (2, 40, 16)):
        x = torch.randn(shape, generator=rng()) * torch.tensor([1.0, 1e-6])[:, None, None]
        values = torch.linalg.svdvals(orthogonalised(x, torch.float32))
        assert values.max() < 1.3
        assert values.median() > 0.6


class Products(TorchDispatchMode):
    """Notes the precision in which each matrix product, convolution and attention is computed."""

    names = "mm", "addmm", "bmm", "baddbmm", "addbmm", "linear", "matmul", "dot", "mv", "addmv"
    names += "convolution", "convolution_backward"

    def __init__(self):
        super().__init__()
        self.seen = {}

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation._overloadpacket.__name__
        if name in self.names or "scaled_dot_product" in name:
            self.seen.setdefault(args[0].dtype, set()).add(name)
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("attention", ATTENTIONS, ids=str)
def test_every_product_is_in_the_precision_of_the_run(attention, dtype, optimizer, dropout):
    """This includes the optimizer and sampling. Another precision can take a hundred times as long."""
    model = tiny_model(V=8, T=16, dropout=dropout, **attention)
    config = TrainConfig(batch_size=4, context=16, max_iters=9, dtype=dtype, optimizer=optimizer, prompt_len=Span(0, 3))
    run = Run(config, model.train(), torch.device("cpu"))
    with Products() as training:
        update(run, draw_batch(np.arange(200, dtype=np.uint16) % 8, config, rng(), model.config))
    with Products() as sampling, run.precision:
        list(denoise(model.eval(), torch.full((2, 16), 8), 4, "confidence"))
    assert {*training.seen} == {*sampling.seen} == {getattr(torch, dtype)}
    everything = set().union(*training.seen.values())
    assert {"mm", "convolution", "convolution_backward"} <= everything
    assert ("baddbmm" in everything) == (optimizer == "muon")


def test_micro_batches_are_alike():
    """Each micro-batch has levels from all of (0, 1], so that none has many more holes."""
    config = TrainConfig(batch_size=16, context=64, grad_accum=4, level=level("uniform"), max_iters=9)
    config.prompt_len, shares = Span(0, 0), []

    def watch(model, x0, xt, holes, weights):
        shares[-1].append(len(holes[0]) / x0.numel())
        return loss_of(model, x0, xt, holes, weights)

    run = Run(config, tiny_model(V=3, T=64), torch.device("cpu"))
    with mock.patch("train.loss_of", watch):
        for seed in range(20):
            shares.append([])
            split = np.arange(999, dtype=np.uint16) % 3
            update(run, draw_batch(split, config, rng(seed), run.model.config))
    assert np.mean([max(batches) for batches in shares]) < 0.65  # 0.59; of rows in order 0.78
