"""Train a masked text diffusion model: corrupt text with holes, learn to fill them.

A text x0 of T tokens is corrupted at noise level t: each token becomes `<mask>` with probability t.
The model sees the corrupted canvas xt and predicts x0 at the holes. What tells the methods apart
has one place each: how t is drawn (`draw_levels`), how likely it masks each token (`mask_rates`), and
what a hole's loss counts (`hole_weights`). BERT is t = 0.15; text diffusion draws t from all of (0, 1].

    python train.py                                      # ten minutes on the Python library
    python train.py --data shakespeare --max_minutes 5
    python train.py --init_from resume                   # go on after Ctrl-C
    python train.py --eval_only --init_from out/ckpt.pt
"""

import math
import shutil
import sys
import textwrap
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tqdm import tqdm

from data.canvas import inert
from data.corpus import load_corpus
from data.files import Log, replacing
from data.flags import Mistake, command, ctrl_c, flag, parse
from data.prompt import make_canvases
from model import ModelConfig, Transformer, autocast, load_checkpoint, pick_device, save_checkpoint
from sample import denoise


@dataclass
class TrainConfig:
    # files
    data: str = flag("python", "corpus: a folder of data/")
    out_dir: str = flag("out", "where ckpt.pt (best), last.pt and log.csv go")
    init_from: str = flag("scratch", "scratch; resume, to go on from out_dir; or a checkpoint's path")
    eval_only: bool = flag(False, "print the NELBO of --init_from and stop")
    # noise and objective
    level: str = flag("bell:1.2", "how t is drawn: uniform, bell:S, grid:N, or a fixed number")
    one_level: bool = flag(False, "draw one t for the whole batch, not one a sequence")
    slant: float = flag(0.0, "mask the right end first by this much, to write from the left", least=0)
    spindle: float = flag(0.0, "mask informative tokens first by this much, to write them last", least=0)
    weight: Literal["elbo", "mean"] = flag("mean", "what a hole's loss counts: rate'/rate, or all the same")
    prompt_len: str = flag("0:16", "tokens at the start that stay: N, or a range M:N; 0 for --eval_only")
    # model
    n_layer: int = flag(4, "blocks", least=1)
    n_head: int = flag(2, "attention heads", least=1)
    n_embd: int = flag(192, "width", least=1)
    block_size: int = flag(256, "tokens in a training window", least=1)
    dropout: float = flag(0.0, "dropout probability", least=0, below=1)
    conv: int = flag(5, "neighbours that each block's convolution mixes; 0 for none", least=0)
    causal: bool = flag(False, "let a token see only those to its left")
    norm: Literal["pre", "post"] = flag("pre", "normalise before or after each layer")
    position: Literal["rope", "learned"] = flag("rope", "rotary or learned positions")
    # optimisation
    batch_size: int = flag(16, "windows per step", least=1)
    grad_accum: int = flag(1, "pieces that a batch is computed in, to save memory", least=1)
    optimizer: Literal["muon", "adamw"] = flag("muon", "muon: on the blocks' matrices, AdamW elsewhere")
    lr: float = flag(0.01, "highest learning rate", above=0)
    beta2: float = flag(0.95, "AdamW: decay of the squared gradients' mean", above=0, below=1)
    warmup: float = flag(0.03, "share of the run in which lr rises; then it falls to 0", least=0, below=1)
    weight_decay: float = flag(0.1, "decoupled weight decay, on matrices", least=0)
    grad_clip: float = flag(1.0, "largest gradient norm; 0 for no clipping", least=0)
    max_iters: int | None = flag(None, "steps to train for", least=1)
    epochs: float | None = flag(None, "times the training split's size to train for", above=0)
    max_minutes: float | None = flag(None, "minutes to train for (10, without another limit)", above=0)
    # what is shown
    evals: int = flag(8, "evaluations over the run, evenly spaced", least=1)
    eval_tokens: int | None = flag(None, "validation tokens scored (65536; --eval_only: all)", least=1)
    log_every: int = flag(10, "steps between rows of log.csv", least=1)
    # machine
    device: str = flag("auto", "auto (cuda, then mps, then cpu) or a device's name")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag("auto", "of the matrix products")
    compile: bool = flag(False, "torch.compile the model")
    seed: int = flag(0, "of weights, batches, levels and masks", least=0, most=2**32)


# The fields that shape the model; a model that is loaded has its own.
SHAPE = ("n_layer", "n_head", "n_embd", "conv", "causal", "norm", "position")


