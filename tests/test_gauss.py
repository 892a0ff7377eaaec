"""Gaussian noise: the bound of a perfect denoiser falls to the entropy, and the sampler draws its source."""

import math
from types import SimpleNamespace

import gauss
import numpy as np
import pytest
import torch
import torch.nn as nn
from gauss import (
    BATCH,
    LENGTH,
    Gauss,
    corrupt,
    denoise,
    levels_at,
    move,
    nelbo,
    scales,
    sequence_bounds,
    snr,
    step_nats,
)
from numpy.polynomial.hermite_e import hermegauss
from toys import all_texts, chi_square_p, make_book

import data.lib.corpus
from data.lib.noise import slanted_rate
from data.lib.report import standard_error
from model import ModelConfig
from train import TrainConfig

JOINT = torch.tensor([[0.4, 0.05], [0.15, 0.4]])  # of two words, each of two tokens


class Posterior(nn.Module):
    """The perfect denoiser of a known joint (V,) * T, by Bayes' rule. A sharpness other than 1 spoils it.

    The vectors of V = 2 tokens are -1 and 1. If both are equally likely, the expected vector is a tanh.
    """

    def __init__(self, joint, sharpness=1.0):
        super().__init__()
        (V, T), self.log_joint = (joint.shape[0], joint.ndim), joint.log().flatten()  # (V^T,)
        self.texts, self.sharpness = all_texts(V, T), sharpness
        self.config = SimpleNamespace(vocab_size=V + 1, mask_id=V, context=T, special_ids=(), is_gpt=False)
        self.anchor = nn.Parameter(torch.zeros(1))  # says which device the model is on

    def vectors(self):
        V = self.config.mask_id
        return torch.cat((torch.linspace(-1, 1, V)[:, None], torch.zeros(1, 1)))  # (V + 1, 1)

    def logits_of(self, z, levels, guess):
        alpha, sigma = scales(levels)
        own = -0.5 * ((z - alpha * self.vectors()[:-1, 0]) / sigma.clamp(min=1e-4)).square()  # (B, T, V)
        picked = own[:, torch.arange(z.shape[1]), self.texts].sum(2)  # (B, V^T)
        log_p = (self.log_joint + picked).log_softmax(1)
        one_hot = nn.functional.one_hot(self.texts, self.config.vocab_size).float()  # (V^T, T, V + 1)
        return self.sharpness * torch.einsum("bn,ntv->btv", log_p.exp(), one_hot).log()

    def guess(self, z, levels, before):
        return before


def exact_bound(model, steps, slant=0.0, points=24):
    """The exact bound of two tokens in nats: a sum over texts, and Gauss-Hermite quadrature over the noise."""
    nodes, weights = map(torch.from_numpy, hermegauss(points))
    noise = torch.cartesian_prod(nodes, nodes)[..., None].float()  # (points^2, 2, 1)
    weights = torch.cartesian_prod(weights, weights).prod(1) / weights.sum() ** 2  # (points^2,)
    total = 0.0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gauss, "corrupt", lambda e, levels, _: sum(map(torch.mul, scales(levels), (e, noise))))
        for text, log_p in zip(model.texts, model.log_joint):
            x0 = text.expand(len(noise), -1)
            for n in range(1, steps + 1):
                t = (torch.full((len(noise), 1), k / steps) for k in (n, n - 1))
                nats = step_nats(model, x0, *(levels_at(level, x0 >= 0, slant) for level in t)).sum(1)
                total += (log_p.exp() * (weights * nats).sum()).item()
    return total


def entropy(joint):
    return -(joint * joint.log()).sum().item()


# --- the noise -----------------------------------------------------------------------------------


def test_noise_keeps_the_variance():
    """Coordinates of variance 1 keep it at every level. At level 0 nothing changes, and at 1 nothing is left."""
    torch.manual_seed(0)
    e = torch.randn(4, 5, 10_000)
    levels = torch.linspace(0, 1, 20).view(4, 5)
    z = corrupt(e, levels)
    assert z.var(2).allclose(torch.ones(4, 5), atol=0.06)
    assert z[0, 0].equal(e[0, 0])
    assert abs((z[-1, -1] * e[-1, -1]).mean()) < 0.04
    assert snr(torch.tensor([[0.5]])).item() == pytest.approx(1)


def test_levels_of_tokens_are_the_rates_of_masks():
    """With a slant they are AR-Diffusion's (2305.09515): tokens on the left have less noise. A prompt has none."""
    t, noisy = torch.tensor([[0.25], [0.5], [1.0]]), torch.ones(3, 9, dtype=torch.bool)
    assert levels_at(t, noisy).equal(t.expand(3, 9))
    slanted = levels_at(t, noisy, slant=1.0)
    assert slanted[1].allclose(torch.linspace(0, 1, 9).masked_fill(torch.arange(9) == 0, 0))
    assert slanted.equal(slanted_rate(t, 1.0, 9, 9))
    assert slanted[0].count_nonzero() == 4
    assert slanted[2].equal(torch.ones(9))
    assert not levels_at(t, torch.arange(9).expand(3, 9) > 3)[:, :4].any()


