"""Noise, objective and likelihood: the facts that the method rests on."""

import math
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
from toys import Conditionals, all_texts, tiny_model

from data.lib.corpus import unigram_nats
from data.lib.fast import Muon, cross_entropy, orthogonalised, rows_at_once
from data.lib.flags import Level, Span
from data.lib.training import Run
from model import ModelConfig
from sample import denoise, log_likelihood
from train import (
    STRATA,
    TrainConfig,
    corrupt,
    draw_batch,
    draw_levels,
    loss_of,
    mask_rates,
    nelbo,
    relative_information,
    sequence_bounds,
    train,
    which_maskable,
    windows,
)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def level(text):
    return Level.from_text(text)


def update(run, batch):
    """A step on a batch: its loss and its gradient's norm."""
    return next(train(run, [batch]))


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
    """2406.03736 and 2110.02037: the bound is the likelihood under a random order."""
    model = tiny_model(V=3, T=3)
    x0 = all_texts(3, 3)[[1, 5, 10, 15, 26]]
    exact = mean_nats_over_all_orders(model, x0).mean().item()
    estimate = nelbo(model.to(device), x0, draws=20_000, batch_size=20_000)
    assert estimate == pytest.approx(exact, rel=0.01)


@torch.no_grad()
def test_nelbo_equals_the_integral_over_levels():
    """Each set of k holes has probability t^k (1-t)^(T-k); with weight 1/t that integrates to a beta."""
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
    """No bound is tighter: every order of the true conditionals gives the text's own probability."""
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
    """2107.03006: sum over the N steps of KL(q(x_{n-1} | x_n, x0) || p(x_{n-1} | x_n)), enumerated."""
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
            batch = corrupt(x0, everything, t, 1.0 - holes.float(), V)  # u is 0 at the holes
            assert batch[1].equal(holes)
            ours += chance / N * loss_of(model, x0, *batch).item() * T
    assert ours == pytest.approx(d3pm, rel=1e-5)
    levels = draw_levels(level(f"grid:{N}"), 10 * N, rng())
    flags = {"level": level(f"grid:{N}"), "draws": 20_000, "batch_size": 20_000}
    assert nelbo(model, x0, **flags) * T == pytest.approx(d3pm, rel=0.02)
    values, counts = levels.unique(return_counts=True)
    torch.testing.assert_close(values, torch.arange(1, N + 1) / N)
    assert counts.tolist() == [10] * N


@torch.no_grad()
@pytest.mark.parametrize("name", ["uniform", "grid:1000"])
def test_the_elbo_loss_is_the_bound(name):
    """In expectation; D3PM's bound meets it when its steps are many."""
    model = tiny_model(V=3, T=3)
    x0 = all_texts(3, 3)[[5]].expand(200_000, -1)
    t = draw_levels(level(name), len(x0), rng())
    everything = torch.ones(len(x0), 3, dtype=torch.bool)
    batch = corrupt(x0, everything, t, torch.rand(x0.shape, generator=rng(1)), 3)
    loss = loss_of(model, x0, *batch).sum().item()
    assert loss == pytest.approx(mean_nats_over_all_orders(model, x0[:1]).item(), rel=0.02)


def test_nelbo_repeats_itself_and_leaves_the_model_as_it_was():
    model = tiny_model().train()
    texts = all_texts(3, 3)
    assert nelbo(model, texts, seed=4) == nelbo(model, texts, seed=4) != nelbo(model, texts, seed=5)
    assert model.training


def test_nelbo_does_not_depend_on_how_it_is_batched():
    model, texts = tiny_model(), all_texts(3, 3)
    assert nelbo(model, texts, batch_size=1) == pytest.approx(nelbo(model, texts, batch_size=100), rel=1e-5)


def test_a_pass_has_no_more_rows_than_its_logits_allow(monkeypatch):
    """One of LLaDA's 4,096 tokens, each of 126,464, where 64 of a small model's go through at once."""
    assert rows_at_once(64, 256, 257) == 64
    assert rows_at_once(64, 256, 50_265) == 41
    assert rows_at_once(64, 4096, 126_464) == 1
    model, texts, sizes = tiny_model(), all_texts(3, 3), []
    model.register_forward_pre_hook(lambda _, given: sizes.append(len(given[0])))
    monkeypatch.setattr("train.rows_at_once", lambda most, T, V: 2)
    monkeypatch.setattr("sample.rows_at_once", lambda most, T, V: 2)
    nelbo(model, texts)
    -log_likelihood(model, texts.flatten(), order="left")
    assert max(sizes) == 2