# --- noise ---------------------------------------------------------------------------------------


def draw_levels(level, B, generator):
    """Noise levels of a batch: t (B, 1) in (0, 1].

    Stratified: t_b = (u + b/B) mod 1 with one u for all, so that every batch covers all levels; the
    variance of the loss falls and its mean stays. `bell:S` sends these through a normal of scale S
    and a sigmoid (2605.13026): language is local, so the middle levels teach most. `grid:N` rounds
    them up to 1/N .. 1 (D3PM's N steps, 2107.03006). A number is itself, for every sequence.
    """
    u = 1 - (torch.rand(1, generator=generator) + torch.arange(B)[:, None] / B) % 1  # (B, 1) in (0, 1]
    kind, _, value = level.partition(":")
    if kind == "uniform":
        return u
    if kind == "bell":
        return torch.sigmoid(float(value) * torch.special.ndtri(u.clamp(max=1 - 1e-6)))
    if kind == "grid":
        return (u * int(value)).ceil() / int(value)
    return torch.full_like(u, float(kind))


def maskable(x0, prompt_len, special_ids):
    """Which tokens of x0 (B, T) may become holes, bool: not the first prompt_len, (B, 1) or a number,
    and none that is not text, such as RoBERTa's `<s>`.
    """
    text = torch.isin(x0, torch.tensor(special_ids, dtype=x0.dtype), invert=True)
    return text & (torch.arange(x0.shape[1]) >= prompt_len)


def mask_rates(t, T, slant=0.0, spindle=0.0, information=0.0):
    """Masking probability of each token at noise level t (B, 1): (B, T), from 0 at t = 0 to 1 at t = 1.

    slant w: the right end goes first, and so is written last (the idea of AR-Diffusion, 2305.09515,
    in mask form). spindle: tokens of much information, (B, T), go first (DiffusionBERT, 2211.15029).
    """
    position = torch.linspace(0, 1, T)  # (T,)
    rate = t * (1 + slant) - slant * (1 - position)
    return (rate + spindle * torch.sin(torch.pi * t) * information).clamp(0, 1)  # (B, T)


def relative_information(x0, token_nats):
    """How much more than the mean of its sequence each token of x0 (B, T) says, (B, T): 1 - mean / own,
    from token_nats (V,), minus the log of each token's share of the training split (2211.15029).
    """
    nats = token_nats[x0]
    return 1 - nats.mean(1, keepdim=True) / nats


def draw_holes(rates, text, generator):
    """Which tokens are masked, (B, T) bool: those of text (B, T), by their rates, (B, T) or (B, 1)."""
    return text & (torch.rand(text.shape, generator=generator) < rates)


def hole_weights(weight, rates, slant, n_holes, n_text):
    """What each hole counts in the loss, (B, T); the loss is the sum over all holes.

    `mean`: an average over the holes of the batch. `elbo`: rate'(t)/rate(t), which is 1/t without a
    slant, over the number of tokens that could be holes; the expectation of this loss is the bound in
    nats per token (2502.09992, eq. 3) for uniform levels, and D3PM's N-step bound for grid:N. A token whose
    rate has reached 1 before t has is a hole for good, and counts no more.
    """
    if weight == "mean":
        return torch.full_like(rates, 1 / max(1, n_holes))
    slope = (1 + slant) * (rates < 1) if slant else 1.0
    return slope / (rates.clamp(min=1e-12) * max(1, n_text))


