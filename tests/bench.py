"""Measures what README.md and tests/README.md claim, and prints one table.

    python tests/bench.py             # speed: a few minutes
    python tests/bench.py --runs      # and the training runs themselves: twenty minutes more
    python tests/bench.py --roberta   # the RoBERTa figures alone, beside transformers: ten minutes
    python tests/bench.py --bound     # the error, variance and speed of the likelihood bound
    python tests/bench.py --orders    # the share of a step that is not the forward pass, for every order
    python tests/bench.py --dial      # append and set: training steps, and what it costs to append a token

Every speed is the best of several passes, and a ratio's two sides are timed in turn.
"""

import functools
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn.functional as F

from data.lib.corpus import load_corpus, spaced_windows
from data.lib.errors import command
from data.lib.flags import Attention, flag, parse
from data.lib.kernels import attend
from data.lib.machine import autocast, pick_device
from data.lib.report import standard_error
from data.lib.train_settings import attention_fields, without_noise
from data.lib.training import Run
from data.weights import bert, gpt2
from data.weights.hub import byte_symbols
from model import ModelConfig, Transformer, load_checkpoint
from sample import ORDERS, denoise
from train import STRATA, TrainConfig, draw_batch, loss_of, nelbo, sequence_bounds, update

ROOT = Path(__file__).resolve().parents[1]


def best_seconds(*functions, repeats=5):
    """The shortest time of each function, called in turn."""
    times = [[] for _ in functions]
    for _ in range(repeats + 1):  # the first round warms up
        for function, seconds in zip(functions, times):
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    return [min(seconds[1:]) for seconds in times]


def matmul_flops(device, precision):
    """Floating-point operations per second of a large matrix product in the precision of training."""
    a, b = torch.randn(2, 2048, 2048, device=device)
    with precision:
        a, b = a.to(precision.fast_dtype), b.to(precision.fast_dtype)
        (seconds,) = best_seconds(lambda: a @ b.T, repeats=20)
    return 2 * 2048**3 / seconds


def step_flops(model, config):
    """Those of the matrix products of one training step: forward once, backward twice."""
    matrices = sum(p.numel() for p in model.layers.parameters() if p.ndim == 2)
    attention = 2 * config.n_layer * config.context * config.n_embd
    return 6 * (matrices + attention) * config.batch_size * config.context


def training_speed(device, **flags):
    """Of one training step: tokens per second, the share of the matrix products' peak it reaches, that peak,
    and the shares of its time in forward, backward and optimizer, at the step that was fastest.
    """
    torch.manual_seed(0)
    config = TrainConfig(max_iters=100, **flags)
    shape = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "context")}
    model = Transformer(ModelConfig(**shape)).to(device)
    if config.compile:
        model.compile()
    run = Run(config, model.train(), device)
    split = torch.randint(0, 256, (100_000,)).numpy()
    batch = draw_batch(split, config, torch.Generator().manual_seed(0), model.config)
    clock, parts = {}, []

    def timed(name, function):
        def call(*args):
            start = now(device)
            result = function(*args)
            clock[name] = clock.get(name, 0.0) + now(device) - start
            return result

        return call

    run.optimizer.step = timed("optimizer", run.optimizer.step)
    with mock.patch("train.loss_of", timed("forward", loss_of)):
        for _ in range(8):
            clock.clear()
            start = now(device)
            update(run, batch)
            parts.append((now(device) - start, dict(clock)))
    seconds, clock = min(parts[1:], key=lambda part: part[0])
    shares = [clock["forward"] / seconds, 1 - sum(clock.values()) / seconds, clock["optimizer"] / seconds]
    peak = matmul_flops(device, run.precision)
    return batch[0].numel() / seconds, step_flops(model, config) / seconds / peak, peak, shares


def now(device):
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def sampling_cost(device, B=16, T=256, steps=64, **shape):
    """Seconds of denoising and of as many bare forward passes of the same batch."""
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


# --- the denoiser --------------------------------------------------------------------------------

# The shape of roberta-base.
ROBERTA = bert.Network.Config(50265, 50264, n_layer=12, n_head=12, n_embd=768, token_types=1, tied=True)