def test_prompt_is_not_counted_by_nelbo():
    """Given its first two tokens, a text of three has one way to be written: left to right."""
    model, text = tiny_model(V=3, T=3), all_texts(3, 3)[[11]]
    last = nats_of_mask(model, text, torch.tensor([False, False, True])).item()
    assert nelbo(model, text, prompt_len=2, draws=50_000, batch_size=50_000) == pytest.approx(last, rel=0.02)


# --- levels, holes, weights ----------------------------------------------------------------------


@given(st.integers(1, 300), st.integers(0, 10**6))
@settings(deadline=None, max_examples=50)
def test_uniform_levels_are_stratified(B, seed):
    """One level in each of B intervals of length 1/B, whatever the draw."""
    t = draw_levels(level("uniform"), B, rng(seed))
    assert t.shape == (B, 1)
    assert ((t > 0) & (t <= 1)).all()
    gaps = t.flatten().sort().values.diff()
    assert B == 1 or (gaps - 1 / B).abs().max() < 1e-5


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
    """Whoever tries other rates or weights by hand goes on reading a bound."""
    x0 = torch.randint(3, (8, 16), generator=rng())
    before = nelbo(SurerWithMoreToSee(), x0, level=level(levels))
    monkeypatch.setattr("train.mask_rates", lambda t, T, *_: (t**2).expand(-1, T))
    monkeypatch.setattr("train.hole_weights", lambda weight, rates, *_: torch.ones_like(rates))
    assert nelbo(SurerWithMoreToSee(), x0, level=level(levels)) == before


def test_stratified_levels_lower_the_variance_of_the_loss():
    """The same mean as independent levels, and a third of the variance or less, at a batch of 16."""
    generator, n_batches = rng(), 500
    x0 = torch.zeros(n_batches * 16, 64, dtype=torch.int64)

    def losses(draw):
        t = torch.cat([draw() for _ in range(n_batches)])
        u = torch.rand(x0.shape, generator=generator)
        batch = corrupt(x0, torch.ones(x0.shape, dtype=torch.bool), t, u, 3)
        return loss_of(SurerWithMoreToSee(), x0, *batch).view(n_batches, -1).sum(1) * n_batches

    stratified = losses(lambda: draw_levels(level("uniform"), 16, generator))
    independent = losses(lambda: 1 - torch.rand(16, 1, generator=generator))
    assert stratified.var() < independent.var() / 3
    assert stratified.mean() == pytest.approx(independent.mean().item(), rel=0.02)


def test_bell_levels_are_the_sigmoid_of_a_normal():
    """2605.13026."""
    t = draw_levels(level("bell:0.8"), 100_000, rng())
    normal = torch.distributions.Normal(0.0, 0.8)
    for at in (0.05, 0.3, 0.5, 0.9):
        below = normal.cdf(torch.logit(torch.tensor(at))).item()
        assert (t < at).float().mean().item() == pytest.approx(below, abs=1e-4)


def test_a_bell_widens_over_the_run_and_no_other_level_does():
    def level_at(step, name="bell:1.2", **flags):
        run = Run(TrainConfig(max_iters=8, level=level(name), **flags), tiny_model(), torch.device("cpu"))
        run.step = step
        return run.level()

    assert [level_at(step).value for step in (0, 2, 8)] == pytest.approx([0, 0.3, 1.2])
    assert [level_at(step, widen=0.5).value for step in (2, 4, 8)] == pytest.approx([0.6, 1.2, 1.2])
    assert level_at(0, widen=0).value == 1.2
    assert level_at(2, "grid:10") == level("grid:10")
    assert draw_levels(level_at(0), 64, rng()).tolist() == [[0.5]] * 64


@pytest.mark.parametrize(("name", "values"), [("grid:4", {0.25, 0.5, 0.75, 1.0}), ("0.25", {0.25}), ("1", {1.0})])
def test_levels_of_a_grid_and_fixed_levels(name, values):
    assert set(draw_levels(level(name), 64, rng()).flatten().tolist()) == values