class CrossEntropy(torch.autograd.Function):
    """F.cross_entropy of logits (N, V) and target (N,), in nats, (N,), without a float32 copy of the logits.

    The gradient takes the logits' place in memory, a few rows at a time: at RoBERTa's vocabulary
    they are by far the largest tensor of a training step.
    """

    @staticmethod
    def rows(logits):
        return max(1, 2 ** (20 if logits.device.type == "cpu" else 26) // logits.shape[1])

    @staticmethod
    def forward(ctx, logits, target):
        parts = logits.split(CrossEntropy.rows(logits))
        log_z = torch.cat([part.to(torch.float32).logsumexp(-1) for part in parts])  # (N,)
        ctx.save_for_backward(logits, target, log_z)
        return log_z - logits.gather(1, target[:, None]).squeeze(1)

    @staticmethod
    def backward(ctx, gradient):
        logits, target, log_z = ctx.saved_tensors
        logits, rows = logits.detach(), CrossEntropy.rows(logits)
        for part, y, z, g in zip(*(tensor.split(rows) for tensor in (logits, target, log_z, gradient))):
            p = (part.to(torch.float32) - z[:, None]).exp()
            p[torch.arange(len(p), device=p.device), y] -= 1
            part.copy_(p * g[:, None])
        return logits, None


def hole_nats(model, x0, xt, holes):
    """Cross-entropy of x0 at each hole given the canvas xt, in nats, (N,)."""
    return CrossEntropy.apply(model(xt, where=holes), x0[holes])


# --- likelihood ----------------------------------------------------------------------------------


# Levels of the bound are stratified over this many sequences at a time: enough to take most of the
# variance out, and few enough for many groups, whose draws then show what variance is left.
STRATA = 16


def masked_first(text, t, slant, generator):
    """Holes (B, T), and what each counts, (B, T), in the bound in nats per sequence.

    Of a sequence's M tokens of text (B, T) the first k = ceil(tM) to be masked are holes, t (B, 1).
    They share the weight M, each by its chance to be the one masked last of them: all alike without
    a slant (2502.09992, eq. 6), else as rate'/rate has it at that level. The mean is that of
    rate'/rate over levels and holes, but there is no 1/t that blows up.
    """
    M = text.sum(1, keepdim=True)  # (B, 1)
    early = slant * (1 - torch.linspace(0, 1, text.shape[1]))
    masked_at = (torch.rand(text.shape, generator=generator) + early) / (1 + slant)  # each token's level
    place = masked_at.masked_fill(~text, torch.inf).argsort(1).argsort(1)  # (B, T), 0 is masked first
    holes = place < (t * M).ceil()
    last = masked_at.masked_fill(~holes, 0).amax(1, keepdim=True)  # (B, 1)
    rates = mask_rates(last, text.shape[1], slant)
    # A rate that is 1 before that level does not rise there; the last itself is not lost to rounding.
    chance = holes * ((rates < 1) | (masked_at == last)) / rates.clamp(min=1e-12)
    return holes, M * chance / chance.sum(1, keepdim=True).clamp(min=1e-12)


@torch.no_grad()
def sequence_bounds(
    model, tokens, prompt_len=0, draws=1, batch_size=64, seed=0, level="uniform", slant=0.0, strata=STRATA
):
    """Unbiased estimates of the NELBO of each of tokens (N, T) int64, (draws, N) nats, and how many of its
    tokens are text behind the prompt, (N,).

    The bound is E_t [ sum over holes of rate'(t)/rate(t) * -log p(x_i | xt) ], t uniform in (0, 1]
    (2406.07524); for level grid:N D3PM's, t one of 1/N .. 1. The same seed gives the same numbers. The
    draws are independent of each other; strata=1 makes the levels so, too, to compare.
    """
    if level != "uniform" and (slant or not level.startswith("grid:")):
        raise ValueError(f"level {level}, slant {slant}: the bound is uniform's, slanted or not, or grid:N's")
    generator = torch.Generator().manual_seed(seed)
    device, N = next(model.parameters()).device, len(tokens)
    all_text = maskable(tokens, prompt_len, model.config.special_ids)  # (N, T)
    sizes = [len(part) for part in tokens.split(strata)] * draws
    # Shuffled, because neighbours in a text are alike: they should not have neighbouring levels.
    levels = [draw_levels(level, n, generator)[torch.randperm(n, generator=generator)] for n in sizes]
    t = torch.cat(levels)  # (draws * N, 1)
    was_training = model.training
    model.eval()
    nats = []
    for rows in torch.arange(draws * N).split(batch_size):
        x0, text = tokens[rows % N], all_text[rows % N]  # (B, T)
        if level == "uniform":
            holes, weights = masked_first(text, t[rows], slant, generator)
        else:
            holes = draw_holes(t[rows], text, generator)
            weights = holes / t[rows]
        x0, holes, weights = x0.to(device), holes.to(device), weights.to(device)
        xt = x0.masked_fill(holes, model.config.mask_id)
        losses = torch.zeros_like(weights).masked_scatter(holes, hole_nats(model, x0, xt, holes))
        nats.append((weights * losses).sum(1).cpu())
    model.train(was_training)
    return torch.cat(nats).double().view(draws, N), all_text.sum(1)


def nelbo(model, tokens, **flags):
    """Negative evidence lower bound of tokens (N, T) int64, in nats per token; flags as sequence_bounds has.

    For uniform levels it is also the mean negative log-likelihood over all orders of generation
    (2406.03736); a slant makes those from the left likelier.
    """
    return mean_nats(*sequence_bounds(model, tokens, **flags))


def mean_nats(nats, n_text):
    """The NELBO of all sequences together from sequence_bounds, in nats per token."""
    return (nats.mean(0).sum() / n_text.sum()).item()


def standard_error(nats, n_text):
    """Of mean_nats, over seeds and for this text, in nats per token: from how far two draws or more of each
    group of sequences are apart. It says nothing of other texts.
    """
    sums = torch.stack([group.sum(1) for group in nats.split(STRATA, dim=1)])  # (groups, draws)
    return (sums.var(1).sum() / len(nats)).sqrt().item() / n_text.sum().item()


def windows(split, T, n_tokens):
    """About n_tokens of a split, as windows of T tokens spaced evenly and not overlapping: (N, T) int64."""
    count = max(1, min(n_tokens, len(split)) // T)
    starts = np.linspace(0, len(split) - T, count).astype(np.int64)
    return torch.from_numpy(split[starts[:, None] + np.arange(T)].astype(np.int64))


# --- the run -------------------------------------------------------------------------------------


def parse_prompt_len(text):
    """`16` or `0:64` as (low, high), both included."""
    low, _, high = text.partition(":")
    if not (low.isdecimal() and (high or low).isdecimal() and int(low) <= int(high or low)):
        raise Mistake(f"--prompt_len {text}: a number of tokens such as 16, or a range such as 0:64")
    return int(low), int(high or low)


def check(config):
    """Raise Mistake for flags that cannot work together, before anything is written."""
    kind, _, value = config.level.partition(":")
    try:
        known = {
            "uniform": lambda: config.level == "uniform",
            "bell": lambda: 0 < float(value) < math.inf,
            "grid": lambda: 1 <= int(value) <= 2**20,
        }.get(kind, lambda: 0 < float(config.level) <= 1)()
    except ValueError:
        known = False
    if not known:
        raise Mistake(f"--level {config.level}: uniform, bell:S, grid:N or a number in (0, 1]; S > 0, N >= 1")
    if config.eval_only and config.init_from == "scratch":
        raise Mistake("--eval_only: needs --init_from resume or a checkpoint's path")
    bound = config.eval_only or config.weight == "elbo"
    if config.spindle and bound:
        raise Mistake(
            f"--spindle {config.spindle}: there is no bound, because the rate depends on the token itself; "
            "it goes with --weight mean, and not with --eval_only"
        )
    if config.slant and config.spindle:
        raise Mistake(f"--slant {config.slant}: it does not go with --spindle")
    if config.slant and kind == "grid" and bound:
        raise Mistake(f"--slant {config.slant}: it has a bound with --level uniform, not with {config.level}")
    if bound and kind not in ("uniform", "grid"):
        # A fixed level gives no bound; under a bell 1/t over its density has infinite variance.
        reason = "--eval_only prints" if config.eval_only else "it goes with --weight mean; elbo is"
        raise Mistake(f"--level {config.level}: {reason} the bound, which needs uniform or grid:N")
    if config.eval_only and not config.prompt_len.isdecimal():
        raise Mistake(f"--prompt_len {config.prompt_len}: --eval_only needs one number")
    if config.batch_size % config.grad_accum:
        raise Mistake(f"--grad_accum {config.grad_accum}: must divide --batch_size {config.batch_size}")
    if config.init_from == "scratch" and config.n_embd % (2 * config.n_head):
        raise Mistake(f"--n_embd {config.n_embd}: must be a multiple of twice --n_head {config.n_head}")
    if parse_prompt_len(config.prompt_len)[1] >= config.block_size:
        raise Mistake(f"--prompt_len {config.prompt_len}: must be below --block_size {config.block_size}")


def make_optimizers(model, config):
    """Muon (2502.16982) on the blocks' matrices and AdamW on the rest, or AdamW on all.

    Muon's update is scaled to the size of AdamW's, so one learning rate serves both.
    """
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2 and config.optimizer == "muon"]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    decay = {"weight_decay": config.weight_decay}
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], **decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=True)]
    if matrices:
        optimizers += [torch.optim.Muon(matrices, lr=config.lr, **decay, adjust_lr_fn="match_rms_adamw")]
    return optimizers


