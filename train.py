"""Train a masked text diffusion model: corrupt text with holes, learn to fill them.

A text x0 of T tokens is corrupted at noise level t: each token becomes `<mask>`, a hole, with a
probability that rises with t, its rate. The model sees the corrupted canvas xt and predicts x0 there:

    xt, holes, weights = corrupt(x0, maskable, t, u, ...)      # a hole is where u, uniform, is below rate(t)
    loss = (weights[holes] * cross_entropy(model(xt, where=holes, clean=x0), x0[holes])).sum()

Four choices tell the methods apart, and each has one place: how t is drawn (`draw_levels`), the rate of
each token (`mask_rates`), what a hole's loss counts (`hole_weights`), and who sees whom (model.py). BERT is
t = 0.15; text diffusion draws t from all of (0, 1]. A model that writes in blocks sees the clean text x0
before each, and so a block is a sequence of its own; GPT is blocks of one token, all of them holes.

    python train.py                                      # ten minutes on the Python library
    python train.py --data shakespeare --max_minutes 5 --out_dir out-shakespeare
    python train.py --init_from resume                   # go on after Ctrl-C
    python train.py --eval_only --init_from out/ckpt.pt
"""

import functools
import itertools
import math
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from data.lib.chat import Chat
from data.lib.corpus import load_corpus, n_windows, unigram_nats, windows_at
from data.lib.errors import Mistake, command, signals
from data.lib.fast import cross_entropy, rows_at_once
from data.lib.files import alone_in
from data.lib.flags import Attention, Level, Span, flag, parse
from data.lib.history import inert
from data.lib.machine import device_of, pick_device, send
from data.lib.pixels import as_shown
from data.lib.processes import rank, size, together, total, whole
from data.lib.prompt import make_canvases, shown_of
from data.lib.report import Report
from data.lib.settings import SHAPE, attention_fields, check_training, check_unused, settle, with_examples
from data.lib.training import Run
from model import ModelConfig, Transformer
from sample import denoise

UNIFORM = Level("uniform")


@dataclass
class TrainConfig:
    # files
    data: str = flag("python", "corpus: a folder of data/")
    out_dir: str = flag("out", "where ckpt.pt (best), last.pt and log.csv go; a run each")
    init_from: str = flag("scratch", "scratch; resume, to go on from out_dir; or a checkpoint's path")
    eval_only: bool = flag(False, "print the NELBO of --init_from and stop")
    # noise and objective
    level: Level = flag(Level("bell", 1.2), "how t is drawn: uniform, bell:S, grid:N, or a fixed number")
    one_level: bool = flag(False, "draw one t for the whole batch, not one a sequence")
    widen: float = flag(1.0, "share of the run over which a bell widens to S; 0: at once", least=0, most=1)
    slant: float = flag(0.0, "mask the right end first by this much, to write from the left", least=0)
    spindle: float = flag(0.0, "mask informative tokens first by this much, to write them last", least=0)
    visible: float = flag(0.0, "share of the tokens seen that have a loss, half replaced", least=0, below=1)
    weight: Literal["elbo", "mean"] = flag("mean", "what a hole's loss counts: rate'/rate, or all the same")
    prompt_len: Span = flag(Span(0, 16), "first tokens, which stay, N or M:N; 0 for --eval_only, examples")
    # model
    n_layer: int = flag(4, "layers", least=1)
    n_head: int = flag(2, "attention heads", least=1)
    n_embd: int = flag(160, "width", least=1)
    block_size: int = flag(256, "tokens in a training window; a picture is one", least=1)
    dropout: float = flag(0.0, "dropout probability", least=0, below=1)
    conv: int = flag(5, "neighbours that each layer's convolution mixes; 0 for none", least=0)
    attention: Attention = flag(Attention("canvas"), "who sees whom: canvas, block:K, or causal: a GPT")
    open_steps: int = flag(0, "steps over which --attention canvas opens a causal model", least=0)
    norm: Literal["pre", "post"] = flag("pre", "normalise before or after each layer")
    position: Literal["rope", "learned"] = flag("rope", "rotary or learned positions")
    # optimisation
    batch_size: int = flag(8, "windows per step", least=1)
    grad_checkpoint: bool = flag(False, "compute layers twice instead of keeping them, to save memory")
    grad_accum: int = flag(1, "pieces that a batch is computed in, to save memory", least=1)
    optimizer: Literal["muon", "adamw"] = flag("muon", "muon: on the layers' matrices, AdamW elsewhere")
    lr: float = flag(0.01, "highest learning rate", above=0)
    beta2: float = flag(0.95, "AdamW: decay of the squared gradients' mean", above=0, below=1)
    warmup: float = flag(0.03, "share of the run in which lr rises; then it falls to 0", least=0, below=1)
    weight_decay: float = flag(0.1, "decoupled weight decay, on matrices", least=0)
    grad_clip: float = flag(1.0, "largest gradient norm; 0 for no clipping", least=0)
    max_iters: int | None = flag(None, "steps to train for", least=1)
    epochs: float | None = flag(None, "times the training split's size to train for", above=0)
    max_minutes: float | None = flag(None, "minutes to train for (10, without another limit)", above=0)
    # what is shown
    evals: int = flag(8, "evaluations over the run, evenly spaced, a checkpoint after each", least=1)
    keep: int = flag(0, "of these checkpoints the last so many stay, as step-NUMBER.pt", least=0)
    eval_tokens: int | None = flag(None, "validation tokens scored (65536; --eval_only: all)", least=1)
    log_every: int = flag(10, "steps between rows of log.csv", least=1)
    # machine
    device: str = flag("auto", "auto (cuda, then mps, then cpu) or a device's name")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto", "of the matrix products; with --eval_only of weights that the file has in it, too"
    )
    compile: bool = flag(False, "torch.compile the model")
    shard: bool = flag(False, "under torchrun: a piece of each tensor in each process")
    seed: int = flag(0, "of weights, batches, levels and masks", least=0, most=2**32)


