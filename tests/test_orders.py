"""Orders: which holes are set next, how many, and what the model is asked."""

import math
import warnings
from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import Conditionals, all_texts, chi_square_p, tiny_model

from sample import ORDERS, SampleConfig, denoise, uniforms

ALL = [*ORDERS, "remask"]
BLIND = ["random", "left", "remask"]  # they choose without looking
OWN_PACE = ["threshold", "entropy-bound"]  # they take as many steps as they need


def canvases_of(*args, **flags):
    """The canvas after each step."""
    return list(denoise(*args, **flags))


def complete(*args, **flags):
    """The canvas after the last step."""
    return canvases_of(*args, **flags)[-1]


def test_every_order_is_offered():
    (choices,) = get_args(get_type_hints(SampleConfig)["order"])
    assert sorted(get_args(choices)) == sorted([*ORDERS, "remask", "draft"])


@pytest.mark.parametrize("order", ALL)
@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_prompt_stays_and_every_canvas_ends_complete(order, data):
    T, steps = 8, data.draw(st.integers(1, 12))
    model = tiny_model(V=5, T=data.draw(st.sampled_from([T, 4])))  # seen whole, and through a window
    rows = data.draw(st.lists(st.lists(st.integers(0, 5), min_size=T, max_size=T), min_size=1, max_size=4))
    start = torch.tensor(rows)
    prompt = start != 5
    flags = {"block": data.draw(st.sampled_from([None, 1, 3]))}
    flags["guidance"] = data.draw(st.sampled_from([0.0, 1.0]))
    canvases = canvases_of(model, start, steps, order, temperature=0.7, **flags)
    assert len(canvases) >= 1
    for canvas in canvases:
        assert canvas[prompt].equal(start[prompt])
        assert set(canvas.unique().tolist()) <= {*range(6)}
    assert not (canvases[-1] == 5).any()
    if order in OWN_PACE:
        assert len(canvases) <= max(1, (~prompt).sum())
    elif flags["block"] is None and model.config.context == T and not prompt.all():
        n_open = (~prompt).sum(1)
        n_steps = torch.full_like(n_open, steps) if order == "remask" else n_open.clamp(min=1, max=steps)
        assert len(canvases) == n_steps.max()
        for k, canvas in enumerate(canvases, 1):
            expected = n_open - n_open * k / n_steps
            assert ((canvas == 5).sum(1) - expected.clamp(min=0)).abs().max() <= 0.5


@pytest.mark.parametrize("order", ORDERS)
def test_what_is_set_stays_set(order):
    canvases = canvases_of(tiny_model(V=5, T=8), torch.full((4, 8), 5), 8, order, tau=1.0, gamma=0.0)
    assert len(canvases) == 8
    for earlier, later in zip(canvases, canvases[1:]):
        assert later[earlier != 5].equal(earlier[earlier != 5])


class Counts(torch.nn.Module):
    """A model that writes the number of its call, so each token says in which step it was drawn."""

    config = tiny_model(V=12, T=8).config

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, idx, where, clean=None, cache=None):
        self.calls += 1
        logits = torch.full((len(where[0]), 13), -torch.inf)
        logits[:, self.calls] = 0.0
        return logits


def test_remask_draws_every_open_position_anew_at_every_step():
    """After step k of n, a random fraction k/n is written, all of it in that step, and the rest is masked again."""
    start = torch.full((4, 8), 12)
    start[:, 0] = 11
    before = start
    for step, canvas in enumerate(canvases_of(Counts(), start, 8, "remask"), 1):
        assert (canvas[:, 1:].eq(step) | canvas[:, 1:].eq(12)).all()
        assert ((canvas == step).sum(1) - 7 * step / 8).abs().max() <= 0.5
        assert step in (1, 8) or (canvas[before == step - 1] == 12).any()
        before = canvas


@pytest.mark.parametrize("order", ALL)
def test_only_what_the_order_needs_has_logits(order):
    """Orders that choose without looking ask for one row of logits per token that they set.

    The others ask for the holes of the block.
    """
    model, rows = tiny_model(V=5, T=8), []
    model.register_forward_hook(lambda module, inputs, logits: rows.append(len(logits)))
    complete(model, torch.full((2, 8), 5), steps=4, order=order, block=4, tau=1.0, gamma=0.0)
    expected = {"remask": [4, 8, 4, 8], **dict.fromkeys(OWN_PACE, [8, 6, 4, 2] * 2)}
    assert rows == expected.get(order, [4] * 4 if order in BLIND else [8, 4, 8, 4])