def token_information(split, vocab_size):
    """Minus the log of each token's share of a split, in nats, (V,); one more of each, so that none is 0."""
    parts = np.array_split(split, len(split) // 2**24 + 1)
    counts = torch.from_numpy(sum(np.bincount(part, minlength=vocab_size) for part in parts) + 1.0)
    return -(counts / counts.sum()).log().float()


def draw_batch(split, config, generator, special_ids=(), token_nats=None):
    """A corrupted batch: x0 (B, T) int64, holes (B, T) bool and what each hole counts (B, T)."""
    B, T = config.batch_size, config.block_size
    starts = torch.randint(len(split) - T + 1, (B, 1), generator=generator)
    x0 = torch.from_numpy(split[starts.numpy() + np.arange(T)].astype(np.int64))
    t = draw_levels(config.level, 1 if config.one_level else B, generator).expand(B, 1)
    low, high = parse_prompt_len(config.prompt_len)
    prompt_len = torch.randint(low, high + 1, (B, 1), generator=generator)
    text = maskable(x0, prompt_len, special_ids)
    information = relative_information(x0, token_nats) if config.spindle else 0.0
    rates = mask_rates(t, T, config.slant, config.spindle, information)
    holes = draw_holes(rates, text, generator)
    n_holes, n_text = holes.sum().item(), text.sum().item()
    return x0, holes, hole_weights(config.weight, rates, config.slant, n_holes, n_text)


class Run:
    """A training run at one step: all that `--init_from resume` needs to go on as if never stopped."""

    def __init__(self, config, model, device, train_tokens=0, token_nats=None):
        self.config, self.model, self.device, self.token_nats = config, model, device, token_nats
        self.max_iters = config.max_iters or math.inf
        if config.epochs:
            steps = config.epochs * train_tokens / (config.batch_size * config.block_size)
            self.max_iters = min(self.max_iters, math.ceil(steps))
        self.precision = autocast(device, config.dtype)
        self.optimizers = make_optimizers(model, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision.fast_dtype == torch.float16)
        self.generator = torch.Generator().manual_seed(config.seed)  # of batches, levels and holes
        self.step, self.minutes, self.best = 0, 0.0, math.inf

    def state(self):
        random = {"batches": self.generator.get_state(), "cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            random["cuda"] = torch.cuda.get_rng_state(self.device)
        return {
            "train": asdict(self.config),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "random": random,
            **{name: getattr(self, name) for name in ("step", "minutes", "best", "token_nats")},
        }

    def restore(self, state):
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            for group, ours in zip(saved["param_groups"], optimizer.param_groups):
                group["weight_decay"] = ours["weight_decay"]  # a flag may have changed it
            optimizer.load_state_dict(saved)
        self.scaler.load_state_dict(state["scaler"])
        self.generator.set_state(state["random"]["batches"])
        torch.set_rng_state(state["random"]["cpu"])
        if self.device.type == "cuda" and "cuda" in state["random"]:
            torch.cuda.set_rng_state(state["random"]["cuda"], self.device)
        self.step, self.minutes, self.best = state["step"], state["minutes"], state["best"]

    def progress(self):
        """How far the run is, in [0, 1], by the limit that will end it: steps or minutes."""
        by_steps = self.step / self.max_iters
        default = 10 if self.max_iters == math.inf else math.inf
        by_minutes = self.minutes / (self.config.max_minutes or default)
        return min(1.0, max(by_steps, by_minutes))

    def evals_due(self):
        """How many of the run's evaluations should have been made by now."""
        return int(self.progress() * self.config.evals)

    def learning_rate(self):
        """Rises over the first `warmup` of the run, then falls to 0 at its end, both linearly."""
        warmup, progress = self.config.warmup, self.progress()
        rise = progress / warmup if progress < warmup else 1.0
        return self.config.lr * min(rise, (1 - progress) / (1 - warmup))

    def update(self, batch):
        """One optimizer step on a batch, in grad_accum pieces. Returns its loss, in nats per hole
        or per token as --weight says, and its gradient's norm; if that is not finite, the
        weights stay as they were.
        """
        loss = 0.0
        for x0, holes, weights in zip(*(tensor.chunk(self.config.grad_accum) for tensor in batch)):
            weights = weights[holes].to(self.device)  # (N,)
            x0, holes = x0.to(self.device), holes.to(self.device)
            with self.precision:
                xt = x0.masked_fill(holes, self.model.config.mask_id)
                piece = (weights * hole_nats(self.model, x0, xt, holes)).sum()
            self.scaler.scale(piece).backward()
            loss += piece.item()
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate()
        limit = self.config.grad_clip or math.inf
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), limit).item()
        if math.isfinite(norm):
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)
        self.scaler.update()  # in float16 gradients overflow now and then: it lowers their scale
        self.model.zero_grad(set_to_none=True)
        self.step += 1
        return loss, norm

    def evaluate(self, val_tokens, val_counts, **flags):
        """NELBO of val_tokens (N, T): its estimates, nats per token and bits per byte."""
        with self.precision:
            estimates = sequence_bounds(self.model, val_tokens, seed=self.config.seed, **flags)
        nats = mean_nats(*estimates)
        text = maskable(val_tokens, 0, self.model.config.special_ids).float().mean().item()
        return estimates, nats, nats * text * val_counts["tokens"] / val_counts["bytes"] / math.log(2)

    def sample(self, tokenizer):
        """A short text written from an empty canvas."""
        canvases = make_canvases("", "", self.config.block_size, tokenizer, self.config.block_size)
        canvas = torch.tensor(canvases, device=self.device)  # (1, T)
        self.model.eval()
        with self.precision:
            *_, canvas = denoise(self.model, canvas, steps=64, temperature=0.7)
        self.model.train()
        return tokenizer.decode(canvas[0].tolist())