# --- the objective -------------------------------------------------------------------------------


def draw_levels(level, B, generator):
    """Noise levels of a batch: t (B, 1) in (0, 1].

    Stratified: t_b = 1 - (v + b/B) mod 1 with one v for all, so that every batch covers all levels; the
    variance of the loss falls and its mean stays. `bell:S` makes them logit-normal, sigmoid(S Phi^-1(t)),
    since language is local, and the middle levels teach most (the idea of 2605.13026). `grid:N` rounds
    them up to 1/N .. 1 (D3PM's N steps, 2107.03006). A number is itself, for every sequence.
    """
    t = 1 - (torch.rand(1, generator=generator) + torch.arange(B)[:, None] / B) % 1  # (B, 1) in (0, 1]
    if level.kind == "bell":
        return torch.sigmoid(level.value * torch.special.ndtri(t.clamp(max=1 - 1e-6)))
    if level.kind == "grid":
        return (t * level.value).ceil() / level.value
    return {"uniform": t, "fixed": torch.full_like(t, level.value)}[level.kind]


def block_levels(level, B, n, generator):
    """Noise levels of the n blocks of each of B texts: t (B * n, 1), a text's blocks one after the other.

    Stratified over the batch, and over each text as well; a text's own are shuffled, so that no level belongs
    to a place.
    """
    t = draw_levels(level, B * n, generator).view(n, B).T  # (B, n)
    return t.gather(1, torch.rand(B, n, generator=generator).argsort(1)).reshape(-1, 1)


def kind_levels(level, B, kinds, generator):
    """Noise levels of the tokens of B canvases: t (B, T), one for each kind of token, independent of the
    others' (2303.06555). So to name a picture is learned as often as to draw it.
    """
    of_each = [draw_levels(level, B, generator)[torch.randperm(B, generator=generator)] for _ in kinds]
    return torch.cat([t.expand(B, n) for t, (n, _, _) in zip(of_each, kinds)], 1)


def mask_rates(t, T, slant=0.0, spindle=0.0, information=0.0):
    """Masking probability of each token at noise levels t, (B, 1) or (B, T): (B, T), from 0 at t = 0 to
    1 at t = 1.

    With neither of these the rate is t, for all. slant w: the right end goes first, and so is written last
    (the idea of AR-Diffusion, 2305.09515, in mask form). spindle: tokens of much information, (B, T), go
    first (DiffusionBERT, 2211.15029).
    """
    position = torch.linspace(0, 1, T)  # (T,)
    rate = t * (1 + slant) - slant * (1 - position)
    return (rate + spindle * torch.sin(torch.pi * t) * information).clamp(0, 1)  # (B, T)


