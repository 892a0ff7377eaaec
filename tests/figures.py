"""Draws the figures of tests/README.md, each with the command that stands there, as an SVG.

    python tests/figures.py levels      # BERT against the rest: loss by noise level, a sample of each
    python tests/figures.py limit       # how close a trained model comes to the entropy of its source
    python tests/figures.py parallel    # what it costs to set several tokens at once
    python tests/figures.py orders      # forward passes against the quality of the text
    python tests/figures.py answers     # questions answered rightly, by order and forward passes
    python tests/figures.py digits      # pictures named by their likeliest caption, and drawn from a word
    python tests/figures.py dial        # from append to set: the bound for each attention
    python tests/figures.py speed       # the same models: quality of the text against tokens per second
    python tests/figures.py post        # the post's comparison: RoBERTa's loop and GPT-2's
    python tests/figures.py recipe      # the default training run with each of its parts taken away
    python tests/figures.py repeat      # little text, read many times: append overfits, set goes on
    python tests/figures.py changes     # the README's five changes, each made and tried (printed alone)
    python tests/figures.py counts      # what the shipped model writes: its words, what is copied (printed)
    python tests/figures.py gauss       # masks against Gaussian noise: the bound by minutes, and the text

What is drawn is also printed. Models that a figure needs and does not find, it trains.
"""

import csv
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
import torch.nn.functional as F

from data.digits.prepare import WORDS
from data.hmm.prepare import text_nats
from data.lib.corpus import DATA, SPLITS, load_corpus, spaced_windows, windows_at, write_corpus
from data.lib.errors import Mistake, command
from data.lib.flags import Rate, argument, flag, parse
from data.lib.machine import autocast, pick_device
from data.lib.prompt import MOST, shown_of
from data.lib.report import standard_error
from data.lib.sample_settings import SHIPPED
from model import load_checkpoint
from sample import ORDERS, denoise, log_likelihood
from train import loss_of, nelbo, sequence_bounds

ROOT = Path(__file__).resolve().parents[1]
FIGURES = (
    *("levels", "limit", "parallel", "orders", "answers", "digits", "dial", "speed", "post"),
    *("recipe", "repeat", "changes", "counts", "gauss"),
)
EARLIER = "--n_embd 192 --batch_size 16 --widen 0"  # the default when most figures were drawn


@dataclass
class FiguresConfig:
    figure: Literal[FIGURES] = argument(f"one of {', '.join(FIGURES)}")
    seeds: int = flag(1, "levels, recipe, dial on Shakespeare: models of each kind to train", least=1)
    texts: int = flag(32, "texts for each point, or each digit, of a figure that writes some", least=1)
    minutes: float = flag(10.0, "gauss: to train each model for", above=0)
    processes: int = flag(1, "that train a model together, under torchrun", least=1)
    save: str | None = flag(None, "the picture (default: .github/FIGURE.svg)")
    device: str = flag("auto", "auto (cuda, then mps, then cpu) or a device's name")


PYTHON = [sys.executable]  # what runs train.py


def train(out_dir, *flags, script=("train.py",)):
    """Train a model by a script unless there is one in out_dir; the path of its checkpoint."""
    folder = ROOT / out_dir
    if not (folder / "ckpt.pt").exists():
        if folder.exists():
            raise Mistake(f"{folder}: there is no model in it yet; complete its run, or move it away")
        flags = " ".join(flags)
        print(f"python {' '.join(script)} {flags} --out_dir {out_dir}", file=sys.stderr)
        unfinished = folder.with_name(f"{folder.name}-unfinished")  # no model yet, should Ctrl-C end it
        shutil.rmtree(unfinished, ignore_errors=True)
        arguments = [*PYTHON, *script, *flags.split(), "--out_dir", unfinished]
        if subprocess.run(arguments, cwd=ROOT, stdout=sys.stderr).returncode:
            sys.exit(2)  # it has said why
        unfinished.rename(folder)
    return folder / "ckpt.pt"


def windows(split, T, n_tokens):
    """About n_tokens of a split, as windows (N, T) that are spaced evenly."""
    return torch.from_numpy(spaced_windows(split, T, n_tokens)[0])


def write(model, n, T, steps=None, order="random", **flags):
    """(n texts written from an empty canvas, (n, T), and the forward passes that it took)."""
    passes = []
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    canvas = torch.full((n, T), model.config.mask_id, device=next(model.parameters()).device)
    for canvas in denoise(model, canvas, steps, order, **flags):
        pass
    hook.remove()
    return canvas.cpu(), len(passes)