def share_outside(model, canvas, steps, order, repeats=2, **flags):
    """What denoising spends outside the forward passes, as a share of all its seconds: the least seen.

    And the milliseconds of a step outside them.
    """
    device, inside = canvas.device, []

    def clock(*_):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        inside.append(time.perf_counter())

    hooks = model.register_forward_pre_hook(clock), model.register_forward_hook(clock)
    shares = []
    for _ in range(repeats + 1):  # the first warms up
        inside.clear()
        start = time.perf_counter()
        # With this tau and gamma, `threshold` and `entropy-bound` set one token a step, so they are cut short.
        for _ in itertools.islice(denoise(model, canvas, steps, order, tau=1.0, gamma=0.0, **flags), steps):
            pass
        clock()
        seconds = inside[-1] - start
        passes = sum(end - begin for begin, end in zip(inside[:-1:2], inside[1:-1:2]))
        shares.append((1 - passes / seconds, 1000 * (seconds - passes) / (len(inside) // 2)))
    for hook in hooks:
        hook.remove()
    return min(shares[1:])


def denoiser_rows(device):
    """The rows of --orders: the share of every order, and what logits at some positions alone save."""
    torch.manual_seed(0)
    T = 256
    for name, network, config, B, steps in (
        ("bytes", Transformer, ModelConfig(), 1, 64),
        ("bytes", Transformer, ModelConfig(), 16, 16),
        ("RoBERTa's vocabulary", bert.Network, ROBERTA, 1, 8),
        ("RoBERTa's vocabulary", bert.Network, ROBERTA, 16, 2),
    ):
        model = network(config).to(device).eval()
        canvas = torch.full((B, T), model.config.mask_id, device=device)
        with torch.no_grad(), autocast(device):
            for order in (*ORDERS, "remask"):
                flags = {"top_k": 50, "top_p": 0.95} if order == "remask" else {}
                share, milliseconds = share_outside(model, canvas, steps, order, **flags)
                yield (
                    f"{name}, batch {B}, `{order}`",
                    f"{milliseconds:.1f} ms a step",
                    f"{share:.1%} of the whole",
                )
            if B == 1 and config is ROBERTA:
                few = torch.rand(B, T, device=device) < 1 / 16
                all_rows, few_rows = best_seconds(lambda: model(canvas), lambda: model(canvas, where=few), repeats=9)
                saved = f"{few_rows / all_rows:.2f} of the {1000 * all_rows:.0f} ms with all"
                yield f"{name}, a pass with logits at {few.sum()} of {T}", f"{1000 * few_rows:.0f} ms", saved


def training_run(*flags):
    """Minutes, peak memory in GB and final NELBO of a training run, and the NELBO of all its val split."""
    with tempfile.TemporaryDirectory() as out_dir:
        start = time.perf_counter()
        train = [sys.executable, str(ROOT / "train.py"), "--out_dir", out_dir, *flags]
        _, status, usage = os.wait4(subprocess.Popen(train, stdout=sys.stderr).pid, 0)
        minutes = (time.perf_counter() - start) / 60
        score = [sys.executable, ROOT / "train.py", "--eval_only", "--init_from", f"{out_dir}/ckpt.pt"]
        printed = subprocess.run(score, check=True, capture_output=True, text=True).stdout
    return minutes, usage.ru_maxrss / 2**20, float(re.search(r"NELBO ([\d.]+)", printed)[1])


# --- the bound -----------------------------------------------------------------------------------


def bound_rows(device):
    """The rows of --bound, of the model that `python train.py` has left in out/: error, variance, speed."""
    model, _, _ = load_checkpoint(ROOT / "out" / "ckpt.pt", device)
    _, val, _, _ = load_corpus("python", 256)
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


# --- RoBERTa, beside the reference implementation ------------------------------------------------


def make_roberta(folder):
    """Random weights of roberta-base's shape in its files, with a byte-pair vocabulary of its size.

    Converts them too: returns the seconds that it took and the peak memory in GB.
    """
    from transformers import RobertaConfig, RobertaForMaskedLM

    symbols = byte_symbols()
    merges = [f"{a} {b}" for a in symbols for b in symbols][: 50265 - 5 - 256]
    tokens = [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        *symbols,
        *(merge.replace(" ", "") for merge in merges),
        "<mask>",
    ]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(merges))
    config = RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1, layer_norm_eps=1e-5)
    config.save_pretrained(folder)
    torch.save(RobertaForMaskedLM(config).state_dict(), folder / "pytorch_model.bin")
    convert = [ROOT / "data" / "weights" / "prepare.py", folder, "--out", folder / "roberta.pt"]
    start = time.perf_counter()
    _, memory = run_python(*convert)
    return time.perf_counter() - start, memory


def run_python(*arguments):
    """What a Python process prints, and its peak memory in GB."""
    process = subprocess.Popen([sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, text=True)
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{arguments} failed")
    return printed, usage.ru_maxrss / 2**20


GPT2 = gpt2.Network.Config(
    50258, 50257, context=1024, n_layer=12, n_head=12, n_embd=768, tied=True, activation="gelu_tanh", block=1,
    shift_id=50256,
)  # fmt: skip


def gpt2_writers(device, n):
    """Functions that append n tokens to 16 with random weights of GPT-2 small's shape and a cache: ours in
    the precision that is fast on this machine, the reference in float32 and in bfloat16.
    """
    from transformers import GPT2Config, GPT2LMHeadModel

    model = gpt2.Network(GPT2).to(device).eval()
    prompt = torch.arange(100, 116, device=device)[None]
    canvas = F.pad(prompt, (0, n), value=model.config.mask_id)
    rules = {"do_sample": True, "top_k": 50, "top_p": 0.95, "pad_token_id": 50256, "eos_token_id": None}

    def ours():
        with torch.no_grad(), autocast(device):
            for _ in denoise(model, canvas, top_k=50, top_p=0.95):
                pass

    def theirs(reference):
        reference.generate(prompt, min_new_tokens=n, max_new_tokens=n, **rules)

    references = (GPT2LMHeadModel(GPT2Config()).to(device, dtype) for dtype in (torch.float32, torch.bfloat16))
    return ours, *(functools.partial(theirs, reference.eval()) for reference in references)


def step_seconds(attentions, device):
    """Seconds of a training step of the default model under each attention, in turn."""
    train_split, _, _, _ = load_corpus("python", 256)
    steps = []
    for name in attentions:
        config = without_noise(TrainConfig(max_iters=1000, attention=Attention.from_text(name)), {})
        torch.manual_seed(0)
        model = Transformer(ModelConfig(**attention_fields(config.attention, 256))).to(device).train()
        run = Run(config, model, device)

        def step(run=run):
            update(run, draw_batch(train_split, run.config, run.generator, run.model.config))

        steps.append(step)
    return best_seconds(*steps, repeats=15)


def token_seconds(model, at, device):
    """Seconds of appending a token after each number of tokens in at, the best of the 32 before; and the
    same if attention is left out, the one layer whose cost may grow.
    """
    canvas, seconds = torch.full((1, max(at)), model.config.mask_id, device=device), []
    for attention in (attend, lambda q, *_: q):
        with torch.no_grad(), autocast(device), mock.patch("model.attend", attention):
            for _ in range(2):  # the first warms up
                start, times = now(device), []
                for _ in denoise(model, canvas):
                    times.append(now(device) - start)
                    start = now(device)
        seconds.append([min(times[n - 32 : n]) for n in at])
    return seconds


def dial_rows(device):
    names = "canvas", "causal", "block:4", "block:16", "block:64"
    canvas, *others = step_seconds(names, device)
    for name, seconds in zip(names[1:], others):
        measure = f"{canvas / seconds:.2f} x the {4096 / canvas:,.0f} tokens/s of the canvas"
        yield f"training step, {name}", f"{4096 / seconds:,.0f} tokens/s", measure
    ours, *theirs = best_seconds(*gpt2_writers(device, 240), repeats=3)
    measure = f"{min(theirs) / ours:.2f} x transformers' (float32 {theirs[0]:.2f} s, bfloat16 {theirs[1]:.2f} s)"
    yield (
        "GPT-2 small, 240 tokens appended with the cache",
        f"{ours:.2f} s, {240 / ours:.1f} tokens/s",
        measure,
    )
    default = ModelConfig(context=1024, **attention_fields(Attention("causal", 1), 256))
    for name, model in (("GPT-2 small", gpt2.Network(GPT2)), ("the default model", Transformer(default))):
        (early, late), (few, many) = token_seconds(model.to(device).eval(), (64, 1024), device)
        measure = f"{1e3 * (late - early):.2f} ms more; with attention left out {1e3 * (many - few):.2f} ms"
        yield (
            f"{name}, a token after 64 and after 1,024",
            f"{1e3 * early:.2f} and {1e3 * late:.2f} ms",
            measure,
        )


def sampling_seconds(folder, device):
    """Seconds of the post's recipe, 256 positions in 10 steps: ours, the reference's ten bare passes,
    the same loop over the reference in float32; and of GPT-2 small writing the 240 tokens with its cache:
    ours, and the reference's in the precision in which it is faster.
    """
    from transformers import RobertaForMaskedLM, TopKLogitsWarper, TopPLogitsWarper

    model, tokenizer, _ = load_checkpoint(folder / "roberta.pt", device)
    reference = RobertaForMaskedLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    append, *generate = gpt2_writers(device, 240)
    start = torch.full((1, 256), tokenizer.mask_id, device=device)
    start[:, :16] = torch.arange(100, 116)
    keep_k, keep_p = TopKLogitsWarper(50), TopPLogitsWarper(0.95)

    def ours():
        with autocast(device):
            for _ in denoise(model, start, 10, "remask", 1.0, 50, 0.95):
                pass

    def passes():
        with autocast(device):
            for _ in range(10):
                reference(start)

    def post():
        canvas, holes = start, start == tokenizer.mask_id
        for step in range(10):
            logits = reference(canvas).logits[holes]
            tokens = keep_p(None, keep_k(None, logits)).softmax(-1).multinomial(1).flatten()
            again = holes & (torch.rand(start.shape, device=device) < 0.9 - step / 10)
            canvas = start.masked_scatter(holes, tokens).masked_fill(again, tokenizer.mask_id)

    with torch.no_grad():
        *seconds, in_float32, in_bfloat16 = best_seconds(ours, passes, post, append, *generate, repeats=3)
        return *seconds, min(in_float32, in_bfloat16)


def fine_tuning_step(folder, side, dropout, device):
    """Seconds of one step at batch 16 x 256, half masked, `ours` or `theirs` with its full logits."""
    from transformers import RobertaForMaskedLM

    generator = torch.Generator().manual_seed(0)
    x0 = torch.randint(300, 50000, (16, 256), generator=generator)
    holes = torch.rand(x0.shape, generator=generator) < 0.5
    if side == "ours":
        model, tokenizer, _ = load_checkpoint(folder / "roberta.pt", device, dropout=dropout)
        run = Run(TrainConfig(max_iters=100, optimizer="adamw", lr=5e-5), model.train(), device)
        batch = x0, x0.masked_fill(holes, tokenizer.mask_id), holes, holes / holes.sum()
        return best_seconds(lambda: update(run, batch), repeats=3)[0]
    rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
    model = RobertaForMaskedLM.from_pretrained(folder, dtype=torch.float32, **rates).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, fused=True)
    inputs, labels = x0.masked_fill(holes, 50264).to(device), x0.masked_fill(~holes, -100).to(device)

    def step():
        with autocast(device):
            loss = model(inputs, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return best_seconds(step, repeats=3)[0]


def roberta_rows(device):
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        seconds, memory = make_roberta(folder)
        yield "converting roberta-base", f"{seconds:.1f} s", f"{memory:.2f} GB"
        ours, passes, post, append, gpt2 = sampling_seconds(folder, device)
        yield (
            "the post's sampling at roberta-base's shape",
            f"{ours:.2f} s",
            "256 positions, 10 steps, batch 1",
        )
        yield "ten bare passes of the reference, autocast", f"{passes:.2f} s", f"{passes / ours:.2f} x"
        yield "the post's loop over the reference, float32", f"{post:.2f} s", f"{post / ours:.2f} x"
        yield "GPT-2 small with our cache, the same 240 tokens", f"{append:.2f} s", f"{append / ours:.2f} x"
        yield "GPT-2 small in transformers, with its cache", f"{gpt2:.2f} s", f"{gpt2 / ours:.2f} x"
        for dropout in (0.0, 0.1):
            figures = {"ours": [], "theirs": []}
            for side in ("ours", "theirs") * 2:  # processes of their own, for the memory
                printed, memory = run_python(__file__, "--step", f"{folder}:{side}:{dropout}", "--device", device)
                figures[side].append((float(printed), memory))
            (ours, our_memory), (theirs, their_memory) = (map(min, zip(*figures[side])) for side in figures)
            measure = f"{theirs / ours:.2f} x the speed, {our_memory / their_memory:.2f} x the memory of "
            measure += f"{4096 / theirs:,.0f} tokens/s, {their_memory:.2f} GB"
            yield (
                f"fine-tuning step, dropout {dropout}",
                f"{4096 / ours:,.0f} tokens/s, {our_memory:.2f} GB",
                measure,
            )


@dataclass
class BenchConfig:
    runs: bool = flag(False, "train.py on python and on shakespeare too")
    roberta: bool = flag(False, "only the figures of RoBERTa")
    orders: bool = flag(False, "only the figures of the orders of the denoiser")
    bound: bool = flag(False, "only those of the bound, of the model in out/")
    dial: bool = flag(False, "only those of append and set")
    step: str = flag("", "print the seconds of one fine-tuning step; FOLDER:SIDE:DROPOUT, for --roberta")
    device: str = flag("auto", "auto (cuda, then mps, then cpu) or a device's name")


def main():
    config = BenchConfig(**parse(BenchConfig, __doc__.splitlines()[0]))
    device = pick_device(config.device)
    if config.step:
        folder, side, dropout = config.step.split(":")
        return print(fine_tuning_step(Path(folder), side, float(dropout), device))
    only = {"roberta": roberta_rows, "orders": denoiser_rows, "bound": bound_rows, "dial": dial_rows}
    for rows in [rows for name, rows in only.items() if getattr(config, name)][:1]:
        for row in rows(device):
            print("| " + " | ".join(row) + " |", flush=True)
        return
    large = {"n_layer": 6, "n_head": 6, "n_embd": 384}
    rows = []
    for name, flags in (
        ("6 layers, 6 heads, width 384, batch 64", {**large, "batch_size": 64}),
        ("the same in float32", {**large, "batch_size": 64, "dtype": "float32"}),
        ("the default", {}),
        ("the default in float32", {"dtype": "float32"}),
    ):
        speed, share, peak, (forward, backward, optimizer) = training_speed(device, **flags)
        measure = f"{share:.0%} of the {peak / 1e9:,.0f} GFLOP/s of a bare matrix product; forward {forward:.0%}, "
        measure += f"backward {backward:.0%}, optimizer {optimizer:.0%}"
        rows.append((f"training step, {name}", f"{speed:,.0f} tokens/s", measure))
    for name, shape in (("6 layers, 6 heads, width 384", large), ("the default", {})):
        sample, passes = sampling_cost(device, **shape)
        measure = f"{sample / passes:.2f} x the {passes:.2f} s of 64 bare forward passes"
        rows.append((f"sampling 16 x 256 in 64 steps, {name}", f"{sample:.2f} s", measure))
    if config.runs:
        for flags in (["--data", "python"], ["--data", "shakespeare", "--max_minutes", "5"]):
            minutes, memory, nats = training_run(*flags)
            measure = f"{minutes:.1f} minutes, {memory:.2f} GB"
            rows.append((f"train.py {' '.join(flags)}", f"{nats:.3f} nats per token", measure))
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    command(main)