@pytest.mark.parametrize("name", ["uniform", "bell:1.2", "bell:0.123456789", "grid:100", "0.15", "1"])
def test_a_level_is_its_text(name):
    assert Level.from_text(str(Level.from_text(name))) == Level.from_text(name)


@given(st.floats(0.01, 1), st.integers(0, 20), st.integers(0, 10**6))
@settings(deadline=None, max_examples=50)
def test_prompt_is_never_masked(t, prompt_len, seed):
    x0 = torch.zeros(50, 20, dtype=torch.int64)
    text = which_maskable(x0, torch.full((50, 1), prompt_len), ())
    u = torch.rand(x0.shape, generator=rng(seed))
    xt, holes, _ = corrupt(x0, text, torch.full((50, 1), t), u, 3)
    assert xt.equal(x0.masked_fill(holes, 3))
    assert not holes[:, :prompt_len].any()
    assert t < 1 or holes[:, prompt_len:].all()


def test_special_tokens_are_never_masked_and_never_counted():
    """Token 1 is not text: it stays visible, and the bound is that of the other tokens alone."""
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


def test_one_level_for_the_whole_batch():
    """Barry 2025: a rate from 0.1, 0.2 .. 1 per batch."""
    flags = {"one_level": True, "context": 4096, "batch_size": 4, "prompt_len": Span(0, 0)}
    config = TrainConfig(level=level("grid:10"), **flags)
    levels = set()
    for seed in range(60):
        _, _, holes, _ = draw_batch(torch.zeros(5000).numpy(), config, rng(seed), ModelConfig())
        rates = holes.float().mean(1)
        assert rates.max() - rates.min() < 0.06
        levels.add(round(rates.mean().item(), 1))
    assert levels == {k / 10 for k in range(1, 11)}


def test_cross_entropy_is_that_of_torch():
    """In value and gradient, at every dtype of the logits and over any split into rows."""
    for dtype, rows in ((torch.float32, 1), (torch.float32, 100), (torch.bfloat16, 7)):
        logits = torch.randn(50, 11, generator=rng()).to(dtype)
        logits[:, 4] = -torch.inf
        target, weights = torch.arange(50) % 4, torch.rand(50, generator=rng())
        ours, theirs = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        with mock.patch("data.lib.fast.rows_at_a_time", lambda logits, rows=rows: rows):
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
    holes = torch.stack([corrupt(everything.long(), everything, t, u, 3)[1] for u in draws]).float()
    torch.testing.assert_close(holes.mean((0, 2))[:, None], t, atol=0.01, rtol=0)
    pairs = (holes[..., ::2] * holes[..., 1::2]).mean((0, 2))[:, None]  # independent of its neighbour
    torch.testing.assert_close(pairs, t**2, atol=0.01, rtol=0)


def test_weights_of_holes():
    t = torch.tensor([[0.25], [1.0]])
    u = torch.tensor([[0.9, 0.1, 0.9, 0.9], [0.9, 0.9, 0.9, 0.9]])
    x0 = torch.zeros(2, 4, dtype=torch.int64)
    text = which_maskable(x0, torch.tensor([[0], [1]]), ())
    _, holes, mean = corrupt(x0, text, t, u, 3, "mean")
    assert holes.tolist() == [[False, True, False, False], [False, True, True, True]]
    assert mean[holes].tolist() == [0.25] * 4  # an average: the weights add up to 1
    _, _, elbo = corrupt(x0, text, t, u, 3, "elbo")
    torch.testing.assert_close(elbo, (1 / t / 7).expand(2, 4))  # 4 + 3 tokens could have been masked
    assert corrupt(x0, text, t, torch.ones(2, 4), 3, "mean")[2].isfinite().all()  # no hole at all


