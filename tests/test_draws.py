"""Draws: tokens follow the model's distribution exactly, and depend only on the seed."""

import functools

import pytest
import torch
from toys import Conditionals, all_texts, chi_square_p, tiny_model

from sample import ORDERS, denoise, draw

ALL = [*ORDERS, "remask"]


def uniform(n, seed=0):
    """n numbers in (0, 1], float64."""
    return 1 - torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def complete(*args, **flags):
    """The canvas after the last step."""
    return list(denoise(*args, **flags))[-1]


SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [SLOW(0.5, 0, 1), (1, 0, 1), SLOW(2, 0, 1), SLOW(1, 9 + 25_000, 1), SLOW(2, 0, 0.7)],
)
def test_draw_is_the_softmax_at_a_vocabulary_of_50000(temperature, top_k, top_p, device):
    """Nine tokens share 90%, and the other 50,000 share the rest, so a truncated tail would be noticed.

    No two of the nine are equally likely, because devices differ in which of two equals top_p keeps.
    """
    torch.manual_seed(0)
    logits = temperature * torch.cat((torch.linspace(9.2, 8.8, 9), torch.randn(50_000) - 2)).to(device)
    counts = torch.zeros(50_009)
    for seed in range(10):
        tokens = draw(logits.expand(500, -1), uniform(500, seed), temperature, top_k, top_p)
        counts += tokens.bincount(minlength=50_009).cpu()
    probabilities = (logits.cpu().double() / temperature).softmax(-1)
    ranked = probabilities.sort(descending=True)
    kept = ranked.values.cumsum(0) - ranked.values < top_p
    kept[top_k or len(kept) :] = False
    probabilities[ranked.indices[~kept]] = 0
    assert counts[probabilities == 0].sum() == 0
    order = probabilities[9:].argsort() + 9  # the tail in ten classes of rising probability
    classes = [torch.tensor([i]) for i in range(9)] + list(order.chunk(10))
    observed = torch.stack([counts[c].sum() for c in classes])
    expected = torch.stack([probabilities[c].sum() for c in classes])
    assert chi_square_p(observed, expected / expected.sum()) > 0.001


def test_draw_resolves_probabilities_of_1e_12():
    """u selects the right token even deep in the tail, where float32 has no numbers left."""
    probabilities = torch.tensor([1e-12, 2e-12, 1e-9, 0.5, 0.5], dtype=torch.float64)
    u = torch.tensor([1e-13, 0.9e-12, 1.1e-12, 2.9e-12, 3.1e-12, 0.9e-9, 1.1e-9, 0.4, 0.6, 1], dtype=torch.double)
    tokens = draw(probabilities.log().float().expand(len(u), -1), u)
    assert tokens.tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]
    u = 1 - u[:-1]
    tokens = draw(probabilities.flip(0).log().float().expand(len(u), -1), u)
    assert tokens.tolist() == [4, 4, 3, 3, 2, 2, 1, 1, 0]  # here the cumulative sum is nearly 1


def test_draw_never_takes_a_token_of_probability_zero():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 1.0, -torch.inf]]).expand(100_000, -1)
    assert set(draw(logits, uniform(100_000)).tolist()) == {1, 3}


def test_top_k_and_top_p_draw_the_softmax_of_what_they_keep():
    probabilities = torch.tensor([0.4, 0.05, 0.3, 0.15, 0.1])
    logits = probabilities.log().expand(50_000, -1)
    for top_k, top_p, kept in (
        (2, 1.0, [0, 2]),
        (0, 0.8, [0, 2, 3]),
        (0, 0.01, [0]),
        (9, 1.0, [0, 1, 2, 3, 4]),
    ):
        counts = draw(logits, uniform(50_000), 1.0, top_k, top_p).bincount(minlength=5)
        expected = torch.zeros(5)
        expected[kept] = probabilities[kept] / probabilities[kept].sum()
        assert chi_square_p(counts, expected) > 0.001 if len(kept) > 1 else counts[kept].sum() == 50_000


@pytest.mark.parametrize("temperature", [1e-300, 1e-5, 1e6])
def test_draw_at_extreme_temperatures(temperature):
    logits = torch.tensor([[5.0, -100.0, 5.1, -torch.inf]]).expand(1000, -1)
    drawn = set(draw(logits, uniform(1000), temperature).tolist())
    assert drawn == ({2} if temperature < 1 else {0, 1, 2})


