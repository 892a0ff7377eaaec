"""The causal layer that verifies drafts sees nothing early, and what it lets through follows its own distribution."""

from itertools import permutations

import pytest
import torch
import torch.nn as nn
from passes import SelfSpeculative, random_ranks, remask, remdm_levels, speculate
from toys import all_texts, chi_square_p, tiny_model

from model import ModelConfig

V, T = 3, 3


def opinionated(T=T, seed=0):
    """A random model over V tokens whose drafts and targets differ."""
    torch.manual_seed(seed)
    model = SelfSpeculative(ModelConfig(V + 1, V, T, n_layer=1, n_head=2, n_embd=16, conv=3))
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model.eval()


def target_probabilities(model, canvas, n_set):
    """p(text) of every text (V**T, T) that a single pass over canvas (T,) writes, averaged over the orders of holes."""
    texts, orders = all_texts(V, T), list(permutations(range(T - n_set)))
    holes, total = canvas == V, torch.zeros(V**T)
    x, _ = model.draft(canvas.expand(len(texts), T))
    for order in orders:
        rank = torch.arange(T)
        rank[~holes], rank[holes] = torch.arange(n_set), n_set + torch.tensor(order)
        log_p = model.verify(x, texts, rank.expand(len(texts), T)).log_softmax(-1)
        total += (log_p.gather(2, texts[..., None]).squeeze(2) * holes).sum(1).exp() / len(orders)
    return total * (texts == canvas)[:, ~holes].all(1)


@torch.no_grad()
def test_a_target_sees_no_token_of_its_own_rank_or_a_later_one():
    model, generator = opinionated(T=8), torch.Generator().manual_seed(0)
    tokens = torch.randint(V, (1, 8), generator=generator)
    holes = torch.rand(1, 8, generator=generator) < 0.7
    x, _ = model.draft(tokens.masked_fill(holes, V))
    rank = random_ranks(holes, torch.rand(1, 8, generator=generator))
    before = model.verify(x, tokens, rank)
    for place in range(8):
        changed = tokens.clone()
        changed[0, place] = (tokens[0, place] + 1) % V
        differs = (model.verify(x, changed, rank) != before)[0, :, :V].any(-1)
        assert torch.equal(differs, rank[0] > rank[0, place])


@torch.no_grad()
@pytest.mark.parametrize("prompt", [[], [1]], ids=["an empty canvas", "after a token"])
def test_one_pass_draws_from_the_targets_joint_distribution(prompt):
    model, N = opinionated(), 20_000
    canvas = torch.tensor(prompt + [V] * (T - len(prompt)))
    texts, passes, readings = speculate(model, canvas.expand(N, T), 1, T)
    counts = (texts * torch.tensor([9, 3, 1])).sum(1).bincount(minlength=V**T)
    p = target_probabilities(model, canvas, len(prompt))
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    assert chi_square_p(counts, p) > 1e-3
    assert (passes == 1).all()
    assert readings.mean() > 1.1  # some drafts were rejected
    drafts, _, _ = speculate(model, canvas.expand(N, T), 1, 0)
    assert chi_square_p((drafts * torch.tensor([9, 3, 1])).sum(1).bincount(minlength=V**T), p) < 1e-6


@torch.no_grad()
def test_before_training_every_draft_is_accepted():
    model = SelfSpeculative(ModelConfig(V + 1, V, 8, n_layer=1, n_head=2, n_embd=16)).eval()
    _, passes, readings = speculate(model, torch.full((50, 8), V), 1, 8)
    assert (passes == 1).all()
    assert (readings == 1).all()


@pytest.mark.parametrize("kind", ["cap", "rescale", "loop"])
def test_remdm_leaves_the_share_of_set_tokens_as_it_is(kind):
    """After each step alpha(s) of the tokens are set, whatever was masked again; in the end all are."""
    model, steps = tiny_model(T=8), 20
    for step in range(steps):
        now, after, sigma = remdm_levels(kind, 0.1, 1 - step / steps, 1 - (step + 1) / steps)
        chance = (after - (1 - sigma) * now) / (1 - now)
        assert -1e-9 < chance < 1 + 1e-9
        assert (1 - sigma) * now + chance * (1 - now) == pytest.approx(after)
    canvas, _, _ = remask(model, torch.full((50, 8), V), steps, kind, 0.1)
    assert (canvas != V).all()
