"""The sampler: what it draws, what it leaves alone, and in which order."""

import math
import warnings
from typing import get_args, get_type_hints

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toys import Conditionals, all_texts, chi_square_p, tiny_model

from data.lib.errors import Mistake
from data.lib.prompt import make_canvas, split_prompt
from data.lib.sample_settings import unseen
from data.lib.tokenizer import ByteTokenizer
from data.lib.window import look_at
from model import ModelConfig
from sample import ORDERS, SampleConfig, denoise, draw, uniforms
from train import nelbo

ALL = [*ORDERS, "remask"]
BLIND = ["random", "left", "remask"]  # they choose without looking
OWN_PACE = ["threshold", "entropy-bound"]  # they take as many steps as they need
SCORED = [order for order in ORDERS if order != "random"]  # under these a text has one probability


def uniform(n, seed=0):
    """n numbers in (0, 1], float64."""
    return 1 - torch.rand(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def canvases_of(*args, **flags):
    """The canvas after each step."""
    return list(denoise(*args, **flags))


def complete(*args, **flags):
    """The canvas after the last step."""
    return canvases_of(*args, **flags)[-1]


def test_every_order_is_offered():
    (choices,) = get_args(get_type_hints(SampleConfig)["order"])
    assert sorted(get_args(choices)) == sorted([*ORDERS, "remask"])


# --- the draw ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.5, 0, 1), (1, 0, 1), (2, 0, 1), (1, 9 + 25_000, 1), (2, 0, 0.7)]
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


# --- the loop ------------------------------------------------------------------------------------


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


def test_entropy_bound_with_a_huge_gamma_sets_all_holes_at_once():
    model = Conditionals(torch.ones(3, 3, 3))
    start = torch.tensor([[3, 3, 3], [0, 3, 1], [3, 1, 3]])
    (canvas,) = canvases_of(model, start, order="entropy-bound", gamma=1e9)
    assert not (canvas == 3).any()
    assert model.calls == 1


@pytest.mark.parametrize("order", ALL)
def test_special_tokens_are_never_written(order):
    model = tiny_model(V=6, T=16, special_ids=(0, 2, 6))
    written = complete(model, torch.full((20, 16), 6), steps=4, order=order, temperature=3)
    assert set(written.unique().tolist()) == {1, 3, 4, 5}


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


def test_same_seed_same_text():
    model, canvas = tiny_model(V=5, T=8), torch.full((2, 8), 5)
    texts = [complete(model, canvas, 4, seeds=seeds).tolist() for seeds in ((1, 2), (1, 2), (2, 3))]
    assert texts[0] == texts[1] != texts[2]
    assert texts[0][0] != texts[0][1] == texts[2][0]


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


def test_log_p_is_what_the_model_gave_each_token():
    """The temperature doesn't count, and where the prompt stands log_p stays as it was."""
    model, canvas, log_p = tiny_model(V=5, T=6), torch.tensor([[1, 5, 5, 2, 5, 5]]), torch.full((1, 6), 7.0)
    written = complete(model, canvas, 1, temperature=2.0, log_p=log_p)
    expected = model(canvas)[0].log_softmax(-1).gather(1, written[0, :, None])[:, 0]
    torch.testing.assert_close(log_p[0], expected.where(canvas[0] == 5, 7.0))


def log_p_of(model, texts, steps=None, order="random", **flags):
    """Log of the probability with which the sampler writes each of texts (N, T), in nats, (N,)."""
    log_p, canvas = torch.zeros(texts.shape), torch.full_like(texts, model.config.mask_id)
    assert complete(model, canvas, steps, order, text=texts, log_p=log_p, **flags).equal(texts)
    return log_p.double().sum(1)


def test_an_almost_impossible_text_has_a_finite_likelihood():
    """It is far below the smallest number of float32."""
    model = tiny_model(V=3, T=4)
    model.head.weight.data.mul_(300)
    log_p = log_p_of(model, all_texts(3, 4), 4, "left")
    assert log_p.isfinite().all()
    assert log_p.min() < -300


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("order", SCORED)
def test_probabilities_of_all_texts_sum_to_one(order, steps):
    """In an order that only looks at the distributions, a text has one probability (DUEL, 2603.01367)."""
    log_p = log_p_of(tiny_model(V=3, T=4), all_texts(3, 4), steps, order, tau=0.6, gamma=0.6)
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-5)


def test_entropy_bound_zero_gives_the_probabilities_of_entropy_with_one_hole_per_step():
    """They sum to 1, too."""
    model, texts = tiny_model(V=3, T=4), all_texts(3, 4)
    canvas = torch.full_like(texts, 3)
    assert len(canvases_of(model, canvas, order="entropy-bound", gamma=0.0, text=texts)) == 4
    log_p = log_p_of(model, texts, order="entropy-bound", gamma=0.0)
    assert log_p.exp().sum().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(log_p, log_p_of(model, texts, 4, "entropy"))


