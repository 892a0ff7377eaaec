"""Methods, and what happens in a step of training."""

import copy
import math
import sys
from unittest import mock

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from toys import ATTENTIONS, level, make_book, rng, tiny_model

import data.lib.corpus
import data.lib.window
import train
from data.lib.flags import Span
from data.lib.train_settings import attention_of
from data.lib.training import Run
from model import load_checkpoint
from train import METHODS, TrainConfig, draw_batch, learning_rate, loss_of, update

TABLE = {  # level, rate, weight and attention of each method
    "default": ("bell:1.2", "t", "mean", "canvas"),
    "bert": ("0.15", "t", "mean", "canvas"),
    "roberta-diffusion": ("grid:10", "t", "mean", "canvas"),
    "d3pm": ("grid:100", "t", "elbo", "canvas"),
    "mdlm": ("uniform", "t", "elbo", "canvas"),
    "ar-diffusion": ("uniform", "slant:1", "elbo", "canvas"),
    "diffusionbert": ("uniform", "spindle:0.3", "mean", "canvas"),
    "block-diffusion": ("uniform", "t", "elbo", "block:16"),
    "gpt": ("1", "t", "mean", "causal"),
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
    one_level = level in ("0.15", "1") or method == "roberta-diffusion"
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
        run.model.zero_grad = lambda: None  # keep them to be compared
        update(run, draw_batch(corpus, config, rng(), model.config))
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    torch.testing.assert_close(*gradients)


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
        run.model.zero_grad = lambda: None  # keep them to be compared
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
    torch._dynamo.reset()  # it remembers what changed in earlier tests
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


@pytest.mark.parametrize("attention", ATTENTIONS, ids=str)
def test_a_compiled_model_reads_texts_of_several_lengths(attention):
    """From the second length on, torch compiles for any, and numbers computed from it are symbols, too."""
    torch._dynamo.reset()  # it remembers the lengths of earlier tests
    model = tiny_model(V=8, T=128, **attention)
    plain, counter = copy.deepcopy(model), CompileCounter()
    model.compile(backend=counter, fullgraph=True)
    for T in (16, 24, 32, 40):
        idx = torch.randint(8, (3, T), generator=rng(T))
        assert model(idx, clean=idx).allclose(plain(idx, clean=idx), atol=1e-5)
    assert counter.frame_count <= 3


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
        run.model.zero_grad = lambda: None
        _, norm = update(run, draw_batch(corpus, config, rng(), model.config))
        norms[clip] = norm, torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert norms[0][0] == pytest.approx(norms[1e-3][0]) == pytest.approx(norms[0][1])
    assert norms[1e-3][1] == pytest.approx(1e-3, rel=1e-3)


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


@pytest.mark.parametrize(
    ("minutes", "step", "save"),
    [(1, 4, 0.3), (1, 0.4, 0.1), (10, 0.38, 0.05), (10, 5, 10), (60, 0.1, 2), (1, 0.01, 0.1)],
)
def test_evaluations_take_a_tenth_of_a_run_at_most(minutes, step, save, monkeypatch):
    """With a clock of our own, on which a step and the saving of a checkpoint take this many seconds."""
    clock, spent, sizes = [0.0], [], set()
    monkeypatch.setattr("data.lib.training.time.perf_counter", lambda: clock[0])
    run = Run(TrainConfig(max_minutes=minutes, device="cpu"), tiny_model())
    B, T = run.config.batch_size, run.config.context
    while run.progress() < 1:
        clock[0] += step
        run.step += 1
        run.tick()
        if run.evaluation_is_due():
            n_tokens = run.config.eval_tokens
            tokens_read = n_tokens + T * max(8, min(64, n_tokens // T))  # the bound, and a sample
            spent.append(step * tokens_read / (3 * B * T) + save)  # a step is three times as long as its forward pass
            sizes.add(n_tokens)
            clock[0] += spent[-1]
    assert run.progress() == 1
    assert sum(spent) <= 0.1 * clock[0]
    assert 2 <= len(spent) <= 8
    assert len(sizes) == 1
    assert 4 * T <= n_tokens <= 65536


def test_a_resumed_run_knows_what_its_evaluations_took(monkeypatch):
    """Half a run, whose evaluations took a tenth of all its minutes, resumes, and has no further one but the last."""
    clock, n = [0.0], 0
    monkeypatch.setattr("data.lib.training.time.perf_counter", lambda: clock[0])
    config = TrainConfig(max_iters=100, device="cpu")
    first = Run(config, tiny_model())
    first.step, first.minutes, first.eval_minutes = 50, 1.0, [0.0, 0.1, 0.1]
    names = "step", "minutes", "best", "bound", "corpus", "eval_minutes"
    state = {name: getattr(first, name) for name in names} | {"optimizers": first.optimizer.state()}
    run = Run(config, tiny_model())
    run.restore(state | {"scaler": first.scaler.state_dict(), "random": first.generator.get_state()})
    run.start_clock()
    while run.progress() < 1:
        clock[0] += 1.2
        run.step += 1
        run.tick()
        n += run.evaluation_is_due()
    assert (n, run.step) == (1, 100)


def test_flags_say_how_many_evaluations_there_are(monkeypatch):
    """However long they take."""
    clock, n = [0.0], 0
    monkeypatch.setattr("data.lib.training.time.perf_counter", lambda: clock[0])
    run = Run(TrainConfig(max_iters=100, evals=5, eval_tokens=999, device="cpu"), tiny_model())
    while run.progress() < 1:
        clock[0] += 1
        run.step += 1
        run.tick()
        if run.evaluation_is_due():
            clock[0] += 100
            n += 1
    assert (n, run.config.eval_tokens) == (5, 999)