def test_temperature_zero_takes_the_most_likely_token():
    logits = torch.randn(100, 20, generator=torch.Generator().manual_seed(0))
    assert draw(logits, uniform(100), 0).equal(logits.argmax(-1))


@pytest.mark.parametrize("order", ORDERS)
def test_sampler_draws_the_model_distribution(order, device):
    """With one hole per step, the exact conditionals of a joint give texts from the joint.

    That holds for every order that does not look at the tokens it draws.
    """
    joint = torch.rand(3, 3, 3, generator=torch.Generator().manual_seed(1)) ** 3  # far from independent
    model = Conditionals(joint).to(device)
    canvas = torch.full((20_000, 3), 3, device=device)
    texts = complete(model, canvas, steps=3, order=order, tau=1.0, gamma=0.0)
    counts = (texts.cpu() * torch.tensor([9, 3, 1])).sum(1).bincount(minlength=27)
    assert chi_square_p(counts, model.joint.flatten()) > 0.001
    at_once = complete(model, canvas, steps=1, order=order, tau=0.0, gamma=99.0)  # all holes: marginals only
    counts = (at_once.cpu() * torch.tensor([9, 3, 1])).sum(1).bincount(minlength=27)
    assert chi_square_p(counts, model.joint.flatten()) < 1e-6


def test_sampler_draws_the_conditional_distribution_given_a_prompt():
    joint = torch.rand(3, 3, 3, generator=torch.Generator().manual_seed(1)) ** 3
    model = Conditionals(joint)
    texts = complete(model, torch.tensor([[3, 2, 3]]).expand(20_000, -1), steps=2)
    assert texts[:, 1].eq(2).all()
    counts = (texts * torch.tensor([3, 0, 1])).sum(1).bincount(minlength=9)
    expected = model.joint[:, 2].flatten()
    assert chi_square_p(counts, expected / expected.sum()) > 0.001


@pytest.mark.parametrize("order", ALL)
def test_special_tokens_are_never_written(order):
    model = tiny_model(V=6, T=16, special_ids=(0, 2, 6))
    written = complete(model, torch.full((20, 16), 6), steps=4, order=order, temperature=3)
    assert set(written.unique().tolist()) == {1, 3, 4, 5}


def test_same_seed_same_text():
    model, canvas = tiny_model(V=5, T=8), torch.full((2, 8), 5)
    texts = [complete(model, canvas, 4, seeds=seeds).tolist() for seeds in ((1, 2), (1, 2), (2, 3))]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0][0] != texts[0][1] == texts[2][0]


@pytest.mark.parametrize("flags", [{}, {"block": 3}, {"top_p": 0.9}, {"guidance": 1.0}])
@pytest.mark.parametrize("order", ALL)
def test_a_row_is_written_the_same_in_any_batch(order, flags, device):
    """The rows have prompts and holes of many kinds, and the canvas may be longer than the context."""
    rows = [[1, 2, *[7] * 10], [7] * 12, [7, 3, 7, 7, 7, 2] * 2, [5, 7, *[7] * 10], [1] * 12, [1] * 11 + [7]]
    for W in (12, 5):
        model = tiny_model(V=7, T=W, conv=3).to(device)
        batch = torch.tensor(rows, device=device)
        log_p, flags = torch.zeros(batch.shape), {"tau": 0.5, **flags}
        together = complete(model, batch, 6, order, seeds=range(len(rows)), log_p=log_p, **flags)
        for i, row in enumerate(batch):
            log_p_alone = torch.zeros(1, 12)
            alone = complete(model, row[None], 6, order, seeds=[i], log_p=log_p_alone, **flags)
            assert together[i].tolist() == alone[0].tolist()
            torch.testing.assert_close(log_p[i], log_p_alone[0], rtol=1e-4, atol=1e-5)


def test_toys_are_exact():
    """Conditionals, which other tests trust, agrees with sums over all texts."""
    joint = torch.rand(2, 2, 2, generator=torch.Generator().manual_seed(0)) + 0.1
    model = Conditionals(joint)
    texts = all_texts(2, 3)
    for canvas in (torch.tensor([2, 2, 2]), torch.tensor([1, 2, 2]), torch.tensor([1, 2, 0])):
        fits = ((texts == canvas) | (canvas == 2)).all(1)
        p = model.joint.flatten() * fits
        expected = torch.stack([p[texts[:, 2] == v].sum() for v in (0, 1)]) / p.sum()
        torch.testing.assert_close(model(canvas[None])[0, 2].softmax(-1)[:2], expected)