@given(st.floats(0, 1), st.integers(2, 40), st.floats(0, 50), st.floats(0, 2), st.integers(0, 10**6))
@settings(deadline=None, max_examples=200)
def test_rates_rise_from_0_to_1(t, T, slant, spindle, seed):
    information = torch.rand(3, T, generator=rng(seed)) * 2 - 1
    rates = {}
    for at in (0.0, t / 2, t, 1.0):
        rates[at] = mask_rates(torch.full((3, 1), at), T, slant, spindle, information)
        assert ((rates[at] >= 0) & (rates[at] <= 1)).all()
    assert rates[0.0].max() < 1e-5
    assert rates[1.0].min() > 1 - 1e-5
    slanted = [mask_rates(torch.full((1, 1), at), T, slant) for at in (t / 2, t)]
    assert (slanted[0] <= slanted[1] + 1e-6).all()
    assert (slanted[1].diff() >= -1e-6).all()  # the right end is masked first
    torch.testing.assert_close(mask_rates(torch.full((1, 1), t), T), torch.full((1, T), t))


def test_informative_tokens_are_masked_first():
    """2211.15029: in the middle of the noise, by 1 - mean / own; a token of mean information by t."""
    split = np.array([0] * 70 + [1] * 20 + [2] * 7)
    nats = torch.from_numpy(unigram_nats({}, split, 3))  # counted, or as prepare.py has counted them
    assert nats.equal(torch.from_numpy(unigram_nats({"occurrences": [70, 20, 7]}, None, 3)))
    torch.testing.assert_close(nats, -torch.tensor([0.71, 0.21, 0.08]).log())
    x0 = torch.tensor([[0, 1, 2, 0]])
    information = relative_information(x0, nats)
    torch.testing.assert_close(information, 1 - nats[x0].mean() / nats[x0])
    rates = mask_rates(torch.full((1, 1), 0.5), 4, spindle=0.3, information=information)[0]
    assert rates[0] == rates[3] < rates[1] < rates[2]
    torch.testing.assert_close(rates[2], 0.5 + 0.3 * information[0, 2])


@pytest.mark.parametrize("prompt_len", [0, 1])
def test_the_slanted_bound_is_an_integral_over_levels(prompt_len):
    """Every pattern of holes, with its chance at each level and rate'/rate, as slow sums say."""
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
    assert nelbo(model, x0, slant=slant, **flags) == pytest.approx(exact, rel=0.01)


def test_the_slanted_bound_of_the_perfect_denoiser_is_the_entropy_and_its_end_is_left_to_right():
    joint = torch.rand(2, 2, 2, generator=rng(3)) + 0.05
    model = Conditionals(joint)
    flags = {"draws": 10_000, "batch_size": 10_000, "slant": 1.0}
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
    flags = {"draws": 50_000, "batch_size": 50_000, "slant": 4.0}  # 2 or more: no two rates overlap
    assert nelbo(model, text, **flags) == pytest.approx(chain, rel=0.03)


@pytest.mark.parametrize("strata", [STRATA, 1])
def test_standard_error_is_the_spread_over_seeds(strata):
    """Some texts are harder than others, which adds nothing to it."""
    x0 = (torch.arange(200)[:, None] % 3 == 0).long().expand(-1, 64)
    flags = {"draws": 2, "strata": strata}
    runs = [nelbo(SurerWithMoreToSee(), x0, seed=seed, **flags) for seed in range(300)]
    spread = torch.tensor(runs).std().item()
    squares = [bound.error**2 for bound in runs]
    assert (sum(squares) / len(squares)) ** 0.5 == pytest.approx(spread, rel=0.15)


def test_stratified_levels_lower_the_variance_of_the_bound():
    """To a third of that of independent levels or less."""
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
    """1810.04805, 10% kept and 10% random; neither prompt, nor holes, nor special tokens are touched."""
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
    tokens, prompt_len = windows(np.arange(103, dtype=np.uint16), 10, 10**9)
    assert tokens.shape == (10, 10)
    assert len(tokens.unique()) == 100
    assert prompt_len.tolist() == [[0]] * 10  # no text has a prompt of its own
    assert windows(np.arange(103, dtype=np.uint16), 10, 35)[0].shape == (3, 10)


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


def test_accumulated_pieces_have_the_gradient_of_the_whole_batch():
    """With `mean` too, where pieces have different numbers of holes."""
    corpus = torch.randint(0, 3, (500,), generator=rng()).numpy().astype(np.uint16)
    gradients = []
    for pieces in (1, 4):
        model = tiny_model(V=3, T=8)
        config = TrainConfig(
            batch_size=8,
            context=8,
            grad_accum=pieces,
            prompt_len=Span(0, 3),
            dtype="float32",
            grad_clip=0,
            max_iters=9,
        )
        run = Run(config, model, torch.device("cpu"))
        run.model.zero_grad = lambda **_: None  # keep them to be compared
        update(run, draw_batch(corpus, config, rng(), model.config))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients)