@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.parametrize("order", BLIND)
def test_orders_that_do_not_look_ask_only_about_the_holes_that_they_set(order, block):
    """In remask these are the holes that a step writes and doesn't mask again. Rows that set none are not read."""
    model, asked, before = tiny_model(V=5, T=8), [], torch.full((3, 8), 5)
    model.register_forward_pre_hook(lambda module, inputs, flags: asked.append(flags["where"]), with_kwargs=True)
    before[1, 2] = before[2, 1] = before[2, 5] = 1
    is_open = before == 5
    for step, canvas in enumerate(denoise(model, before, steps=4, order=order, block=block)):
        written = is_open & (canvas != 5)
        if order != "remask":
            written &= before == 5
        elif block:  # two steps for each block
            written &= torch.arange(8) // 4 == step // 2
        assert torch.stack(asked[step], 1).equal(written[written.any(1)].nonzero())
        before = canvas
    assert not (before == 5).any()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no cuda on this machine")
@pytest.mark.parametrize("order", ALL)
def test_a_step_waits_for_the_device_once_for_its_tokens_and_once_for_its_scores(order):
    model, canvas = tiny_model(V=5, T=16).cuda(), torch.full((3, 16), 5)
    steps = denoise(model, canvas, 4, order, tau=0.0, gamma=0.0, top_p=0.9)
    next(steps)
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True, action="always") as waits:
            n_steps = len(list(steps))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(waits) <= n_steps * (1 if order in BLIND else 2)


def test_threshold_sets_every_confident_hole_and_at_least_one():
    """Fast-dLLM, 2505.22618. Greedy writing at several thresholds equals a slow loop."""
    model = tiny_model(V=7, T=10)
    canvas = torch.full((3, 10), 7)
    canvas[1, 4] = 2
    for tau in (0.2, 0.5, 1.0):
        result = complete(model, canvas, steps=1, order="threshold", temperature=0, tau=tau)
        for row, expected in zip(result, canvas.clone()):
            while (expected == 7).any():
                best, token = model(expected[None])[0].softmax(-1).max(-1)
                holes = [i for i in range(10) if expected[i] == 7]
                surest = max(holes, key=lambda i: best[i])
                for i in holes:
                    if i == surest or best[i] >= tau:
                        expected[i] = token[i]
            assert row.tolist() == expected.tolist()


def certainty(order, probabilities):
    """What an order scores a hole with these probabilities (V,), in plain Python."""
    p = sorted(probabilities.tolist(), reverse=True)
    if order == "confidence":
        return p[0]
    if order == "margin":
        return p[0] - p[1]
    return sum(q * math.log(q) for q in p if q > 0)


def test_entropy_bound_sets_the_most_certain_holes_within_gamma():
    """EB-Sampler, 2505.24857. Each step sets the most certain holes whose summed entropy minus the largest is at most
    gamma, and at least one. Every step equals a slow loop on the known distributions of a joint.
    """
    likely = (-0.4 * (all_texts(3, 5) * torch.arange(5)).sum(1)).exp()  # later tokens are more certain
    joint = likely * torch.rand(3**5, generator=torch.Generator().manual_seed(0)) ** 4
    model = Conditionals(joint.view(3, 3, 3, 3, 3))
    start, sizes = torch.full((6, 5), 3), set()
    start[1, 2], start[2, 0], start[2, 4] = 1, 0, 2
    for gamma in (0.0, 0.5, 1.0, 1.7, 2.6, 10.0):
        before = start
        for canvas in denoise(model, start, order="entropy-bound", gamma=gamma):
            for old, new in zip(before, canvas):
                p = model(old[None])[0].softmax(-1)
                nats = {i: -certainty("entropy", p[i]) for i in range(5) if old[i] == 3}
                ranked, chosen = sorted(nats, key=nats.get), []
                for i in ranked:
                    entropies = [nats[j] for j in (*chosen, i)]
                    if sum(entropies) - max(entropies) <= gamma:
                        chosen.append(i)
                assert [i for i in ranked if new[i] != 3] == chosen
                assert chosen or not ranked
                sizes.add((len(chosen), len(ranked)))
            before = canvas
        assert not (before == 3).any()
    assert {k for k, n in sizes if n == 5} == {1, 2, 3, 4, 5}


