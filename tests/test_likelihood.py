"""Likelihood: the probability with which the sampler writes a text, --score and --judge."""

import re

import numpy as np
import pytest
import torch
from toys import all_texts, tiny_model
from world import sample_text

import sample
from data.lib.session import nats_per_byte
from model import load_checkpoint
from sample import ORDERS, denoise
from train import nelbo

SCORED = [order for order in ORDERS if order != "random"]  # under these a text has one probability


def complete(*args, **flags):
    """The canvas after the last step."""
    return list(denoise(*args, **flags))[-1]


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
    assert len(list(denoise(model, canvas, order="entropy-bound", gamma=0.0, text=texts))) == 4
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


@pytest.mark.usefixtures("in_world")
def test_score_prints_the_likelihood_of_the_sampler(tmp_path, monkeypatch, capsys):
    """From the left, one token a step: the chain rule, in two windows, of which the second is short."""
    text = "line 7 of the book\nline 8 of the book\n"
    (tmp_path / "text.txt").write_text(text)
    flags = ["--score", tmp_path / "text.txt", "--order", "left", "--steps", 32, "--dtype", "float32"]
    printed = sample_text(flags, monkeypatch, capsys).out
    model, tokenizer, _ = load_checkpoint("out/ckpt.pt")
    nats = 0.0
    for window in torch.tensor(tokenizer.encode(text)).split(32):
        for i in range(len(window)):
            xt = window.clone()
            xt[i:] = tokenizer.mask_id
            nats -= model(xt[None])[0, i].log_softmax(-1)[window[i]].item() / len(text)
    assert float(printed.split()[0]) == pytest.approx(nats, abs=2e-4)
    assert float(printed.split()[4]) == pytest.approx(nats / np.log(2), abs=2e-4)
    assert f"{len(text)} tokens" in printed


@pytest.mark.usefixtures("in_world")
def test_the_judge_says_how_likely_each_text_is(world, monkeypatch, capsys):
    flags = ["--prompt", "line 1", "--length", 20, "--dtype", "float32"]
    model, tokenizer, _ = load_checkpoint("gpt/ckpt.pt")
    both = ["--ckpt", "gpt/ckpt.pt", "out/ckpt.pt", "--judge", "gpt/ckpt.pt"]
    said = sample_text([*both, *flags], monkeypatch, capsys).err
    nats = []
    for name in ("gpt", "out"):
        alone = sample_text(["--ckpt", f"{name}/ckpt.pt", *flags], monkeypatch, capsys).out
        nats.append(nats_per_byte(model, tokenizer, alone.removesuffix("\n"), sample.log_likelihood))
    judged = re.findall(r"under gpt/ckpt.pt ([\d.]+) nats", said)
    assert list(map(float, judged)) == pytest.approx(nats, abs=1e-3)
    text = "line 3 of the book\nand more than one window of it\n"
    ids = torch.tensor(tokenizer.encode(text))
    whole = len(ids) // 32 * 32
    nats = float(nelbo(model, ids[None, :whole])) * whole
    nats += float(nelbo(model, ids[None, whole:])) * (len(ids) - whole)
    assert nats_per_byte(model, tokenizer, text, sample.log_likelihood) == pytest.approx(nats / len(text), abs=1e-4)