def test_in_float16_an_update_with_a_gradient_that_is_not_finite_changes_no_weight():
    """One parameter of Muon's alone is enough, though AdamW's gradients are finite."""
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
        run.model.zero_grad = lambda **_: None  # keep them to be compared
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


@pytest.mark.parametrize("attention", [{}, {"block": 4}, {"block": 1, "shift_id": 8}], ids=str)
def test_the_number_of_holes_changes_and_the_model_is_compiled_once(attention):
    counter = CompileCounter()
    model = tiny_model(V=8, T=128, **attention)
    model.compile(backend=counter, fullgraph=True)
    config = TrainConfig(batch_size=6, context=128, grad_accum=2, compile=True, max_iters=9)
    config.prompt_len = Span(0, 3)
    run, split = Run(config, model.train(), torch.device("cpu")), np.arange(999, dtype=np.uint16) % 8
    batches = [draw_batch(split, config, rng(seed), model.config, level=level("0.6")) for seed in range(9)]
    assert len({holes.sum().item() for _, _, holes, _ in batches}) > 2
    assert len(list(train(run, batches))) == 9
    assert counter.frame_count == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no cuda on this machine")
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("attention", [{}, {"block": 4}, {"block": 1, "shift_id": 8}], ids=str)
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
        assert len(list(train(run, batches[1:]))) == 4
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
        run.model.zero_grad = lambda **_: None
        _, norm = update(run, draw_batch(corpus, config, rng(), model.config))
        norms[clip] = norm, torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert norms[0][0] == pytest.approx(norms[1e-3][0]) == pytest.approx(norms[0][1])
    assert norms[1e-3][1] == pytest.approx(1e-3, rel=1e-3)


def test_muon_takes_the_blocks_matrices_and_adamw_the_rest():
    model = tiny_model()
    adamw, muon = Run(TrainConfig(max_iters=1), model, torch.device("cpu")).optimizers
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
        assert run.learning_rate() == pytest.approx(min(progress / 0.1, (1 - progress) / 0.9))


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
    """In bfloat16, which is torch's precision, up to rounding; and in float32 up to torch's rounding."""
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
    """All singular values near 1, whatever those of the gradient, tall or wide; 2502.16982, sec. 2.1."""
    for shape in ((2, 16, 16), (2, 16, 40), (2, 40, 16)):
        x = torch.randn(shape, generator=rng()) * torch.tensor([1.0, 1e-6])[:, None, None]
        values = torch.linalg.svdvals(orthogonalised(x, torch.float32))
        assert values.max() < 1.3
        assert values.median() > 0.6


class Products(TorchDispatchMode):
    """The precisions in which matrix products, convolutions and attention are computed."""

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
@pytest.mark.parametrize("attention", [{}, {"block": 4}, {"block": 1, "shift_id": 8}], ids=str)
def test_every_product_is_in_the_precision_of_the_run(attention, dtype, optimizer, dropout):
    """Of training, with the optimizer, and of sampling: another one can take a hundred times as long."""
    model = tiny_model(V=8, T=16, dropout=dropout, **attention)
    config = TrainConfig(
        batch_size=4, context=16, max_iters=9, dtype=dtype, optimizer=optimizer, prompt_len=Span(0, 3)
    )
    run = Run(config, model.train(), torch.device("cpu"))
    with Products() as training:
        update(run, draw_batch(np.arange(200, dtype=np.uint16) % 8, config, rng(), model.config))
    with Products() as sampling, run.precision:
        list(denoise(model.eval(), torch.full((2, 16), 8), 4, "confidence"))
    assert {*training.seen} == {*sampling.seen} == {getattr(torch, dtype)}
    everything = set().union(*training.seen.values())
    assert {"mm", "convolution", "convolution_backward"} <= everything
    assert ("baddbmm" in everything) == (optimizer == "muon")


def test_pieces_of_a_batch_are_alike():
    """Each piece of --grad_accum has levels from all of (0, 1], so that none has many more holes."""
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
    assert np.mean([max(pieces) for pieces in shares]) < 0.65  # 0.59; of rows in order 0.78