def test_entropy_bound_zero_sets_one_hole_per_step_unless_some_are_known():
    """Holes of entropy 0 are set together, and one more with them, because the largest entropy doesn't count."""
    model = Conditionals(torch.rand(2, 2, 2, 2, generator=torch.Generator().manual_seed(0)) + 0.1)
    canvases = canvases_of(model, torch.full((8, 4), 2), order="entropy-bound", gamma=0.0)
    assert [(canvas == 2).sum(1).tolist() for canvas in canvases] == [[n] * 8 for n in (3, 2, 1, 0)]
    # The first three tokens are equal, and more certain than the other two, which are fair coins.
    copies = torch.zeros(2, 2, 2, 2, 2)
    copies[0, 0, 0], copies[1, 1, 1] = 0.9, 0.1
    canvases = canvases_of(Conditionals(copies), torch.full((8, 5), 2), order="entropy-bound", gamma=0.0)
    assert [(canvas == 2).sum(1).tolist() for canvas in canvases] == [[n] * 8 for n in (4, 1, 0)]
    assert canvases[1][:, :3].eq(canvases[1][:, :1]).all()


@pytest.mark.parametrize("block", [None, 4])
@pytest.mark.parametrize("order", ["confidence", "margin", "entropy", "left"])
def test_orders_equal_a_slow_loop(order, block):
    """At temperature 0 with one token per step, each step sets the hole with the highest score."""
    model = tiny_model(V=7, T=10)
    canvas = torch.full((3, 10), 7)
    canvas[1, 4] = 2
    result = complete(model, canvas, 20, order, temperature=0, block=block)
    for row, expected in zip(result, canvas.clone()):
        while (expected == 7).any():
            p = model(expected[None])[0].softmax(-1)
            holes = [i for i in range(10) if expected[i] == 7]
            holes = [i for i in holes if i // (block or 10) == holes[0] // (block or 10)]
            best = holes[0] if order == "left" else max(holes, key=lambda i: certainty(order, p[i]))
            expected[best] = p[best].argmax()
        assert row.tolist() == expected.tolist()


def test_random_order_is_uniform_over_the_holes():
    model = tiny_model(V=3, T=6)
    first = canvases_of(model, torch.full((12_000, 6), 3), 6)[0]
    counts = (first != 3).sum(0)
    assert counts.sum() == 12_000
    assert chi_square_p(counts, torch.full((6,), 1 / 6)) > 0.001


@pytest.mark.parametrize("order", ORDERS)
def test_no_more_passes_than_holes(order):
    """That holds for any number of steps and any batch, because a step that sets nothing asks nothing."""
    model = Conditionals(torch.ones(2, 2, 2))
    start = torch.tensor([[2, 2, 2], [0, 2, 1], [2, 1, 2]])
    canvases = canvases_of(model, start, 50, order)
    assert (len(canvases), model.calls) == (3, 3)


def test_one_step_is_one_parallel_guess():
    model = Conditionals(torch.ones(2, 2, 2))
    paced = [order for order in ALL if order not in OWN_PACE]
    for order in paced:
        assert len(canvases_of(model, torch.full((1, 3), 2), 1, order)) == 1
    assert model.calls == len(paced)


def test_random_and_remask_equal_a_slow_loop():
    """The same random numbers choose the same positions in plain Python. Tokens are greedy."""
    model, start = tiny_model(V=7, T=10), torch.full((10,), 7)
    start[3] = 1
    for order in ("random", "remask"):
        expected, holes = start.clone(), [i for i in range(10) if i != 3]
        for step, ((noise,), _) in zip(range(1, 5), uniforms([5], 0, 10)):
            mine = holes if order == "remask" else [i for i in holes if expected[i] == 7]
            n = round(9 * step / 4) - (0 if order == "remask" else 9 - len(mine))
            chosen = sorted(mine, key=lambda i: noise[i], reverse=True)[:n]
            tokens = model(expected[None])[0].argmax(-1)
            for i in mine:
                expected[i] = tokens[i] if i in chosen else 7
        assert complete(model, start[None], 4, order, 0, seeds=[5])[0].tolist() == expected.tolist()