def hole_weights(weight, rates, slant, n_holes, n_maskable):
    """What a hole counts in the loss, (B, T).

    `elbo`: rate'(t)/rate(t), which is 1/t without a slant, over the number of maskable tokens; the
    expectation of this loss is the bound in nats per token (2502.09992, eq. 3) for uniform levels, and
    D3PM's N-step bound for grid:N. Under a slant rate' is 0 where the rate is clipped at 1.
    `mean`: 1 over the number of holes in the batch. With a level for each sequence all levels' holes
    count alike. With one level for the whole batch (RoBERTa diffusion) a batch of few holes counts as
    much as one of many, so that a hole counts about 1/t: for levels of a grid nearly the elbo.
    """
    if weight == "mean":
        return torch.full_like(rates, 1 / max(1, n_holes))
    slope = (1 + slant) * (rates < 1) if slant else 1.0  # grid:N draws t = 1, where a rate of 1 counts
    return slope / (rates.clamp(min=1e-12) * max(1, n_maskable))


def corrupt(x0, maskable, t, u, mask_id, weight="elbo", slant=0.0, spindle=0.0, information=0.0):
    """xt, which is x0 (B, T) with holes; the holes, bool; and what each counts in the loss: (B, T) each.

    maskable (B, T) bool: which tokens may become holes. t (B, 1) or (B, T): noise levels. u (B, T): uniform
    numbers in [0, 1); a token is a hole when its rate at t has risen above its u.
    """
    rates = mask_rates(t, x0.shape[1], slant, spindle, information)  # (B, T)
    holes = maskable & (u < rates)  # (B, T)
    weights = hole_weights(weight, rates, slant, holes.sum().item(), maskable.sum().item())  # (B, T)
    return x0.masked_fill(holes, mask_id), holes, weights


def loss_of(model, x0, xt, holes, weights):
    """The loss of each sequence, (B,): the sum over its holes of weight times cross-entropy, in nats."""
    # clean: of this a model of blocks sees those before a hole's own. On a canvas xt is all that is seen.
    logits = model(xt, where=holes, clean=x0)  # (N, V) at the N holes
    loss = torch.zeros_like(weights)  # (B, T)
    loss[holes] = weights[holes] * cross_entropy(logits, x0[holes])
    return loss.sum(1)


def which_maskable(x0, prompt_len, special_ids):
    """Which tokens of x0 (B, T) may become holes, bool: those after the first prompt_len, a number or (B, 1),
    but no special token, such as RoBERTa's `<s>`.
    """
    special = torch.isin(x0, torch.tensor(special_ids, dtype=x0.dtype))
    return ~special & (torch.arange(x0.shape[1]) >= prompt_len)


def relative_information(x0, token_nats):
    """1 - mean_j(I_j) / I_i of each token i of x0 (B, T): (B, T). I = token_nats (V,), minus the log of a
    token's share of the training split (2211.15029).
    """
    nats = token_nats[x0]
    return 1 - nats.mean(1, keepdim=True) / nats


def with_visible(x0, xt, holes, maskable, share, model_config, generator):
    """xt, and which positions have a loss: the holes and a share of the visible tokens, of which half are
    kept and half replaced by random ones, as BERT halves its own (1810.04805). Without a loss there a network
    knows nothing of the tokens that it sees, and `--order remask`, which writes them anew, spoils them.
    """
    u = torch.rand(x0.shape, generator=generator)
    words = random_tokens(*x0.shape, model_config, generator)
    asked = maskable & ~holes & (u < share)
    return torch.where(asked & (u < share / 2), words, xt), holes | asked


def random_tokens(B, T, model_config, generator):
    """Tokens (B, T), each any of those that may stand at its place, with the same probability."""
    special = torch.tensor([model_config.mask_id, *model_config.special_ids])
    places = []
    for n, first, end in model_config.kinds or ((T, 0, model_config.vocab_size),):
        ids = torch.arange(first, end)
        ids = ids[torch.isin(ids, special, invert=True)]
        places.append(ids[torch.randint(len(ids), (B, n), generator=generator)])
    return torch.cat(places, 1)