def save(run, tokenizer, nats=math.inf):
    """Write last.pt, and ckpt.pt as well if its NELBO, in nats per token, is the best so far."""
    best, run.best = nats < run.best, min(nats, run.best)
    last = Path(run.config.out_dir) / "last.pt"
    save_checkpoint(last, run.model, tokenizer, **run.state())
    if best:
        with open(last, "rb") as source, replacing(last.with_name("ckpt.pt")) as file:
            shutil.copyfileobj(source, file)


def train(run, tokenizer, corpus):
    """Train until the run is complete or Ctrl-C; writes log.csv, last.pt, and ckpt.pt at the best NELBO."""
    config, out_dir = run.config, Path(run.config.out_dir)
    train_split, val_split, meta = corpus
    val_tokens = windows(val_split, config.block_size, config.eval_tokens or 2**16)
    out_dir.mkdir(parents=True, exist_ok=True)
    log = Log(out_dir / "log.csv", run.step)
    parameters = sum(p.numel() for p in run.model.parameters())
    print(f"{parameters:,} parameters on {run.device} in {run.precision.fast_dtype}")

    run.model.train()
    start = time.perf_counter() - 60 * run.minutes
    layout = "{percentage:3.0f}%|{bar:20}| {desc}"
    pace = 0.5 if sys.stderr.isatty() else 10  # seconds between drawings
    bar = tqdm(total=1, initial=run.progress(), bar_format=layout, mininterval=pace)
    with ctrl_c() as stopped, bar:
        while run.progress() < 1 and not stopped:
            before, lr, evals_done = time.perf_counter(), run.learning_rate(), run.evals_due()
            batch = draw_batch(
                train_split, config, run.generator, run.model.config.special_ids, run.token_nats
            )
            loss, norm = run.update(batch)
            now = time.perf_counter()
            run.minutes = (now - start) / 60
            speed = batch[0].numel() / (now - before)
            nats = bits = None
            if run.evals_due() > evals_done:
                _, nats, bits = run.evaluate(val_tokens, meta["val"])
            finite = math.isfinite(loss) and (math.isfinite(norm) or run.scaler.is_enabled())
            if not finite or not math.isfinite(nats or 0):
                kept = f"{out_dir / 'last.pt'} is from before" if run.best < math.inf else "nothing was saved"
                raise Mistake(
                    f"step {run.step}: loss {loss:.3g}, gradient norm {norm:.3g}, validation NELBO {nats}; "
                    f"a smaller --lr may help ({kept})"
                )
            if nats or run.step % config.log_every == 0:
                log.write(run.step, run.minutes, loss, lr, norm, speed, nats, bits)
            if nats:
                save(run, tokenizer, nats)
                bar.write(
                    f"step {run.step:,} at {run.minutes:.1f} min: loss {loss:.3f}, validation NELBO "
                    f"{nats:.3f} nats per token = {bits:.3f} bits per byte. A sample:\n"
                    + textwrap.indent(inert(run.sample(tokenizer)), "  | ", lambda line: True)
                )
            left = run.minutes / run.progress() * (1 - run.progress())
            text = f"step {run.step:,}, loss {loss:.3f}, {speed:,.0f} tokens/s, {left:.1f} min left"
            bar.set_description_str(text, refresh=False)
            bar.update(run.progress() - bar.n)
    if run.progress() < 1:
        save(run, tokenizer)
        print(f"stopped at step {run.step}; --init_from resume goes on from there", file=sys.stderr)
        sys.exit(130)