def test_a_step_leads_from_one_level_to_the_next():
    """Moved towards its own vector, z at t becomes z at s, with the right mean and variance (2107.00630)."""
    e, generator = torch.full((1, 4, 200_000), 0.7), torch.Generator().manual_seed(0)
    t, s = torch.tensor([[0.9, 0.6, 0.3, 0.2]]), torch.tensor([[0.8, 0.3, 0.25, 0.0]])
    z = move(corrupt(e, t, generator), e, t, s, generator)
    alpha, sigma = scales(s)
    assert z.mean(2).allclose(0.7 * alpha.squeeze(2), atol=0.01)
    assert z.std(2).allclose(sigma.squeeze(2), atol=0.01)
    assert z[0, 3].equal(e[0, 3])


# --- the bound -----------------------------------------------------------------------------------


@torch.no_grad()
def test_the_squared_error_is_that_solved_by_hand():
    """For one token, -1 or 1 with equal odds, it is 1 - E tanh(snr + sqrt(snr) noise). Its integral is 2 log 2."""
    noise, ratios = torch.linspace(-8, 8, 2001), torch.cat((torch.ones(1), torch.logspace(-4, 2, 4000)))
    density = (-noise.square() / 2).exp() / math.sqrt(2 * math.pi) * 0.008
    errors = 1 - (density * torch.tanh(ratios[:, None] + ratios[:, None].sqrt() * noise)).sum(1)
    assert torch.trapezoid(errors[1:], ratios[1:]).item() == pytest.approx(2 * math.log(2), abs=2e-3)
    x0, half = torch.arange(2).repeat(20_000)[:, None], torch.full((40_000, 1), 0.5)  # snr 1
    less = torch.full_like(half, 2 / math.pi * math.atan(3**-0.5))  # snr 3
    nats = step_nats(Posterior(torch.ones(2) / 2), x0, half, less, torch.Generator().manual_seed(0))
    assert nats.mean().item() == pytest.approx((3 - 1) / 2 * errors[0].item(), rel=0.02)


@torch.no_grad()
@pytest.mark.parametrize("slant", [0.0, 0.5])
def test_bound_of_the_perfect_denoiser_falls_to_the_entropy(slant):
    """I-MMSE: half the integral of the least squared error over the signal-to-noise ratio is the entropy. In N steps
    the bound is about c/N above it, also with levels that depend on the position.
    """
    above = [exact_bound(Posterior(JOINT), steps, slant) - entropy(JOINT) for steps in (8, 32, 64, 128)]
    assert all(a > b > 0 for a, b in zip(above, above[1:]))
    assert 2 * above[3] - above[2] == pytest.approx(0, abs=0.005)


