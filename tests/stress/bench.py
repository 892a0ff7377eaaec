"""Measures the speed of training and writing, and prints one table.

    python tests/stress/bench.py             # training and writing: a few minutes
    python tests/stress/bench.py --orders    # what each order costs besides the forward passes: 5 minutes
    python tests/stress/bench.py --bound     # error, variance and speed of the bound, for the model in out/: minutes
    python tests/stress/bench.py --dial      # training steps under each attention, and appending a token: 3 minutes
    python tests/stress/bench.py --roberta   # writing and fine-tuning as RoBERTa, beside transformers: 10 minutes
    python tests/stress/bench.py --llama FOLDER    # appending with a published Llama, beside transformers: minutes

Every speed is the best of several passes. The two sides of most ratios are timed in turn.
"""

import functools
import itertools
import resource
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
import torch.nn.functional as F

from data.lib.corpus import load_corpus, spaced_windows
from data.lib.errors import command
from data.lib.flags import Attention, flag, parse
from data.lib.kernels import attend, pack
from data.lib.machine import autocast, pick_device
from data.lib.report import standard_error
from data.lib.train_settings import attention_fields, with_implied
from data.lib.training import Run
from data.weights import bert, gpt2
from data.weights.prepare import convert
from model import ModelConfig, Transformer, load_checkpoint
from sample import ORDERS, denoise
from train import STRATA, TrainConfig, draw_batch, loss_of, nelbo, sequence_bounds, update

ROOT = Path(__file__).resolve().parents[2]
BASE = {"n_layer": 12, "n_head": 12, "n_embd": 768}  # the shape of roberta-base and of gpt2
GIVEN, WRITTEN = 16, 240  # tokens of the post's samples


def now():
    """Seconds, once the device has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def best_seconds(*functions, repeats=5):
    """The shortest time of each function, called in turn. A first round warms up."""
    times = [[] for _ in functions]
    for _ in range(repeats + 1):
        for function, seconds in zip(functions, times):
            start = now()
            function()
            seconds.append(now() - start)
    return [min(seconds[1:]) for seconds in times]


def peak_memory():  # of this process, in GB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def roberta_config(**changes):
    return bert.Network.Config(50265, 50264, **{**BASE, **changes}, token_types=1, tied=True)


# --- training and writing ------------------------------------------------------------------------


def matmul_flops(device, precision):
    """Floating-point operations per second of a large matrix product in the precision of training."""
    a, b = torch.randn(2, 2048, 2048, device=device)
    with precision:
        a, b = a.to(precision.fast_dtype), b.to(precision.fast_dtype)
        (seconds,) = best_seconds(lambda: a @ b.T, repeats=20)
    return 2 * 2048**3 / seconds


def training_speed(device, **flags):
    """Time a training step: tokens per second, its fraction of the speed of a matrix product, that speed, and the
    fractions of its time in forward, backward and optimizer.
    """
    torch.manual_seed(0)
    config = TrainConfig(max_iters=100, **flags)
    shape = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "context")}
    run = Run(config, Transformer(ModelConfig(**shape)).to(device).train(), device)
    split = torch.randint(0, 256, (100_000,)).numpy()
    batch = draw_batch(split, config, torch.Generator().manual_seed(0), run.model.config)
    found = []

    def timed(function, times):
        def call(*args):
            start = now()
            result = function(*args)
            times.append(now() - start)
            return result

        return call

    for _ in range(8):
        forward, optimizer, whole = [], [], []
        step = timed(run.optimizer.step, optimizer)
        with mock.patch("train.loss_of", timed(loss_of, forward)), mock.patch.object(run.optimizer, "step", step):
            timed(update, whole)(run, batch)
        found.append((*whole, *forward, *optimizer))
    seconds, forward, optimizer = min(found[1:])
    fractions = [forward / seconds, 1 - (forward + optimizer) / seconds, optimizer / seconds]
    matrices = sum(p.numel() for p in run.model.layers.parameters() if p.ndim == 2)
    n_tokens, attention = batch[0].numel(), 2 * config.n_layer * config.context * config.n_embd
    flops = 6 * (matrices + attention) * n_tokens  # forward once, backward twice
    peak = matmul_flops(device, run.precision)
    return n_tokens / seconds, flops / seconds / peak, peak, fractions


def writing_seconds(device, B=16, T=256, steps=64, **shape):
    """Seconds of denoising, and of as many bare forward passes of the same batch."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**shape)).to(device).eval()
    canvas = torch.full((B, T), model.config.mask_id, device=device)

    def sample():
        for _ in denoise(model, canvas, steps, temperature=0.8):
            pass

    def passes():
        for _ in range(steps):
            model(canvas)

    with torch.no_grad(), autocast(device):
        return best_seconds(sample, passes, repeats=3)