def draw_batch(split, config, generator, model_config, token_nats=None, level=None):
    """A batch of windows of a split, corrupted: x0, xt, holes and weights, (B, T) each. level: instead of the
    config's.
    """
    level = level or config.level
    B, T = config.batch_size, config.block_size
    K = min(model_config.K, T)
    n = B * T // K  # blocks
    places = torch.randint(n_windows(split, T), (B, 1), generator=generator)
    x0, own_prompt = map(torch.from_numpy, windows_at(split, places.numpy(), T))  # (B, T), (B, 1)
    one = draw_levels(level, 1, generator)  # (1, 1)
    if config.one_level:
        t = one.expand(n, 1)
    elif model_config.kinds and n == B and config.weight == "mean":  # a canvas has one level in the bound
        t = kind_levels(level, B, model_config.kinds, generator)  # (B, T)
    else:
        t = block_levels(level, B, n // B, generator)  # (n, 1)
    prompt_len = torch.randint(config.prompt_len.low, config.prompt_len.high + 1, (B, 1), generator=generator)
    maskable = which_maskable(x0, own_prompt + prompt_len, model_config.special_ids)
    u = torch.rand(x0.shape, generator=generator)
    blocks = x0.view(n, K), maskable.view(n, K), t, u.view(n, K)
    information = relative_information(blocks[0], token_nats) if config.spindle else 0.0
    corrupted = corrupt(
        *blocks, model_config.mask_id, config.weight, config.slant, config.spindle, information
    )
    xt, holes, weights = (tensor.view(B, T) for tensor in corrupted)
    if config.visible:
        xt, holes = with_visible(x0, xt, holes, maskable, config.visible, model_config, generator)
        weights = torch.full_like(weights, 1 / max(1, holes.sum().item()))  # a mean over all of these
    return x0, xt, holes, weights


# --- the bound -----------------------------------------------------------------------------------
#
# The loss with the weight elbo, under uniform levels or those of a grid, is the bound. Here it has holes and
# weights of its own, so that it is the bound whatever rates and weights one trains with, and has less
# variance; its levels are stratified over STRATA sequences at a time: enough to take out most of the
# variance, few enough to leave many groups, whose draws show how much is left. The bound of a text that is
# written in blocks is the sum of theirs; a block of one token is always a hole: its bound is exact.

STRATA = 16


def uniform_holes(x0, maskable, t, mask_id, generator):
    """What `corrupt` returns, without the variance of 1/t (2502.09992, eq. 6): of the M maskable tokens the
    first k = ceil(tM) of a random order are holes, and each counts M/k, over all maskable tokens.
    """
    M = maskable.sum(1, keepdim=True)  # (B, 1)
    keys = torch.rand(x0.shape, generator=generator).masked_fill(~maskable, torch.inf)
    place, k = keys.argsort(1).argsort(1), (t * M).ceil()  # (B, T): in a random order, 0 .. M - 1; (B, 1)
    holes = maskable & (place < k)  # none where M is 0, and so no weight of 0/0 is read
    return x0.masked_fill(holes, mask_id), holes, (M / k / maskable.sum()).expand(x0.shape)


def grid_holes(x0, maskable, t, mask_id, generator):
    """What uniform_holes returns, for t of grid:N; the mean over t is D3PM's sum of N steps (2107.03006)."""
    holes = maskable & (torch.rand(x0.shape, generator=generator) < t)
    return x0.masked_fill(holes, mask_id), holes, (1 / t / maskable.sum()).expand(x0.shape)


def slanted_holes(x0, maskable, t, mask_id, generator, slant):
    """What uniform_holes returns, where rates are slanted by w: r_i(t) = clip(t(1+w) - w(1 - i/(T-1)), 0, 1).

    Token i is masked at level s_i = (u_i + w(1 - i/(T-1))) / (1 + w), at which its rate rises above u_i.
    The first k = ceil(tM) to be masked are holes, the last of them at level s:
        P(i is the last | the k) is proportional to r_i'(s) / r_i(s),   weight_i = M P(i is the last | the k).
    The mean is that of rate'/rate over levels and holes (a test integrates it), but no weight is above M.
    """
    M = maskable.sum(1, keepdim=True)  # (B, 1)
    delay = slant * (1 - torch.linspace(0, 1, x0.shape[1]))
    masked_at = (torch.rand(x0.shape, generator=generator) + delay) / (1 + slant)  # (B, T)
    place = masked_at.masked_fill(~maskable, torch.inf).argsort(1).argsort(1)  # (B, T), 0 is masked first
    holes = place < (t * M).ceil()
    last = masked_at.masked_fill(~holes, 0).amax(1, keepdim=True)  # (B, 1)
    rates = mask_rates(last, x0.shape[1], slant)
    # A rate that is 1 before that level does not rise there; the last itself is not lost to rounding.
    odds = holes * ((rates < 1) | (masked_at == last)) / rates.clamp(min=1e-12)
    weights = M * odds / odds.sum(1, keepdim=True).clamp(min=1e-12)
    return x0.masked_fill(holes, mask_id), holes, weights / maskable.sum()


@torch.no_grad()
def sequence_bounds(
    model, tokens, prompt_len=0, draws=1, batch_size=None, seed=0, level=UNIFORM, slant=0.0, strata=STRATA
):
    """Estimate the NELBO of each sequence of tokens (N, T) int64, without bias: nats (draws, N); and
    n_maskable (N,), how many of its tokens may be holes.

    The bound is E_t [ sum over holes of rate'(t)/rate(t) * -log p(x_i | xt) ], t uniform in (0, 1]
    (2406.07524); for level grid:N D3PM's, t one of 1/N .. 1. The same seed gives the same numbers. The
    draws are independent of each other; strata=1 makes the levels so, too, to compare. batch_size: sequences
    of a pass; None: 64, or as many as their logits allow.
    """
    if level.kind not in ("uniform", "grid") or (slant and level.kind == "grid"):
        raise ValueError(f"level {level}, slant {slant}: the bound is uniform's, slanted or not, or grid:N's")
    holes_of = grid_holes if level.kind == "grid" else uniform_holes
    if slant:
        holes_of = functools.partial(slanted_holes, slant=slant)
    generator = torch.Generator().manual_seed(seed)
    (N, T), config, device = tokens.shape, model.config, device_of(model)
    K, batch_size = min(config.K, T), batch_size or rows_at_once(64, T, config.vocab_size)
    if T % K:
        raise ValueError(f"{T} tokens: not a number of blocks of {K}; cut the text to a multiple")
    maskable = which_maskable(tokens, prompt_len, config.special_ids)  # (N, T)
    sizes = [len(part) * T // K for part in tokens.split(strata)] * draws
    # Shuffled, because neighbours in a text are alike: they should not have neighbouring levels.
    levels = [draw_levels(level, n, generator)[torch.randperm(n, generator=generator)] for n in sizes]
    t = torch.cat(levels).view(draws * N, T // K)
    was_training = model.training
    model.eval()
    nats = []
    for rows in torch.arange(draws * N).split(batch_size):
        x0, counted = tokens[rows % N], maskable[rows % N]  # (B, T)
        t_blocks = t[rows].view(-1, 1)  # (B * T/K, 1)
        corrupted = holes_of(x0.view(-1, K), counted.view(-1, K), t_blocks, config.mask_id, generator)
        batch = (x0, *(tensor.reshape(x0.shape) for tensor in corrupted))
        # Each process makes the pass, which shards need. With fewer rows than processes some repeat a row,
        # and leave it out of the sum.
        losses, first = torch.zeros(len(x0), device=device), rank() % len(x0)
        own = slice(first, None, size())
        loss = loss_of(model, *send(device, *(part[own] for part in batch)))  # (B / size,)
        if first == rank():
            losses[own] = loss
        nats.append(losses * counted.sum().item())  # sums again: the weights divide by the maskable tokens
    model.train(was_training)
    return total(torch.cat(nats)).cpu().double().view(draws, N), maskable.sum(1)


class Bound(float):
    """A NELBO in nats per token, with its standard `error` over seeds for the same text. The error says
    nothing of other texts, and is nan if there was one draw.
    """

    error = math.nan


def nelbo(model, tokens, **flags):
    """Negative evidence lower bound of tokens (N, T) int64, a Bound; flags as sequence_bounds has them.

    For uniform levels it is also the mean negative log-likelihood over all orders of generation
    (2406.03736); a slant makes those from the left likelier.
    """
    nats, n_maskable = sequence_bounds(model, tokens, **flags)
    bound = Bound(nats.mean(0).sum() / n_maskable.sum())
    if len(nats) > 1:  # from how far the draws of each group of sequences are apart
        sums = torch.stack([group.sum(1) for group in nats.split(STRATA, dim=1)])  # (groups, draws)
        bound.error = (sums.var(1).sum() / len(nats)).sqrt().item() / n_maskable.sum().item()
    return bound


# --- the loop ------------------------------------------------------------------------------------


def train(run, batches):
    """Train on batches, (x0, xt, holes, weights) each; yields the loss of each step, in nats per hole or per
    token as --weight says, and its gradient's norm: tensors of no dimensions on the device, which has not
    computed them yet. To read them is to wait for it.
    """
    config, model, scaler = run.config, run.model, run.scaler
    for batch in batches:
        model.opened = run.opened()  # on the way from causal to canvas, how far; None: not on that way
        loss, lr = 0.0, run.learning_rate()
        for piece in run.pieces(batch):
            with run.precision:
                part = loss_of(run.network, *piece).sum()
            scaler.scale(part).backward()
            loss = loss + part.detach()
        for optimizer in run.optimizers:
            scaler.unscale_(optimizer)
            for group in optimizer.param_groups:
                group["lr"] = lr
        norm = whole(torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf))
        # In float16 gradients overflow now and then: the step is left out, and their scale lowered.
        if not scaler.is_enabled() or math.isfinite(norm):
            for optimizer in run.optimizers:
                scaler.step(optimizer)
        scaler.update()
        model.zero_grad(set_to_none=True)
        run.step += 1
        yield loss, norm


# --- the run around it ---------------------------------------------------------------------------


def windows(split, T, n_tokens):
    """About n_tokens of a split, as windows of T tokens spaced evenly and not overlapping: (N, T) int64; and
    how many of each are a prompt of its own, (N, 1).
    """
    count = max(1, min(n_tokens, len(split)) // T)
    places = np.linspace(0, n_windows(split, T) - 1, count).astype(np.int64)[:, None]
    return tuple(map(torch.from_numpy, windows_at(split, places, T)))


def evaluate(run, tokens, own_prompt, counts, prompt_len, **flags):
    """The Bound of windows, in nats per maskable token; and in bits per byte of their split."""
    flags |= {"prompt_len": own_prompt + prompt_len, "seed": run.config.seed}
    with run.precision:
        bound = nelbo(run.model, tokens, **flags)
    return bound, bits_per_byte(bound, tokens, own_prompt, run.model.config.special_ids, counts)


def bits_per_byte(bound, tokens, own_prompt, special_ids, counts):
    """Of a split, were all its text as likely as these windows by their bound. counts: how many tokens the
    split has, and bytes, which of examples are those of replies.
    """
    text_share = which_maskable(tokens, own_prompt, special_ids).float().mean().item()
    return bound * text_share * counts["tokens"] / counts["bytes"] / math.log(2)


def bound_name(K, prompt_len=0, slant=0.0, level=UNIFORM, of_replies=False):
    name = ("NELBO" if K > 1 else "negative log-likelihood") + (" of replies" if of_replies else "")
    settings = [f"level {level}" if level.kind != "uniform" else "", f"slant {slant:g}" if slant else ""]
    settings += [f"after a prompt of {prompt_len}" if prompt_len else ""]
    return f"{name} ({', '.join(filter(None, settings))})" if any(settings) else name


def sample(run, tokenizer, prompt):
    """A short text, safe to show, from a canvas that is empty but for the prompt (n,) of an example."""
    T, config = run.config.block_size, run.model.config
    (ids,) = make_canvases("", suffix="", length=T, tokenizer=tokenizer, block_size=T)
    ids[: len(prompt)] = prompt.tolist()
    canvas = torch.tensor([ids])  # (1, T)
    run.model.eval()
    with run.precision:
        *_, canvas = denoise(run.model, canvas, steps=64, temperature=0.7)
    run.model.train()
    text = tokenizer.decode(shown_of(canvas[0].tolist(), ids, config.mask_id, config.end_ids))
    return as_shown(text, tokenizer) if sys.stdout.isatty() else inert(text)


def print_bound(run, val_split, counts):
    """Print the bound of a split, or of --eval_tokens of it, with its standard error."""
    config = run.config
    tokens, own_prompt = windows(val_split, config.block_size, config.eval_tokens or len(val_split))
    K = run.model.config.K
    # Two for 256 windows, to show the error; what is exact has none.
    draws = 1 if K == 1 else 1 + math.ceil(16 * STRATA / len(tokens))
    flags = {"level": config.level, "slant": config.slant, "prompt_len": config.prompt_len.low}
    bound, bits = evaluate(run, tokens, own_prompt, counts, draws=draws, **flags)
    name, n_prompt = bound_name(K, **flags, of_replies=own_prompt.any()), own_prompt.sum().item()
    error = "exact" if K == 1 else f"standard error {bound.error:.4f}"
    print(
        f"{config.data}: {name} {bound:.4f} nats per token ({error}), {bits:.4f} bits per "
        f"byte, perplexity {math.exp(bound):.3f}; {tokens.numel() - n_prompt:,} validation tokens, "
        f"{draws} draws"
    )


def compile_ahead(run, draw, report):
    """Have torch compile at passes of every kind before the clock of a run starts; they leave no trace."""
    generator, run.generator = run.generator, torch.Generator()
    for piece in run.pieces(draw()):
        with run.precision:
            loss_of(run.network, *piece).sum().backward()
    run.model.zero_grad(set_to_none=True)
    report.evaluate()
    report.sample()
    run.generator = generator
    report.start_clock()


def main():
    given = parse(TrainConfig, __doc__.splitlines()[0])
    config, model, tokenizer, checkpoint = settle(given, TrainConfig)
    check_training(config)
    device = pick_device(config.device)
    train_split, val_split, corpus_tokenizer, meta = load_corpus(config.data, config.block_size)
    torch.manual_seed(config.seed)
    if model is None:
        tokenizer = corpus_tokenizer
        shape = {name: getattr(config, name) for name in (*SHAPE, "block_size", "dropout")}
        shape |= attention_fields(config.attention, tokenizer.mask_id)
        shape |= {"special_ids": tokenizer.special_ids, "kinds": tokenizer.kinds}
        model = Transformer(ModelConfig(tokenizer.vocab_size, tokenizer.mask_id, **shape))
    elif tokenizer.state != corpus_tokenizer.state:
        raise Mistake(f"--data {config.data}: its tokenizer is not the one that the model was trained with")
    if config.compile:
        model.compile()
    token_nats = torch.from_numpy(unigram_nats(meta, train_split, tokenizer.vocab_size))
    template = meta.get("chat") or (checkpoint or {}).get("chat")
    if "chat" in meta:
        config = with_examples(config, given, model.config, Chat(template, tokenizer))
    run = Run(config, model, device, meta, token_nats, template)
    if config.eval_only:
        return print_bound(run, val_split, meta["val"])
    if config.init_from == "resume":
        run.restore(checkpoint)
    else:
        check_unused(config.out_dir)
    val_tokens, val_prompts = windows(val_split, config.block_size, config.eval_tokens or 2**16)
    report = Report(
        run,
        Path(config.out_dir),
        bound_name(model.config.K, **run.bound_flags, of_replies="chat" in meta),
        lambda: evaluate(run, val_tokens, val_prompts, meta["val"], **run.bound_flags),
        lambda: sample(run, tokenizer, val_tokens[0, : val_prompts[0]]),
        lambda nats: run.save(tokenizer, nats),
    )
    parameters = sum(p.numel() for p in model.parameters())
    model.train()

    def draw():
        return draw_batch(train_split, config, run.generator, model.config, token_nats, run.level())

    alone = nullcontext() if rank() else alone_in(config.out_dir)
    with signals() as came, alone, report:
        print(f"{parameters:,} parameters on {device} in {run.precision.fast_dtype}")
        if config.compile:
            compile_ahead(run, draw, report)
        for loss, norm in train(run, (draw() for _ in itertools.count())):
            if report(loss, norm, bool(came)):
                break
        if run.progress() < 1:
            run.save(tokenizer)
    run.end(came, "train.py")


if __name__ == "__main__":
    with together():
        command(main)