@torch.no_grad()
def test_in_one_step_the_bound_is_the_entropy_of_the_tokens_apart():
    apart = sum(entropy(JOINT.sum(i)) for i in (0, 1))
    assert exact_bound(Posterior(JOINT), 1) == pytest.approx(apart, abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("sharpness", [0.7, 1.5])
def test_a_wrong_denoiser_has_a_higher_bound(sharpness):
    assert exact_bound(Posterior(JOINT, sharpness), 64) > exact_bound(Posterior(JOINT), 64) + 0.01


def texts_of(joint, n=2000):
    """About n texts in the proportions of the source, shuffled."""
    counts = (joint.flatten() * n).round().long()
    order = torch.randperm(counts.sum(), generator=torch.Generator().manual_seed(0))
    return all_texts(2, 2).repeat_interleave(counts, 0)[order]


@torch.no_grad()
@pytest.mark.parametrize("slant", [0.0, 0.5])
def test_bound_is_estimated_without_bias_and_its_error_is_honest(slant):
    model, texts, flags = Posterior(JOINT), texts_of(JOINT), {"steps": 16, "slant": slant, "draws": 4}
    found = [nelbo(model, texts, seed=i, **flags) for i in range(10)]
    errors = [standard_error(*sequence_bounds(model, texts, seed=i, **flags), BATCH) for i in range(10)]
    deviations = torch.tensor(found) - exact_bound(model, 16, slant) / 2
    assert abs(deviations.mean()) < 4 * errors[0] / 10**0.5
    assert 0.4 < deviations.square().mean().sqrt() / np.mean(errors) < 2.5
    assert found[3] == nelbo(model, texts, seed=3, **flags)


@torch.no_grad()
def test_a_prompt_is_seen_and_not_counted():
    """With the first token given, the bound falls to the entropy of the second given the first."""
    given = entropy(JOINT) - entropy(JOINT.sum(1))
    found = sequence_bounds(Posterior(JOINT), texts_of(JOINT), prompt_len=1, steps=256, draws=8)
    nats = nelbo(Posterior(JOINT), texts_of(JOINT), prompt_len=1, steps=256, draws=8)
    assert nats == pytest.approx(given, abs=4 * standard_error(*found, BATCH) + 0.01)


# --- the denoiser --------------------------------------------------------------------------------


@pytest.mark.parametrize("slant", [0.0, 0.5])
def test_sampler_draws_the_source(slant):
    canvas = torch.full((4000, 2), 2)
    texts = denoise(Posterior(JOINT), canvas, steps=200, slant=slant, seed=1)
    counts = (texts[:, 0] * 2 + texts[:, 1]).bincount(minlength=4)
    assert chi_square_p(counts, JOINT.flatten()) > 1e-3


def test_two_tokens_in_two_steps_with_a_slant_are_append():
    """The first token goes from level 1 to 0 while the second waits, so both are drawn from the right distributions and
    the bound is the likelihood.
    """
    assert exact_bound(Posterior(JOINT), 2, slant=1.0) == pytest.approx(entropy(JOINT), abs=1e-4)
    texts = denoise(Posterior(JOINT), torch.full((4000, 2), 2), steps=2, slant=1.0)
    assert chi_square_p((texts[:, 0] * 2 + texts[:, 1]).bincount(minlength=4), JOINT.flatten()) > 1e-3


def test_sampler_keeps_the_prompt_and_heeds_it():
    canvas = torch.tensor([[1, 2]]).repeat(4000, 1)
    texts = denoise(Posterior(JOINT), canvas, steps=100)
    assert (texts[:, 0] == 1).all()
    assert chi_square_p(texts[:, 1].bincount(minlength=2), JOINT[1] / JOINT[1].sum()) > 1e-3


# --- the network ---------------------------------------------------------------------------------


def small_network(**more):
    torch.manual_seed(0)
    return Gauss(ModelConfig(vocab_size=7, mask_id=6, context=8, n_layer=1, n_embd=16, **more))


def test_vectors_have_one_length_and_no_hole_is_predicted():
    model = small_network()
    model.token_embedding.weight.data.mul_(100)
    assert model.vectors().norm(dim=1).allclose(torch.full((7,), LENGTH))
    x0, levels = torch.arange(6).expand(2, 6), torch.rand(2, 6)
    logits = model(levels, where=torch.ones(2, 6, dtype=torch.bool), clean=x0)
    assert (logits[:, 6] == -math.inf).all()
    assert logits[:, :6].isfinite().all()


@torch.no_grad()
def test_a_token_without_noise_is_recognised():
    """A prompt has level 0. Whatever the network has learned, it sees the token there."""
    model = small_network()
    x0 = torch.arange(6).expand(2, 6)
    logits = model(torch.zeros(2, 6), where=torch.ones(2, 6, dtype=torch.bool), clean=x0)
    assert logits.argmax(1).equal(x0.flatten())


@torch.no_grad()
def test_at_level_one_nothing_is_seen_of_a_token():
    model, x0 = small_network(), torch.arange(6).expand(2, 6)
    levels, where, logits = torch.tensor([[0.3, 0.6, 1.0, 0.0, 0.9, 0.5]]).expand(2, 6), x0 >= 0, []
    for clean in (x0, x0.masked_fill(torch.arange(6) == 2, 5), x0.masked_fill(torch.arange(6) == 1, 5)):
        torch.manual_seed(1)  # of the noise
        logits.append(model(levels, where=where, clean=clean)[:, :6])
    assert logits[0].allclose(logits[1], atol=1e-4)
    assert not logits[0].allclose(logits[2], atol=1e-2)


@torch.no_grad()
def test_the_network_is_told_levels_and_a_guess():
    model, z = small_network(), torch.zeros(1, 6, 16)
    levels, guess = torch.full((1, 6), 0.5), torch.zeros(1, 6, 16)
    logits = model.logits_of(z, levels, guess)
    assert not logits.equal(model.logits_of(z, levels + 0.1, guess))
    assert not logits.equal(model.logits_of(z, levels, guess + 1))


def test_half_of_the_passes_have_a_guess_which_has_no_gradient():
    model, asked = small_network(), []
    guess = model.guess
    model.guess = lambda *args: asked.append(guess(*args)) or asked[-1]
    x0, levels = torch.arange(6).expand(2, 6), torch.full((2, 6), 0.5)
    for _ in range(200):
        model(levels, where=torch.ones(2, 6, dtype=torch.bool), clean=x0)
    assert 70 < len(asked) < 130
    assert not asked[0].requires_grad


# --- training -----------------------------------------------------------------------------------


@pytest.mark.parametrize("slant", [0.0, 1.0])
def test_training_lowers_the_bound(slant, tmp_path, monkeypatch):
    make_book(tmp_path)
    (tmp_path / "data" / "book").rename(tmp_path / "data" / "python-bytes")
    monkeypatch.setattr(data.lib.corpus, "DATA", tmp_path / "data")
    monkeypatch.setattr(gauss, "TrainConfig", lambda **flags: TrainConfig(**{**flags, "max_iters": 60, "lr": 0.02}))
    config = SimpleNamespace(quick=True, minutes=10)
    model, steps, curve = gauss.train_gauss(config, torch.device("cpu"), slant)
    assert steps == 60
    assert len(curve) == 12
    assert curve[-1][1] < curve[0][1] - 0.5
    assert not model.training