def speed_rows(device):
    large = {"n_layer": 6, "n_head": 6, "n_embd": 384}
    for name, flags in (
        ("6 layers, 6 heads, width 384, batch 64", {**large, "batch_size": 64}),
        ("the same in float32", {**large, "batch_size": 64, "dtype": "float32"}),
        ("the default", {}),
        ("the default in float32", {"dtype": "float32"}),
    ):
        speed, fraction, peak, (forward, backward, optimizer) = training_speed(device, **flags)
        measure = f"{fraction:.0%} of the {peak / 1e9:,.0f} GFLOP/s of a bare matrix product; forward {forward:.0%}, "
        measure += f"backward {backward:.0%}, optimizer {optimizer:.0%}"
        yield f"training step, {name}", f"{speed:,.0f} tokens/s", measure
    for name, shape in (("6 layers, 6 heads, width 384", large), ("the default", {})):
        sample, passes = writing_seconds(device, **shape)
        measure = f"{sample / passes:.2f} x the {passes:.2f} s of 64 bare forward passes"
        yield f"sampling 16 x 256 in 64 steps, {name}", f"{sample:.2f} s", measure


# --- orders --------------------------------------------------------------------------------------


def time_outside(model, canvas, steps, order, repeats=2, **flags):
    """What denoising spends outside the forward passes: a fraction of its time, and milliseconds per step, at best."""
    inside, found = [], []
    registers = model.register_forward_pre_hook, model.register_forward_hook
    hooks = [register(lambda *_: inside.append(now())) for register in registers]
    for _ in range(repeats + 1):  # the first one warms up
        inside.clear()
        start = time.perf_counter()
        # With this tau and gamma, `threshold` and `entropy-bound` set one token per step, so they are cut short.
        for _ in itertools.islice(denoise(model, canvas, steps, order, tau=1.0, gamma=0.0, **flags), steps):
            pass
        seconds = now() - start
        passes = sum(end - begin for begin, end in zip(inside[::2], inside[1::2]))
        found.append((1 - passes / seconds, 1000 * (seconds - passes) / (len(inside) // 2)))
    for hook in hooks:
        hook.remove()
    return min(found[1:])


def order_rows(device):
    torch.manual_seed(0)
    T = 256
    for name, network, config, B, steps in (
        ("bytes", Transformer, ModelConfig(), 1, 64),
        ("bytes", Transformer, ModelConfig(), 16, 16),
        ("RoBERTa's vocabulary", bert.Network, roberta_config(), 1, 8),
        ("RoBERTa's vocabulary", bert.Network, roberta_config(), 16, 2),
    ):
        model = network(config).to(device).eval()
        canvas = torch.full((B, T), model.config.mask_id, device=device)
        with torch.no_grad(), autocast(device):
            for order in (*ORDERS, "remask"):
                flags = {"top_k": 50, "top_p": 0.95} if order == "remask" else {}
                fraction, milliseconds = time_outside(model, canvas, steps, order, **flags)
                yield f"{name}, batch {B}, `{order}`", f"{milliseconds:.1f} ms per step", f"{fraction:.1%} of all"
            if B == 1 and network is bert.Network:
                few = torch.rand(B, T, device=device) < 1 / 16
                all_rows, few_rows = best_seconds(lambda: model(canvas), lambda: model(canvas, where=few), repeats=9)
                saved = f"{few_rows / all_rows:.2f} of the {1000 * all_rows:.0f} ms with all"
                yield f"{name}, a pass with logits at {few.sum()} of {T}", f"{1000 * few_rows:.0f} ms", saved


# --- the bound -----------------------------------------------------------------------------------


def bound_rows(device):
    model, _, checkpoint = load_checkpoint(ROOT / "out" / "ckpt.pt", device)
    _, val, _, _ = load_corpus(checkpoint["train"]["data"], 256)
    tokens = torch.from_numpy(spaced_windows(val, 256, 2**18)[0])  # (1024, 256)
    with autocast(device):
        error = standard_error(*sequence_bounds(model, tokens, draws=8)) * 2**0.5  # of half as many tokens
        yield "standard error of the bound", f"{error:.4f} nats per token", f"{4 * tokens.numel():,} tokens"
        few, draws, variance = tokens[::16], 256, {}
        for strata in (STRATA, 1):
            nats, n_text = sequence_bounds(model, few, draws=draws, strata=strata)
            variance[strata] = (nats.sum(1) / n_text.sum()).var().item()
        factor = variance[1] / variance[STRATA]
        measure = f"{factor:.1f} +- {factor * (4 / (draws - 1)) ** 0.5:.1f} times the {variance[STRATA]:.2e} "
        measure += f"of stratified ones, over {draws} draws of {few.numel():,} tokens"
        yield "variance of the bound, independent levels", f"{variance[1]:.2e}", measure

        def passes():
            with torch.no_grad():
                for x0 in tokens.split(64):
                    model(x0.to(device))

        bound, bare = best_seconds(lambda: nelbo(model, tokens), passes, repeats=3)
        measure = f"{bare / bound:.2f} of the speed of bare forward passes"
        yield "scoring", f"{tokens.numel() / bound:,.0f} tokens/s", measure


# --- append and set ------------------------------------------------------------------------------


def step_seconds(attentions, device):
    """Seconds of a training step of the default model under each attention."""
    train_split, steps = np.random.default_rng(0).integers(256, size=2**16), []
    for name in attentions:
        config = with_implied(TrainConfig(max_iters=1000, attention=Attention.from_text(name)), {})
        torch.manual_seed(0)
        model = Transformer(ModelConfig(**attention_fields(config.attention, 256))).to(device).train()
        run = Run(config, model, device)
        steps.append(lambda run=run: update(run, draw_batch(train_split, run.config, run.generator, run.model.config)))
    return best_seconds(*steps, repeats=15)


def token_seconds(model, at, device):
    """Seconds of appending a token after each of `at` tokens, the best of 32. Then the same without attention."""
    canvas, seconds = torch.full((1, max(at)), model.config.mask_id, device=device), []
    for attention in (attend, lambda q, *_: q):
        with torch.no_grad(), autocast(device), mock.patch("model.attend", attention):
            for _ in range(2):  # the first one warms up
                start, times = now(), []
                for _ in denoise(model, canvas):
                    times.append(now() - start)
                    start = now()
        seconds.append([min(times[n - 32 : n]) for n in at])
    return seconds


def gpt2_network(shape):
    causal = {"block": 1, "shift_id": 50256, "tied": True, "activation": "gelu_tanh"}
    return gpt2.Network(gpt2.Network.Config(50258, 50257, context=1024, **shape, **causal))


def dial_rows(device):
    names = "canvas", "causal", "block:4", "block:16", "block:64"
    canvas, *others = step_seconds(names, device)
    for name, seconds in zip(names[1:], others):
        measure = f"{canvas / seconds:.2f} x the {2048 / canvas:,.0f} tokens/s of the canvas"
        yield f"training step, {name}", f"{2048 / seconds:,.0f} tokens/s", measure
    default = Transformer(ModelConfig(context=1024, **attention_fields(Attention("causal"), 256)))
    for name, model in (("GPT-2 small", gpt2_network(BASE)), ("the default model", default)):
        (early, late), (few, many) = token_seconds(model.to(device).eval(), (64, 1024), device)
        measure = f"{1e3 * (late - early):.2f} ms more; with attention left out {1e3 * (many - few):.2f} ms"
        yield f"{name}, a token after 64 and after 1,024", f"{1e3 * early:.2f} and {1e3 * late:.2f} ms", measure


# --- RoBERTa and GPT-2 beside transformers, with random weights ----------------------------------


def reference_roberta(shape, **settings):
    from transformers import RobertaConfig, RobertaForMaskedLM

    settings |= {"hidden_size": shape["n_embd"], "intermediate_size": 4 * shape["n_embd"]}
    settings |= {"num_hidden_layers": shape["n_layer"], "num_attention_heads": shape["n_head"]}
    settings |= {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5}
    return RobertaForMaskedLM(RobertaConfig(**settings))


def roberta_writers(shape, device, steps=10):
    """Functions that write as the post does: ours, and the post's loop over the reference."""
    from transformers import TopKLogitsWarper, TopPLogitsWarper

    model = bert.Network(roberta_config(**shape)).to(device).eval()
    reference, mask_id = reference_roberta(shape).to(device).eval(), model.config.mask_id
    start = torch.full((1, GIVEN + WRITTEN), mask_id, device=device)
    start[:, :GIVEN] = torch.arange(100, 100 + GIVEN)
    keep_k, keep_p = TopKLogitsWarper(50), TopPLogitsWarper(0.95)

    def ours():
        with autocast(device):
            for _ in denoise(model, start, steps, "remask", 1.0, 50, 0.95):
                pass

    def post():
        canvas, holes = start, start == mask_id
        for step in range(steps):
            logits = reference(canvas).logits[holes]
            tokens = keep_p(None, keep_k(None, logits)).softmax(-1).multinomial(1).flatten()
            again = holes & (torch.rand(start.shape, device=device) < 1 - (step + 1) / steps)
            canvas = start.masked_scatter(holes, tokens).masked_fill(again, mask_id)

    return ours, post


def gpt2_writers(shape, device):
    """Functions that append as the post does, with a cache: ours, and the reference in float32 and in bfloat16."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = gpt2_network(shape).to(device).eval()
    prompt = torch.arange(100, 100 + GIVEN, device=device)[None]
    canvas = F.pad(prompt, (0, WRITTEN), value=model.config.mask_id)
    rules = {"do_sample": True, "top_k": 50, "top_p": 0.95, "pad_token_id": 50256, "eos_token_id": None}

    def ours():
        with torch.no_grad(), autocast(device):
            for _ in denoise(model, canvas, top_k=50, top_p=0.95):
                pass

    def theirs(dtype):
        reference = GPT2LMHeadModel(GPT2Config(**shape)).to(device, dtype).eval()
        return lambda: reference.generate(prompt, min_new_tokens=WRITTEN, max_new_tokens=WRITTEN, **rules)

    return ours, theirs(torch.float32), theirs(torch.bfloat16)


def fine_tuning_step(side, dropout, device):
    """Seconds of a step at batch 16 x 256, half masked, and the peak memory in GB. `theirs` computes all logits."""
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(300, 50000, (16, 256), generator=generator)
    holes = torch.rand(x0.shape, generator=generator) < 0.5
    xt = x0.masked_fill(holes, 50264)
    if side == "ours":
        model = bert.Network(roberta_config(dropout=dropout)).to(device).train()
        run = Run(TrainConfig(max_iters=100, optimizer="adamw", lr=5e-5), model, device)
        (seconds,) = best_seconds(lambda: update(run, (x0, xt, holes, holes / holes.sum())), repeats=3)
        return seconds, peak_memory()
    model = reference_roberta(BASE, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout)
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)
    inputs, labels = xt.to(device), x0.masked_fill(~holes, -100).to(device)

    def step():
        with autocast(device):
            loss = model(inputs, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    (seconds,) = best_seconds(step, repeats=3)
    return seconds, peak_memory()


def roberta_rows(device):
    with torch.no_grad():
        ours, post = best_seconds(*roberta_writers(BASE, device), repeats=3)
    yield "the post's sampling at roberta-base's shape", f"{ours:.2f} s", "256 positions, 10 steps, batch 1"
    yield "the post's loop over the reference, float32", f"{post:.2f} s", f"{post / ours:.2f} x"
    for dropout in (0.0, 0.1):
        figures = {"ours": [], "theirs": []}
        for side in ("ours", "theirs") * 2:
            with ProcessPoolExecutor(1, get_context("spawn")) as process:  # a new one each time, for its memory
                figures[side].append(process.submit(fine_tuning_step, side, dropout, device).result())
        (ours, our_memory), (theirs, their_memory) = (map(min, zip(*figures[side])) for side in figures)
        measure = f"{theirs / ours:.2f} x the speed, {our_memory / their_memory:.2f} x the memory of "
        measure += f"{4096 / theirs:,.0f} tokens/s, {their_memory:.2f} GB"
        yield f"fine-tuning step, dropout {dropout}", f"{4096 / ours:,.0f} tokens/s, {our_memory:.2f} GB", measure


def llama_writers(folder, dtype, device):
    """Functions that append a hundred greedy tokens with the Llama in a folder: ours, and transformers' `generate`."""
    from transformers import AutoModelForCausalLM

    model, tokenizer, *_ = convert(Path(folder))
    model, context = model.to(device, getattr(torch, dtype)), autocast(device, dtype)
    pack(model, context.fast_dtype)
    text = tokenizer.encode("Once upon a time there was a king who had three sons.")
    prompt = torch.tensor([[model.config.shift_id, *text]], device=device)
    canvas = F.pad(prompt[:, 1:], (0, 100), value=model.config.mask_id)
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device).eval()
    rules = {"max_new_tokens": 100, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def ours():
        with context:
            *_, written = denoise(model, canvas, temperature=0.0)
        return written

    return ours, lambda: reference.generate(prompt, **rules)[:, 1:]


def llama_rows(folder, device):
    writers = {dtype: llama_writers(folder, dtype, device) for dtype in ("float32", "bfloat16")}
    same = [ours().equal(theirs()) for ours, theirs in writers.values()]
    ours, theirs = zip(*(best_seconds(*pair) for pair in writers.values()))
    for dtype, seconds, reference, equal in zip(writers, ours, theirs, same):
        text = "the same text" if equal else "another text"
        yield f"100 tokens in {dtype}", f"{seconds:.2f} s", f"{min(theirs) / seconds:.2f} x", f"{reference:.2f} s", text


@dataclass
class BenchConfig:
    llama: str | None = flag(None, "only appending, with the Llama or Qwen3 in a folder in the hub's layout")
    roberta: bool = flag(False, "only RoBERTa's figures")
    orders: bool = flag(False, "only what each order costs")
    bound: bool = flag(False, "only the figures of the bound, for the model in out/")
    dial: bool = flag(False, "only the figures of append and set")
    device: str = flag("auto", "auto (cuda, then mps, then cpu) or a device's name")


def main():
    config = BenchConfig(**parse(BenchConfig, __doc__))
    device = pick_device(config.device)
    tables = {"roberta": roberta_rows, "orders": order_rows, "bound": bound_rows, "dial": dial_rows}
    tables["llama"] = functools.partial(llama_rows, config.llama)
    rows = next((rows for name, rows in tables.items() if getattr(config, name)), speed_rows)
    for row in rows(device):
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    command(main)