def evaluations(path, *columns):
    """What the log of a checkpoint's run says of its evaluations: an array for each column."""
    with open(path.with_name("log.csv"), newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val_nats_per_token"]]
    return [np.array([float(row[column]) for row in rows]) for column in columns]


def log_of(path, batch_size=16):
    """Millions of tokens that a run had seen at its evaluations, and nats per token, an array each."""
    steps, nats = evaluations(path, "step", "val_nats_per_token")
    return steps * batch_size * 256 / 1e6, nats


def plot(path, n_panels=1, n_rows=1):
    """A figure with panels in n_rows, to be filled; call the last to write it."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "setitem"  # the same figure is the same file
    from matplotlib import pyplot

    n = n_panels // n_rows
    figure, panels = pyplot.subplots(n_rows, n, figsize=(5 * n, 4 * n_rows), layout="constrained", squeeze=False)

    def save():
        figure.savefig(path, format="svg", metadata={"Date": None}, facecolor="white")

    return *panels.flatten(), save


# --- levels --------------------------------------------------------------------------------------

METHODS = {  # the noises of four rows of the README table, with the default prompts
    "0.15 (BERT)": "--level 0.15 --weight mean",
    "grid:10, one for a batch": "--level grid:10 --one_level --weight mean",
    "uniform, mean": "--level uniform --weight mean",
    "uniform, elbo": "--level uniform --weight elbo",
}


@torch.no_grad()
def loss_at(model, tokens, t):
    """Mean nats of a hole of tokens (N, T) at noise level t."""
    generator, device = torch.Generator().manual_seed(0), next(model.parameters()).device
    total = count = 0
    for x0 in tokens.split(64):
        holes = (torch.rand(x0.shape, generator=generator) < t).to(device)
        x0 = x0.to(device)
        xt = x0.masked_fill(holes, model.config.mask_id)
        total += loss_of(model, x0, xt, holes, holes.float()).sum().item()
        count += holes.sum().item()
    return total / count


def levels(config, device):
    panel, save = plot(config.save)
    ts = [round(0.05 * i, 2) for i in range(1, 21)]
    shown = (0.15, 0.4, 0.6, 0.8, 1.0)
    print("| method | seed | NELBO |", " | ".join(f"t = {t}" for t in shown), "|")
    _, val, _, _ = load_corpus("shakespeare", 256)
    tokens = windows(val, 256, len(val))
    for number, (name, flags) in enumerate(METHODS.items()):
        losses = []
        for seed in range(config.seeds):
            shape = f"--data shakespeare --max_iters 250 --n_embd 128 --batch_size 16 --evals 1 --seed {seed}"
            model, tokenizer, _ = load_checkpoint(train(f"out-levels/{number}-{seed}", shape, flags), device)
            with autocast(device):
                losses.append([loss_at(model, tokens[::4], t) for t in ts])  # a quarter: twenty times over
                bound = nelbo(model, tokens, draws=2)
                text, _ = write(model, 1, 256, 128, temperature=0.7)
            nats = " | ".join(f"{losses[-1][ts.index(t)]:.3f}" for t in shown)
            print(f"| {name} | {seed} | {bound:.3f} | {nats} |", flush=True)
            if seed == 0:
                print(tokenizer.decode(text[0].tolist()), flush=True)
        losses = np.array(losses)
        panel.plot(ts, losses.mean(0), label=name)
        panel.fill_between(ts, losses.min(0), losses.max(0), alpha=0.2)
    panel.axvline(0.15, color="gray", linestyle=":")
    panel.set(xlabel="noise level t, the share of holes", ylabel="validation loss, nats per hole")
    panel.legend()
    save()


# --- a source of known entropy -------------------------------------------------------------------

FLOOR = 1e-3  # share of the probability that scoring gives to all letters alike, so that errors are finite
HMM = "--data hmm --n_embd 192 --context 64 --batch_size 64 --widen 0 --prompt_len 0 --max_minutes 6.5"
HMM += " --evals 12 --eval_tokens 262144"  # all that there are, so that the log is about the same text


def limit(config, device):
    panel, save = plot(config.save)
    path = train("out-hmm", HMM)
    _, val, _, _ = load_corpus("hmm")
    tokens = windows(val, 64, len(val))
    entropy = text_nats(tokens).mean()
    model, _, _ = load_checkpoint(path, device)
    with autocast(device):
        nats, n_maskable = sequence_bounds(model, tokens, draws=8)
    bound = (nats.mean(0).sum() / n_maskable.sum()).item()
    print(f"NELBO {bound:.4f} nats per token, standard error {standard_error(nats, n_maskable):.4f}")
    print(f"true entropy of the same windows {entropy:.4f}: {bound / entropy - 1:.2%} above")
    panel.plot(*evaluations(path, "minutes", "val_nats_per_token"), marker="o", label="NELBO of the model")
    panel.axhline(entropy, color="gray", linestyle=":", label="true entropy of the windows")
    panel.set(xlabel="minutes of training", ylabel="nats per token")
    panel.legend()
    save()


def parallel(config, device):
    token_error, sequence_error, save = plot(config.save, 2)
    model, _, _ = load_checkpoint(train("out-hmm", HMM), device)
    _, val, _, _ = load_corpus("hmm")
    real = text_nats(windows(val, 64, 64 * 512), FLOOR).mean()
    ks = [1, 2, 4, 8, 16, 32, 64]
    print("| order | tokens a step | nats per token | impossible |")
    for order in ("random", "confidence"):
        errors = []
        for k in ks:
            with autocast(device):
                texts, _ = write(model, 512, 64, 64 // k, order)
            impossible = 1 - np.isfinite(text_nats(texts)).all(1).mean()
            errors.append((text_nats(texts, FLOOR).mean(), impossible))
            print(f"| {order} | {k} | {errors[-1][0]:.3f} | {impossible:.1%} |", flush=True)
        token_error.plot(ks, [nats for nats, _ in errors], marker="o", label=order)
        sequence_error.plot(ks, [share for _, share in errors], marker="o", label=order)
    print(f"| text of the source | | {real:.3f} | 0.0% |")
    token_error.axhline(real, color="gray", linestyle=":", label="text of the source")
    token_error.set(title="nats per token under the source, with a floor", ylim=(0, None))
    sequence_error.set(title="share of impossible sequences", ylim=(0, 1))
    for panel in (token_error, sequence_error):
        panel.set(xscale="log", xlabel="tokens per step")
        panel.set_xticks(ks, labels=map(str, ks))
        panel.minorticks_off()
    token_error.legend()
    save()


# --- orders --------------------------------------------------------------------------------------

STEPS, TAUS = (8, 16, 32, 64, 128, 256), (0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.99)
OWN_PACE = {  # the orders that take as many steps as they need, and the values of their flag
    "threshold": ("tau", TAUS),
    "entropy-bound": ("gamma", (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)),
}


def pair_entropy(texts):
    """Entropy of the pairs of successive bytes in texts (N, T), in bits."""
    pairs = (texts[:, :-1] * 256 + texts[:, 1:]).flatten().bincount()
    p = pairs[pairs > 0] / pairs.sum()
    return -(p * p.log2()).sum().item()


def orders(config, device):
    """Quality is a pair, since a text that repeats itself looks likely: its NELBO under a judge, a model
    trained longer from another seed, and the entropy of its byte pairs (2604.02718).
    """
    model, _, _ = load_checkpoint(train("out-earlier", EARLIER), device)
    judge, _, _ = load_checkpoint(train("out-judge", EARLIER, "--max_minutes 15 --seed 1"), device)
    T = model.config.context
    _, val, _, _ = load_corpus("python", T)

    def quality(texts):
        return nelbo(judge, texts, draws=16), pair_entropy(texts)

    *panels, save = plot(config.save, 2)
    titles = "NELBO under the judge, nats per byte", "entropy of byte pairs, bits"
    with autocast(device):
        real = quality(windows(val, T, config.texts * T))
        print("| text of the corpus | | {:.3f} | {:.2f} |".format(*real))
        for marker, order in zip("osD^vPX*", (*ORDERS, "remask")):
            points = []
            flag_name, choices = OWN_PACE.get(order, ("steps", STEPS))
            for choice in choices:
                texts, passes = write(model, config.texts, T, order=order, **{flag_name: choice})
                points.append((passes, *quality(texts)))
                name = f"{order} {choice}" if order in OWN_PACE else order
                print("| {} | {} | {:.3f} | {:.2f} |".format(name, *points[-1]), flush=True)
            passes, *values = zip(*sorted(points))
            for panel, value in zip(panels, values):
                panel.plot(passes, value, marker=marker, markersize=5, label=order)
    for panel, title, value in zip(panels, titles, real):
        panel.axhline(value, color="gray", linestyle=":", label="text of the corpus")
        panel.set(xscale="log", xlabel="forward passes", title=title)
        panel.set_xticks(STEPS, labels=map(str, STEPS))
        panel.minorticks_off()
    panels[0].legend(fontsize="small")
    save()


# --- prompts and answers -------------------------------------------------------------------------

SUMS = "--data sums --context 48 --batch_size 64 --n_embd 128 --n_head 4 --level uniform --widen 0"
SUMS += " --max_iters 4000 --evals 5 --keep 5"  # ten minutes of two cores of a Xeon with AMX
ANSWERING = "random", "confidence", "margin", "entropy", "left", "threshold"


def answers(config, device):
    """The share of held-out questions that are answered exactly, at temperature 0, by a model that is still
    learning and in the end. A step counts for a question if it sets something there.
    """
    *panels, save = plot(config.save, 2)
    path = train("out-sums", SUMS)
    print("| training steps | order | steps or tau | forward passes | sums | words backwards |")
    for panel, ckpt in zip(panels, (sorted(path.parent.glob("step-*.pt"))[2], path)):
        model, tokenizer, checkpoint = load_checkpoint(ckpt, device)
        T, mask_id, ends = model.config.context, tokenizer.mask_id, model.config.end_ids
        _, val, _, _ = load_corpus("sums", T)
        x0, prompt_len = map(torch.from_numpy, windows_at(val, np.arange(2 * config.texts)[:, None], T))
        canvas = x0.masked_fill(torch.arange(T) >= prompt_len, mask_id)
        is_word = np.array(["Reverse" in tokenizer.decode(row) for row in x0.tolist()])
        texts, starts = canvas.tolist(), prompt_len.flatten().tolist()
        right = [shown_of(*row, mask_id, ends, start) for *row, start in zip(x0.tolist(), texts, starts)]
        for marker, order in zip("osD^vP", ANSWERING):
            points = []
            for choice in TAUS if order == "threshold" else (1, 2, 4, 8, 16):
                flags = {"tau": choice, "steps": None} if order == "threshold" else {"steps": choice}
                before, passes = canvas, np.zeros(len(canvas))
                with autocast(device):
                    for after in denoise(model, canvas, order=order, temperature=0.0, **flags):
                        passes += (after != before).any(1).numpy()
                        before = after
                rows = zip(before.tolist(), texts, starts)
                ours = [shown_of(*row, mask_id, ends, start) for *row, start in rows]
                exact = np.array([a == b for a, b in zip(ours, right)])
                points.append((passes[~is_word].mean(), exact[~is_word].mean()))
                row = f"{points[-1][0]:.1f} | {points[-1][1]:.1%} | {exact[is_word].mean():.1%}"
                print(f"| {checkpoint['step']:,} | {order} | {choice} | {row} |", flush=True)
            panel.plot(*zip(*points), marker=marker, markersize=5, label=order)
        panel.set(xscale="log", xlabel="forward passes", ylabel="sums answered exactly")
        panel.set_title(f"after {checkpoint['step']:,} training steps")
        panel.set_xticks([1, 2, 4, 8, 16], labels=map(str, [1, 2, 4, 8, 16]))
        panel.minorticks_off()
    panels[1].legend(fontsize="small", loc="lower right")
    save()


# --- pictures ------------------------------------------------------------------------------------

DIGITS = "--data digits --batch_size 32 --dropout 0.1"
SEEDS = ("", "--seed 0"), ("-1", "--seed 1")


@torch.no_grad()
def caption_nats(model, tokenizer, canvases, given):
    """Minus the log of the probability, in nats, of canvases (N, T) with each of the words for a caption:
    (N, 10), exactly, all tokens being set from the left, which `--score --order left` prints; or of the
    captions alone, where the pictures are given.
    """
    first, columns = tokenizer.caption, []
    for word in WORDS:
        text = canvases.clone()
        text[:, :first] = torch.tensor(tokenizer.canvas(word, []))
        canvas = torch.full_like(text, tokenizer.mask_id)
        if given:
            canvas[:, first:] = text[:, first:]
        log_p = torch.zeros(canvas.shape)
        *_, _ = denoise(model, canvas, text.shape[1], "left", text=text, log_p=log_p)
        columns.append(-log_p.sum(1))
    return torch.stack(columns, 1)


def digits(config, device):
    """What a model makes of held-out pictures, and another, of another seed, of those that it draws."""
    _, val, tokenizer, _ = load_corpus("digits")
    T, first, width = tokenizer.canvas_len, tokenizer.caption, tokenizer.width
    real, _ = map(torch.from_numpy, windows_at(val, np.arange(len(val.starts))[:, None], T))
    captions = torch.tensor([tokenizer.canvas(word, []) for word in WORDS])  # (10, first)
    meant = (real[:, None, :first] == captions).all(2).int().argmax(1)  # (N,)
    models = [load_checkpoint(train(f"out-digits{name}", DIGITS, seed), device)[0] for name, seed in SEEDS]
    words = torch.arange(10).repeat_interleave(config.texts)
    canvas = torch.full((len(words), T), tokenizer.mask_id)
    canvas[:, :first] = captions[words]
    with autocast(device):
        for temperature in (1.0, 0.7):
            *_, drawn = denoise(models[0], canvas, temperature=temperature)
            named = (caption_nats(models[1], tokenizer, drawn, given=True).argmin(1) == words).float()
            shares = zip(WORDS, named.view(10, -1).mean(1).tolist())
            each = ", ".join(f"{word} {share:.0%}" for word, share in shares)
            print(f"drawn at {temperature} and named as meant: {named.mean():.1%}; {each}", flush=True)
        *panels, save = plot(config.save, 2)
        for panel, title, pictures, of in (
            (panels[0], "real and held out", real, meant),
            (panels[1], "drawn from the word", drawn, words),
        ):
            rows = torch.stack([pictures[of == i][:12, first:] for i in range(10)])  # (10, 12, pixels)
            pixels = F.pad(rows.unflatten(2, (-1, width)) - 257, (0, 2, 0, 2))  # with two white ones between
            panel.imshow(pixels.transpose(1, 2).flatten(2).flatten(0, 1), cmap="gray_r", interpolation="none")
            panel.set_title(title)
            panel.set_axis_off()
        save()
        for given, (model, (_, seed)) in itertools.product((True, False), [*zip(models, SEEDS)]):
            right = caption_nats(model, tokenizer, real, given).argmin(1) == meant
            way = "captions after the pictures" if given else "whole canvases"
            print(f"{right.float().mean():.1%} of {len(right)} named rightly, {seed}, by {way}", flush=True)


# --- from append to set --------------------------------------------------------------------------

ATTENTIONS = "causal", "block:4", "block:16", "block:64", "canvas"
MINUTES = {"shakespeare": 5, "python": 10}


def on_the_dial(corpus, attention, seed=0, minutes=None):
    """The path of a model, trained for as many minutes as the others on its corpus."""
    flags = f"{EARLIER} --data {corpus} --attention {attention} --seed {seed} --prompt_len 0"
    flags += f" --max_minutes {minutes or MINUTES[corpus]} --evals 4 --eval_tokens 16384"
    return train(f"out-dial/{corpus}-{attention.replace(':', '-')}-{seed}", flags)


def dial(config, device):
    """The bound at every point of the dial: over the validation split, after the same minutes and, as the
    logs have it, after as many tokens as the slowest has seen; and of some windows, beside the exact
    likelihood of the sampler that sets the surest token of a block, one a step.
    """
    after_minutes, *curves, save = plot(config.save, 1 + len(MINUTES))
    header = "corpus", "attention", "seed", "tokens", "NELBO", "after as many tokens", "of some", "exact"
    print("|", " | ".join(header), "|")
    for corpus, curve in zip(MINUTES, curves):
        _, val, _, _ = load_corpus(corpus, 256)
        tokens, some = windows(val, 256, len(val)), windows(val, 256, 256 * config.texts)
        seeds = range(config.seeds if corpus == "shakespeare" else 1)
        paths = {name: [on_the_dial(corpus, name, seed) for seed in seeds] for name in ATTENTIONS}
        logs = {name: [log_of(path) for path in paths[name]] for name in ATTENTIONS}
        fewest = min(seen[-1] for each in logs.values() for seen, _ in each)
        bounds = []  # of each attention, those of its seeds
        for name in ATTENTIONS:
            bounds.append([])
            for seed, path, (seen, nats) in zip(seeds, paths[name], logs[name]):
                model, _, _ = load_checkpoint(path, device)
                with autocast(device):
                    bounds[-1].append(nelbo(model, tokens, draws=1 if name == "causal" else 2))
                    row = [f"{seen[-1]:.2f} M", f"{bounds[-1][-1]:.3f}"]
                    row += [f"{np.interp(fewest, seen, nats):.3f}"]
                    if seed == 0:
                        row += [f"{nelbo(model, some, draws=1 if name == 'causal' else 16):.3f}"]
                        exact = -log_likelihood(model, some.flatten(), MOST, order="confidence")
                        row += [f"{exact / some.numel():.3f}"]
                print("|", " | ".join([corpus, name, str(seed), *row]), "|", flush=True)
            for number, (seen, nats) in enumerate(logs[name]):
                curve.plot(seen, nats, color=f"C{len(bounds)}", marker=".", label="" if number else name)
        label = f"{corpus}, {MINUTES[corpus]} minutes"
        after_minutes.plot(ATTENTIONS, np.mean(bounds, 1), marker="o", label=label)
        after_minutes.fill_between(ATTENTIONS, np.min(bounds, 1), np.max(bounds, 1), alpha=0.2)
        curve.set(title=corpus, xlabel="million tokens seen", ylabel="validation bound, nats per token")
        curve.legend()
    after_minutes.set(title="after the same time", ylabel="validation bound, nats per token")
    after_minutes.legend()
    save()


class Point(NamedTuple):
    """How fast and how well a model writes in one way."""

    attention: str
    curve: str
    way: str
    speeds: tuple  # tokens per second, of one text and of several at once
    nats: float  # per byte, under the judge
    bits: float  # entropy of a pair of bytes


def ways_to_write(attention, T=256):
    """(curve, way, flags of denoise) of each point: append at several temperatures, of which the lower make
    its text likelier and poorer; the others in several numbers of steps.
    """
    if attention == "causal":
        return [("", f"temperature {x}", {"temperature": x}) for x in (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)]
    n_blocks, ways = T // int(attention.partition(":")[2] or T), []
    in_steps = [("random, temperature 0.8", "random", 0.8)]
    in_steps += [(order, order, 1.0) for order in (*ORDERS, "remask") if order not in OWN_PACE]
    for curve, order, temperature in in_steps:
        flags = {"order": order, "temperature": temperature}
        ways += [(curve, f"{n} steps", {**flags, "steps": n}) for n in (8, 16, 32, 64, 128) if n >= n_blocks]
    ways += [("threshold", f"tau {x}", {"order": "threshold", "tau": x}) for x in (0.4, 0.6, 0.8, 0.9)]
    return ways + [("entropy-bound", f"gamma {x}", {"order": "entropy-bound", "gamma": x}) for x in (0.1, 1.0, 10.0)]


def speed(config, device):
    """Quality is a pair again: nats per byte under the judge, a causal model trained for longer from another
    seed, and the entropy of byte pairs. Append at several temperatures draws a line from one pair to the
    other: what lies on it or below, at the same entropy, is as good.
    """
    judge, _, _ = load_checkpoint(on_the_dial("python", "causal", 9, 15), device)
    T, sizes, points = 256, (1, config.texts), []
    _, val, _, _ = load_corpus("python", T)

    def quality(texts):
        return nelbo(judge, texts), pair_entropy(texts)

    with autocast(device):
        real = quality(windows(val, T, config.texts * T))
        header = "attention", "way", "passes", "nats per byte", "bits per pair", "tokens/s at batch 1"
        print("|", " | ".join(header), "| at", config.texts, "|")
        print("| text of the corpus | | | {:.3f} | {:.2f} | | |".format(*real))
        for attention in ATTENTIONS:
            model, _, _ = load_checkpoint(on_the_dial("python", attention), device)
            for curve, way, flags in ways_to_write(attention, T):
                speeds = []
                for n in sizes:
                    seconds = []
                    for _ in range(3 if n == 1 else 1):
                        start = time.perf_counter()
                        texts, passes = write(model, n, T, **flags)
                        seconds.append(time.perf_counter() - start)
                    speeds.append(n * T / min(seconds))
                points.append(Point(attention, curve, way, speeds, *quality(texts)))
                row = f"{points[-1].nats:.3f} | {points[-1].bits:.2f} | {speeds[0]:,.0f} | {speeds[1]:,.0f}"
                print(f"| {attention} | {curve} {way} | {passes} | {row} |", flush=True)
    append = sorted((p.bits, p.nats, *p.speeds) for p in points if p.attention == "causal")
    bits, nats, *fastest = zip(*append)
    as_good = [p for p in points if p.bits >= bits[0] and p.nats <= np.interp(p.bits, bits, nats)]
    for i, n in enumerate(sizes):
        ratios = {f"{p.attention} {p.curve} {p.way}": p.speeds[i] / max(fastest[i]) for p in as_good}
        others = {name: ratio for name, ratio in ratios.items() if not name.startswith("causal")}
        best = max(others, key=others.get, default=None)
        factor = f"{others[best]:.2f} times as fast by {best}" if best else "by no way to set"
        print(f"batch {n}, text as good as that of append: {factor}")
    draw_speed(points, real, sizes, config.save)


def draw_speed(points, real, sizes, path):
    """Quality against speed: a column for each way to set, a row for each number of texts and measure."""
    _, *columns = ATTENTIONS
    *panels, save = plot(path, 4 * len(columns), 4)
    panels[0].figure.set_size_inches(14, 12)
    curves = dict.fromkeys(p.curve for p in points if p.curve)
    for i, panel in enumerate(panels):
        row, attention = i // len(columns), columns[i % len(columns)]
        for curve, marker in zip(["", *curves], "osD^v<>PX*"):
            chosen = [p for p in points if p.curve == curve and p.attention in ("causal", attention)]
            speeds, values = [p.speeds[row // 2] for p in chosen], [(p.nats, p.bits)[row % 2] for p in chosen]
            style = {"marker": marker, "markersize": 4, "linewidth": 1, "color": None if curve else "black"}
            panel.plot(speeds, values, label=curve or "append", **style)
        panel.axhline(real[row % 2], color="gray", linestyle=":", label="text of the corpus")
        panel.set(xscale="log")
        panel.set_title(f"{attention}, batch {sizes[row // 2]}")
        if not i % len(columns):
            panel.set_ylabel(("nats per byte under the judge", "bits per pair of bytes")[row % 2])
        if row == 3:
            panel.set_xlabel("tokens per second")
        panel.minorticks_off()
        low, high = panel.get_xlim()
        ticks = [m * 10**e for e in range(1, 6) for m in (1, 3) if low < m * 10**e < high]
        panel.set_xticks(ticks, labels=[f"{tick:,}" for tick in ticks])
    names = panels[0].get_legend_handles_labels()
    panels[0].figure.legend(*names, loc="outside lower center", ncols=6)
    save()


def post(config, device):
    """The post's comparison, at the shapes of roberta-base and of gpt2 with random weights: 16 tokens given
    and 240 written.
    """
    from bench import make_roberta, sampling_seconds

    panel, save = plot(config.save)
    with tempfile.TemporaryDirectory() as folder:
        make_roberta(Path(folder))
        ours, _, loop, append, generate = sampling_seconds(Path(folder), device)
    seconds = {
        "RoBERTa, the post's loop": loop,
        "RoBERTa, ours": ours,
        "GPT-2, transformers": generate,
        "GPT-2, ours": append,
    }
    for name, value in seconds.items():
        print(f"| {name} | {value:.2f} s | {240 / value:,.0f} tokens/s |")
    panel.barh(list(seconds), list(seconds.values()))
    panel.invert_yaxis()
    panel.set(xlabel="seconds for 240 tokens, batch 1")
    save()


# --- the recipe ----------------------------------------------------------------------------------

RECIPE = {
    "the default": "",
    "no convolution": "--conv 0",
    "no Muon": "--optimizer adamw --lr 0.003",
    "a bell that does not widen": "--widen 0",
    "uniform levels": "--level uniform",
    "width 128": "--n_embd 128",
    "width 192": "--n_embd 192",
    "append, for scale": "--attention causal",
}


def recipe(config, device):
    """The bound after five minutes of one core: of the default, and with each part taken away."""
    panel, save = plot(config.save)
    _, val, _, _ = load_corpus("shakespeare", 256)
    tokens, bounds = windows(val, 256, len(val)), {}
    os.environ["OMP_NUM_THREADS"] = "1"  # of the runs, side by side
    n_cores = torch.get_num_threads() if device.type == "cpu" else 1

    def run(seed, number):
        shape = f"--data shakespeare --max_minutes 5 --evals 1 --prompt_len 0 --seed {seed} --device {device}"
        return train(f"out-recipe/{number}-{seed}", shape, list(RECIPE.values())[number])

    # All of one seed before the next, so that a machine's slow minutes fall on all.
    runs = list(itertools.product(range(config.seeds), range(len(RECIPE))))
    with ThreadPoolExecutor(n_cores) as pool:
        paths = list(pool.map(run, *zip(*runs)))
    print("| run | seed | steps | nats per byte |")
    for (seed, number), path in zip(runs, paths):
        model, _, checkpoint = load_checkpoint(path, device)
        name = list(RECIPE)[number]
        with autocast(device):
            bounds.setdefault(name, []).append(nelbo(model, tokens, draws=2))
        print(f"| {name} | {seed} | {checkpoint['step']:,} | {bounds[name][-1]:.3f} |", flush=True)
    values = np.array(list(bounds.values()))  # (runs, seeds)
    low, mean, high = values.min(1), values.mean(1), values.max(1)
    panel.errorbar(mean, list(bounds), xerr=(mean - low, high - mean), fmt="o", markersize=4, capsize=4)
    panel.axvline(mean[0], color="gray", linewidth=0.5)
    panel.invert_yaxis()
    panel.set(xlabel="nats per byte, five minutes of one core")
    save()


# --- data that repeats ---------------------------------------------------------------------------

LITTLE = 100_000  # bytes of text to train on
REPEATED = {"append": "--attention causal --epochs 60", "set": "--epochs 120"}
# Each at its best over these; the first is what the project has.
TUNED = [f"--weight_decay {decay} --dropout {rate}" for decay in (0.1, 1.0) for rate in (0.0, 0.2)]


def little_corpus():
    """The name of a corpus: the first bytes of tiny Shakespeare to train on, and its validation split."""
    name = f"shakespeare-{LITTLE}"
    if not (DATA / name / "meta.json").exists():
        splits, tokenizer = load_corpus("shakespeare")[:2], load_corpus("shakespeare")[2]
        texts = (tokenizer.decode(split[:n].tolist()) for split, n in zip(splits, (LITTLE, None)))
        write_corpus(name, zip(SPLITS, texts), tokenizer, "the first bytes of data/shakespeare")
    return name


def repeat(config, device):
    """The validation bound of set and likelihood of append against epochs over little text."""
    panel, save = plot(config.save)
    shape = f"--data {little_corpus()} --batch_size 32 --prompt_len 0 --evals 40 --device {device}"
    print("| run | best, nats per byte | at epoch | at the end |")
    curves = {kind: [] for kind in REPEATED}
    for kind, flags in REPEATED.items():
        for number, tuned in enumerate(TUNED):
            seen, nats = log_of(train(f"out-repeat/{kind}-{number}", shape, flags, tuned), batch_size=32)
            epochs, lowest = seen * 1e6 / LITTLE, nats.argmin()
            curves[kind].append((epochs, nats))
            row = f"{nats[lowest]:.3f} | {epochs[lowest]:.0f} | {nats[-1]:.3f}"
            print(f"| {kind}, `{tuned}` | {row} |", flush=True)
            colour, style = f"C{list(REPEATED).index(kind)}", ("-", "--", "-.", ":")[number]
            panel.plot(epochs, nats, color=colour, linestyle=style, linewidth=1, label=f"{kind}, {tuned}")
            panel.plot(epochs[lowest], nats[lowest], color=colour, marker="o", markersize=4)
    first, best = curves["append"][0][1].min(), min(nats.min() for _, nats in curves["append"])
    epochs, nats = min(curves["set"], key=lambda curve: curve[1].min())
    for name, mark in {"append untuned": first, "append at its best": best}.items():
        crossing = epochs[(nats < mark).argmax()] if (nats < mark).any() else None
        print(f"| set passes {name} | {mark:.3f} | {f'{crossing:.0f}' if crossing else 'never'} | |")
        panel.axhline(mark, color="gray", linewidth=0.5)
        if crossing:
            panel.axvline(crossing, color="gray", linestyle=":")
    panel.set(xscale="log", xlabel=f"epochs over {LITTLE:,} bytes", ylabel="validation, nats per byte")
    panel.set(ylim=(None, 3.5))
    panel.legend(fontsize="x-small")
    save()


# --- the README's changes ------------------------------------------------------------------------


def readme_changes():
    """The diffs that stand in README.md, as text."""
    return re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def apply(change, folder):
    """Make a diff's change to its file in folder, where what it replaces stands just once."""
    name, hunks = change.split("\n", 1)
    path = folder / name.split()[1]
    code = path.read_text(encoding="utf-8")
    for hunk in hunks.split("@@\n"):
        old, new = ("".join(line[1:] for line in hunk.splitlines(True) if line[0] != sign) for sign in "+-")
        assert code.count(old) == 1, f"{path.name} has this {code.count(old)} times:\n{old}"
        code = code.replace(old, new)
    path.write_text(code, encoding="utf-8")


def changes(config, device):
    """2,000 steps of tiny Shakespeare by the project as it is, and with each of the README's changes."""
    text = windows(load_corpus("shakespeare")[1], 256, 8192).flatten().tolist()

    def run(folder, command):
        arguments = [sys.executable, *command.split(), "--device", str(device)]
        printed = subprocess.run(arguments, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
        return f"| {folder.name} | `{command}` | {printed.stdout.splitlines()[-1]} |"

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(max(1, os.cpu_count() // 2)) as pool:
        plain = Path(folder, "as it is")
        shutil.copytree(ROOT, plain, ignore=shutil.ignore_patterns("out*", ".*", "*.pt"))
        (plain / "text.txt").write_bytes(bytes(text))
        changed = []
        for number, change in enumerate(readme_changes(), 1):
            changed.append(Path(shutil.copytree(plain, Path(folder, f"change {number}"))))
            apply(change, changed[-1])
        right, vowels, spread, near, levels = changed
        trained = plain, vowels, near, levels
        training = "train.py --data shakespeare --max_iters 2000 --evals 1 --widen 0"
        list(pool.map(run, trained, [training] * len(trained)))
        for project in right, spread:
            shutil.copytree(plain / "out", project / "out")
        lines = [(project, "train.py --eval_only --init_from out/ckpt.pt") for project in trained]
        left = "sample.py --score text.txt --order left --steps 256"
        lines += [(plain, left), (right, left)]
        for steps in 16, 64, 256:  # random's likelihood, as a bound
            bound = f"--eval_only --init_from out/ckpt.pt --eval_tokens 8192 --level grid:{steps}"
            lines += [(plain, f"train.py {bound}")]
            lines += [(spread, f"sample.py --score text.txt --order spread --steps {steps}")]
        for line in pool.map(run, *zip(*lines)):
            print(line, flush=True)


# --- what the shipped model writes ---------------------------------------------------------------

WORD = re.compile(r"[^\W\d_]+")
RUN = 30  # characters that count as copied if they stand in the training text one after the other


def copied(text, runs):
    """The share of a text's characters that are in one of runs, strings of RUN characters."""
    is_copied = np.zeros(len(text), dtype=bool)
    for i in range(len(text) - RUN + 1):
        is_copied[i : i + RUN] |= text[i : i + RUN] in runs
    return is_copied.mean()


def counts(config, device):
    """In what the shipped model writes, and in real text: the share of words that the training text has, and
    of characters that are copied from it. First and last words do not count: they may be cut.
    """
    model, tokenizer, _ = load_checkpoint(SHIPPED, device)
    train_split, val, _, _ = load_corpus("shakespeare")
    learned, T = tokenizer.decode(train_split.tolist()), model.config.context
    known, runs = set(WORD.findall(learned)), {learned[i : i + RUN] for i in range(len(learned) - RUN + 1)}
    print("| text | words that the training text has | characters copied |")
    ways = (T // 2, "random", 0.7), (T, "random", 0.5), (32, "random", 0.7), (T, "confidence", 0.9)
    for way in (None, *ways, (None, "threshold", 1.0)):
        name, tokens = "of the validation split", windows(val, T, T * config.texts)
        if way:
            steps, order, temperature = way
            name = f"`--order {order}{f' --steps {steps}' if steps else ''} --temperature {temperature}`"
            with autocast(device):
                tokens, _ = write(model, config.texts, T, steps, order, temperature=temperature)
        texts = [tokenizer.decode(row) for row in tokens.tolist()]
        words = [word in known for text in texts for word in WORD.findall(text)[1:-1]]
        shares = np.mean(words), np.mean([copied(text, runs) for text in texts])
        print(f"| {name} | {shares[0]:.1%} of {len(words):,} | {shares[1]:.1%} |", flush=True)


# --- masks and Gaussian noise --------------------------------------------------------------------

NOISES = {  # the flags of each, of train.py or of tests/gauss.py
    "masks": "",
    "Gaussian noise": "",
    "Gaussian noise, the right end first": "--rate slant:1",
    "append": "--attention causal",
}


def with_noise(name, flags, minutes):
    """The path of a model of NOISES, trained unless it is there."""
    out_dir = f"out-noise/{re.sub('[^a-z]+', '-', name.lower())}-{minutes:g}"
    flags += f" --max_minutes {minutes:g} --prompt_len 0 --evals 12 --eval_tokens 32768"
    return train(out_dir, flags, script=("tests/gauss.py", "train") if "Gaussian" in name else ("train.py",))


def gauss(config, device):
    """Of each noise, after the same minutes: the bound of the validation split, and the text that it writes,
    append in 256 passes, the others in 128. How likely that is another append says, of another seed; a text
    that repeats itself is likely, too, and so the entropy of byte pairs stands beside it.
    """
    from gauss import bound, load
    from gauss import denoise as move_and_round

    panel, save = plot(config.save)
    judge, _, _ = load_checkpoint(with_noise("judge", "--attention causal --seed 9", config.minutes), device)
    T, (_, val, tokenizer, _) = 256, load_corpus("python", 256)
    tokens, texts = windows(val, T, len(val)), windows(val, T, config.texts * T)
    print("| noise | steps | bound, nats per byte | its text, nats per byte | bits per pair of bytes |")
    with autocast(device):
        print(f"| text of the corpus | | | {nelbo(judge, texts):.3f} | {pair_entropy(texts):.2f} |")
    for name, flags in NOISES.items():
        path = with_noise(name, flags, config.minutes)
        curve = evaluations(path, "minutes", "val_nats_per_token")
        panel.plot(*curve, marker="o", markersize=4, label=name)
        with autocast(device):
            if "Gaussian" in name:
                model, _, checkpoint = load(path, device)
                slant = Rate.from_text(checkpoint["train"]["rate"]).value
                nats = bound(model, tokens, slant=slant)
                holes = torch.full((config.texts, T), tokenizer.mask_id)
                texts = move_and_round(model, holes, 128, slant)
            else:
                model, _, checkpoint = load_checkpoint(path, device)
                nats = nelbo(model, tokens)
                texts, _ = write(model, config.texts, T, *((T, "left") if name == "append" else (128,)))
            row = f"{nats:.3f} | {nelbo(judge, texts):.3f} | {pair_entropy(texts):.2f}"
        print(f"| {name} | {checkpoint['step']:,} | {row} |", flush=True)
        print(tokenizer.decode(texts[0].tolist()), flush=True)
    panel.set(xlabel="minutes of training", ylabel="validation bound, nats per byte")
    panel.legend()
    save()


def main():
    config = FiguresConfig(**parse(FiguresConfig, __doc__.splitlines()[0]))
    if config.processes > 1:
        torchrun = "-m torch.distributed.run --standalone --nproc_per_node".split()
        PYTHON.extend([*torchrun, str(config.processes)])
    config.save = config.save or ROOT / ".github" / f"{config.figure}.svg"
    globals()[config.figure](config, pick_device(config.device))


if __name__ == "__main__":
    command(main)