def load_model(config, given):
    """The model of --init_from, its tokenizer and the checkpoint, with config brought in line with it."""
    resume = config.init_from == "resume"
    path = Path(config.out_dir) / "last.pt" if resume else Path(config.init_from)
    if not (resume or config.eval_only) and path.resolve().parent == Path(config.out_dir).resolve():
        raise Mistake(f"--init_from {path}: --out_dir {config.out_dir} would overwrite it; name another")
    dropout = {"dropout": given["dropout"]} if "dropout" in given else {}
    model, tokenizer, checkpoint = load_checkpoint(path, **dropout)
    saved = checkpoint.get("train", {})
    if resume and not config.eval_only:
        try:
            config = TrainConfig(**{**saved, **given, "out_dir": config.out_dir})
        except TypeError as error:
            raise Mistake(f"{path}: cannot be resumed ({error})") from None
    elif config.eval_only:  # what it was trained on, unless --data names another
        config.data = given.get("data", saved.get("data", config.data))
        config.prompt_len, config.level = given.get("prompt_len", "0"), given.get("level", "uniform")
    longest = model.config.block_size
    config.block_size = given.get("block_size", saved.get("block_size", longest))
    if config.block_size > longest:
        raise Mistake(f"--block_size {config.block_size}: the model in {path} sees at most {longest} tokens")
    for name in SHAPE:
        value = getattr(model.config, name)
        if given.get(name, value) != value:
            raise Mistake(f"--{name} {given[name]}: the model in {path} has {value}")
        setattr(config, name, value)
    return model, tokenizer, checkpoint, config