def test_left_with_one_token_per_step_is_the_chain_rule():
    model, texts = tiny_model(V=3, T=4), all_texts(3, 4)
    expected = 0.0
    for k in range(4):
        xt = texts.clone()
        xt[:, k:] = 3
        expected += model(xt)[:, k].log_softmax(-1).gather(1, texts[:, [k]])[:, 0].double()
    torch.testing.assert_close(log_p_of(model, texts, 4, "left"), expected, rtol=1e-5, atol=1e-5)


def test_the_mean_over_random_orders_is_the_nelbo():
    model, texts = tiny_model(V=3, T=4), all_texts(3, 4)[[7, 40]]
    many = texts.repeat_interleave(4000, 0)
    nats = -log_p_of(model, many, 4, "random").mean().item() / 4
    assert nats == pytest.approx(nelbo(model, texts, draws=8000, batch_size=8000), rel=0.01)


def test_guidance_is_the_formula():
    """(1 + w) times the logits minus w times those without the prompt (2410.18514). Special tokens stay visible."""
    model = tiny_model(V=6, T=5, special_ids=(0, 6))
    canvas, blank = torch.tensor([[0, 2, 6, 3, 6]]), torch.tensor([[0, 6, 6, 6, 6]])
    where = canvas == 6
    given = torch.tensor([[False, True, False, True, False]])
    whole = slice(0, 5)
    guided = look_at(model, canvas, given, whole, whole, 10, 1.5, None)(where)[:, 1:6]
    expected = 2.5 * model(canvas)[0, [2, 4], 1:6] - 1.5 * model(blank)[0, [2, 4], 1:6]
    torch.testing.assert_close(guided, expected)
    strong = complete(model, canvas, 1, temperature=0, guidance=1.5)
    assert strong[0, 2] == expected[0].argmax() + 1


def test_a_long_canvas_is_seen_through_a_window_that_moves():
    """Every pass sees at most `context` tokens, and blocks are filled from left to right."""
    model, seen = tiny_model(V=5, T=16), []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    start = torch.full((2, 100), 5)
    start[:, 40:50] = 1
    before, frontier = start, 0
    for canvas in canvases_of(model, start, 100, "confidence"):
        changed = (canvas != before).any(0).nonzero().flatten()
        assert changed.numel() == 0 or changed.min() // 4 == changed.max() // 4
        assert (changed >= frontier).all()
        frontier = changed.min().item() // 4 * 4 if changed.numel() else frontier
        before = canvas
    assert max(idx.shape[1] for idx in seen) == 16
    assert [idx.shape[1] for idx in seen[-4:]] == [12] * 4
    assert seen[-1][:, :8].ne(5).all()  # the last block of four has eight tokens to its left
    assert canvas[:, 40:50].eq(1).all()


# --- prompts -------------------------------------------------------------------------------------


def test_holes_in_a_prompt():
    assert split_prompt("é<mask*3>b<mask>") == ["é", 3, "b", 1, ""]
    assert split_prompt("<mask*12>") == ["", 12, ""]
    assert split_prompt("<masks> <MASK>") == ["<masks> <MASK>"]
    for text in ("<mask*4:12>", "<mask*0>", "<mask*>", "<mask*3:>", "<mask*4-12>"):
        with pytest.raises(Mistake, match="a hole is <mask>"):
            split_prompt(text)


def test_canvas_of_a_prompt():
    def canvas(prompt, length=None, suffix="", context=16):
        return make_canvas(prompt, suffix, length, ByteTokenizer(), context)

    assert canvas("ab") == [97, 98] + [256] * 14
    assert canvas("é<mask*3>b") == [*"é".encode(), 256, 256, 256, 98]
    assert canvas("a<mask>b", 5) == [97, 256, 98, 256, 256]
    assert canvas("a", 4, "b") == [97, 256, 256, 98]
    assert canvas("a<mask>", None, "b") == [97, 256, 98]
    assert canvas("<mask*2>a<mask>") == [256, 256, 97, 256]
    assert canvas("a<mask*3>", 6, "b") == [97, 256, 256, 256, 256, 98]
    assert len(canvas("a<mask*40>")) == 41  # longer than context
    assert len(canvas("a" * 20, 30)) == 30
    for prompt, length in (("too long", 4), ("a" * 17, None), ("a<mask*4>", 4)):
        with pytest.raises(Mistake, match="the canvas has"):
            canvas(prompt, length)


@pytest.mark.parametrize(
    ("block", "text", "expected"),
    [
        (1, "ab__", False),
        (1, "a_b_", True),
        (1, "abcd", False),
        (1, "____", False),
        (1, "ab_$", False),  # special tokens are no text
        (2, "a_b_", True),
        (2, "ab_c", False),  # a block sees all of itself
        (2, "_abc", True),
        (None, "_bcd" * 9, False),  # on a canvas every token sees all others
    ],
)
def test_which_holes_are_filled_without_seeing_some_text(block, text, expected):
    config = ModelConfig(vocab_size=257, mask_id=256, context=16, block=block, special_ids=(36,))
    assert unseen([256 if c == "_" else ord(c) for c in text], config) == expected


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
