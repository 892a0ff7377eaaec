"""The bound: its exact values by enumeration, its variance and its standard error."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from toys import (
    Conditionals,
    SurerWithMoreToSee,
    all_texts,
    corrupted,
    level,
    mean_nats_over_all_orders,
    nats_of_mask,
    rng,
    tiny_model,
)

from data.lib.flags import Rate
from data.lib.kernels import rows_at_once
from data.lib.noise import rates_of
from data.lib.report import standard_error
from sample import log_likelihood
from train import STRATA, draw_levels, loss_of, nelbo, sequence_bounds, uniform_rates


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


@pytest.mark.parametrize("levels", ["uniform", "grid:4"])
def test_the_bound_is_the_same_whatever_rates_and_weights_one_trains_with(levels, monkeypatch):
    """If you try other rates or weights by hand, you still read a bound."""
    x0 = torch.randint(3, (8, 16), generator=rng())
    before = nelbo(SurerWithMoreToSee(), x0, level=level(levels))
    monkeypatch.setattr("train.uniform_rates", lambda t, x0: (t**2, 2 * t))
    monkeypatch.setattr("train.hole_weights", lambda weight, rate, *_: torch.ones_like(rate))
    assert nelbo(SurerWithMoreToSee(), x0, level=level(levels)) == before


@pytest.mark.parametrize("prompt_len", [pytest.param(0, marks=pytest.mark.slow), 1])
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


@pytest.mark.parametrize("strata", [STRATA, pytest.param(1, marks=pytest.mark.slow)])
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