def main():
    given = parse(TrainConfig, __doc__.splitlines()[0])
    config = TrainConfig(**given)
    checkpoint = None
    if config.init_from != "scratch":
        model, tokenizer, checkpoint, config = load_model(config, given)
    check(config)
    device = pick_device(config.device)
    train_split, val_split, corpus_tokenizer, meta = load_corpus(config.data, config.block_size)
    if checkpoint is None:
        torch.manual_seed(config.seed)
        tokenizer = corpus_tokenizer
        shape = {name: getattr(config, name) for name in (*SHAPE, "block_size", "dropout")}
        shape["special_ids"] = tokenizer.special_ids
        model = Transformer(ModelConfig(tokenizer.vocab_size, tokenizer.mask_id, **shape))
    elif tokenizer.state != corpus_tokenizer.state:
        raise Mistake(f"--data {config.data}: its tokenizer is not the one that the model was trained with")
    model.to(device)
    if config.compile:
        model.compile()
    token_nats = None if config.eval_only else token_information(train_split, tokenizer.vocab_size)
    run = Run(config, model, device, len(train_split), token_nats)
    if config.eval_only:
        tokens = windows(val_split, config.block_size, config.eval_tokens or len(val_split))
        draws = 1 + math.ceil(16 * STRATA / len(tokens))  # two for 256 windows and more, to show the error
        flags = {"level": config.level, "slant": config.slant, "prompt_len": int(config.prompt_len)}
        estimates, nats, bits = run.evaluate(tokens, meta["val"], draws=draws, **flags)
        error = standard_error(*estimates)
        print(
            f"{config.data}: NELBO {nats:.4f} nats per token (standard error {error:.4f}), {bits:.4f} bits "
            f"per byte, perplexity {math.exp(nats):.3f}; {tokens.numel():,} validation tokens, {draws} draws"
        )
        return
    if config.init_from == "resume":
        try:
            run.restore(checkpoint)
        except (KeyError, ValueError, RuntimeError) as error:
            raise Mistake(
                f"--init_from resume: not with these flags ({str(error).splitlines()[0]})"
            ) from None
        if run.progress() >= 1:
            raise Mistake(
                "--init_from resume: that run is complete; more --max_iters, --epochs or --max_minutes go on"
            )
    train(run, tokenizer, (train_split, val_split, meta))


if __name__ == "__main__":
    command(main)
