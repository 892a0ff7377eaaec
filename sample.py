"""Write text by denoising: start from a canvas of `<mask>`, set some of its tokens, then more.

    canvas = prompt + <mask> ... <mask>
    repeat: logits = model(canvas); choose holes; draw their tokens; canvas[holes] = tokens

An autoregressive model calls `.append(token)`; this one calls `.setitem(i, token)`. An order is the
rule that chooses the holes, and `denoise` is the loop that all orders share.

    python sample.py --prompt "def " --watch
    python sample.py --prompt "def <mask*4:12>(self):" --order confidence
    python sample.py --length 2000 --order entropy --save run.html
"""

import functools
import math
import os
import re
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data.canvas import History, Watch, inert, save_html, save_svg
from data.flags import Mistake, command, flag, parse
from data.prompt import HOLE, MOST, make_canvases, read_text, split_prompt
from model import autocast, load_checkpoint, pick_device

ORDERS = "random", "remask", "confidence", "margin", "entropy", "threshold", "information", "left"
NOTHING = -1  # in a canvas: behind the end of a row that is shorter than the others


@dataclass
class SampleConfig:
    ckpt: str = flag("out/ckpt.pt", "checkpoint to sample from")
    prompt: list[str] = flag((), "text to start from, or several; <mask> is a hole in it, <mask*8> are eight")
    prompt_file: list[str] = flag((), "the same from a file, or from - for stdin")
    suffix: str = flag("", "text that stands behind the hole")
    length: int | None = flag(
        None, "tokens of the canvas (block_size; a prompt with holes: its own)", least=1, most=MOST
    )
    steps: int | None = flag(None, "denoising steps (128, or half the holes if more)", least=1, most=MOST)
    order: Literal[ORDERS] = flag("random", "what is set first")
    tau: float = flag(0.9, "threshold: set every hole as sure as this", least=0, most=1)
    block_len: int | None = flag(None, "fill the canvas from left to right in blocks of this", least=1)
    revise: float = flag(0.0, "share of the written tokens that each step writes anew", least=0, below=1)
    guidance: float = flag(0.0, "how much likelier the prompt is to be heeded; 0 for none", least=0, most=1e3)
    temperature: float = flag(0.7, "divides the logits; 0 takes the likeliest token", least=0, most=1e6)
    top_k: int = flag(0, "draw from the k likeliest tokens; 0 for all", least=0)
    top_p: float = flag(1.0, "draw from the likeliest that together reach this", above=0, most=1)
    num_samples: int = flag(1, "texts of each prompt, with successive seeds", least=1, most=10_000)
    seed: int = flag(0, "the same seed writes the same text", least=0, most=2**32)
    score: str | None = flag(None, "print how likely the order and steps make the text of a file, or of -")
    watch: bool = flag(False, "show the canvas while it fills")
    save: str | None = flag(None, "write how it filled: a page, run.html, or an animated picture, run.svg")
    device: str = flag("auto", "auto (cuda, then mps, then cpu) or a device's name")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag("auto", "of the matrix products")


# --- drawing tokens ------------------------------------------------------------------------------


def in_parts(function, logits, *more):
    """function(logits (N, V), ...), (N,), a few rows at a time, so that its copies stay in the cache."""
    rows = max(1, 2 ** (20 if logits.device.type == "cpu" else 26) // logits.shape[1])
    parts = zip(*(tensor.split(rows) for tensor in (logits, *more)))
    return torch.cat([function(*part) for part in parts])


def uniforms(seeds, block, step, T):
    """Random numbers in [0, 1), (B, T, 3) float64 on the CPU: three for each position of each row.

    They depend on the row's seed, the step and the position alone (Philox, a generator that counts),
    so that a row is written the same in every batch.
    """
    streams = [np.random.Philox(key=seed, counter=[0, 0, step, block]) for seed in seeds]
    return torch.from_numpy(np.stack([np.random.Generator(stream).random((T, 3)) for stream in streams]))


def weights_of(logits, temperature=1.0):
    """The probabilities of logits (N, V) over the largest in the row, float32."""
    logits = logits.float()
    return ((logits - logits.amax(-1, keepdim=True)) / temperature).exp()  # overflows at no temperature


def drop_tail(weights, enough):
    """weights (N, K), largest first, without those behind a sum of `enough` (N, 1) (1904.09751)."""
    before = weights.cumsum(-1) - weights  # the sum ahead of each
    return weights.masked_fill(before >= enough, 0)


def select(weights, u, size=256):
    """Where the running sum of weights (N, V) first reaches the share u (N,) of the whole: (N,) int64.

    In float64: a float32 draw, by Gumbel noise above all, would truncate the tail and so lower the
    temperature unseen (2409.02908). First by sums over pieces of a long row, then inside of one.
    """
    if weights.shape[1] < 4 * size:
        sums = weights.cumsum(-1, dtype=torch.float64)
        return torch.searchsorted(sums, u[:, None] * sums[:, -1:]).squeeze(1)
    pieces = F.pad(weights, (0, -weights.shape[1] % size)).view(len(weights), -1, size)
    sums = pieces.sum(-1, dtype=torch.float64).cumsum(-1)  # (N, V / size)
    target = u[:, None] * sums[:, -1:]  # above 0, so that no weight of 0 is ever selected
    piece = torch.searchsorted(sums, target)  # (N, 1)
    target -= F.pad(sums, (1, 0)).gather(1, piece)
    inside = pieces[torch.arange(len(weights), device=weights.device), piece[:, 0]].double().cumsum(-1)
    place = torch.searchsorted(inside, torch.minimum(target, inside[:, -1:]))
    return (piece * size + place).squeeze(1)


def draw(logits, u, temperature=1.0, top_k=0, top_p=1.0):
    """One token per row of logits (N, V), which u (N,) float64, uniform in (0, 1], selects: (N,) int64."""
    if temperature < 1e-6:
        return logits.argmax(-1)

    def draw_part(logits, u):
        places = None
        if logits.device.type == "mps":  # it has no float64
            logits = logits.cpu()
        if top_k:
            logits, places = logits.topk(min(top_k, logits.shape[1]))
        weights = weights_of(logits, temperature)
        if top_p < 1:
            enough = top_p * weights.sum(-1, keepdim=True)
            for k in (min(1024, weights.shape[1]), weights.shape[1]) if places is None else ():
                kept, places = weights.topk(k)
                if (kept.sum(-1, keepdim=True) >= enough).all():  # which is so unless they are very flat
                    break
            weights = drop_tail(weights if top_k else kept, enough)
        tokens = select(weights, u.to(weights.device))
        return tokens if places is None else places.gather(1, tokens[:, None]).squeeze(1)

    return in_parts(draw_part, logits, u).to(logits.device)


def probability_of(logits, tokens):
    """What the model gives to tokens (N,), (N,)."""
    weights = weights_of(logits)
    return weights.gather(1, tokens[:, None]).squeeze(1) / weights.sum(-1)


# --- orders: which holes are set next ------------------------------------------------------------
#
# An order scores the holes, and the highest are set. Some do without the logits. The others say how
# sure the model is of a hole, from its distribution alone and not from the token that is then drawn:
# one hole a step, in any of these orders, draws the model's own joint distribution.


def at_random(noise):
    """Any hole, each as likely as the next, (B, T): ancestral sampling (MDLM 2406.07524, MD4 2406.04329)."""
    return noise


def leftmost(noise):
    """The leftmost, (B, T): the order of autoregressive models."""
    return -torch.arange(noise.shape[1], device=noise.device, dtype=torch.float32).expand_as(noise)


def largest(logits):
    """Probability of the likeliest token, (N,) (MaskGIT 2202.04200, LLaDA 2502.09992: greedily so)."""
    return 1 / weights_of(logits).sum(-1)


def margin(logits):
    """Probability of the likeliest token less that of the next, (N,) (2502.06768)."""
    weights = weights_of(logits)
    total = weights.sum(-1)
    weights.scatter_(1, weights.argmax(-1, keepdim=True), 0)  # its 1, so that the next is the largest
    return (1 - weights.amax(-1)) / total


def negative_entropy(logits):
    """Sum of p log p, (N,), in nats (Dream 2508.15487)."""
    logits = logits.float()
    logits = (logits - logits.amax(-1, keepdim=True)).clamp_(min=-1e4)  # 0 log 0 is 0
    weights = logits.exp()
    total = weights.sum(-1)
    return (weights.mul_(logits)).sum(-1) / total - total.log()


def negative_information(logits, token_nats):
    """Minus what the token is expected to say, (N,), by its nats in token_nats (V,): the most informative
    are set last, as DiffusionBERT masks them first (2211.15029).
    """
    weights = weights_of(logits)
    return -(weights * token_nats.to(weights.device)).sum(-1) / weights.sum(-1)


UNSEEN = {"random": at_random, "remask": at_random, "left": leftmost}
SURENESS = {"confidence": largest, "threshold": largest, "margin": margin, "entropy": negative_entropy}
SURENESS["information"] = negative_information


def highest(scores, candidates, n):
    """The n (B, 1) candidates of each row with the highest scores, (B, T) bool."""
    scores = scores.masked_fill(~candidates, -torch.inf)
    ranks = scores.argsort(descending=True, stable=True).argsort()
    return candidates & (ranks < n)


# --- the loop ------------------------------------------------------------------------------------


def blocks(is_open, steps, block_len, W):
    """A canvas in blocks, from left to right, those with holes: (number, window, holes, steps) of each.

    The window is the slice of at most W positions through which the block is seen; holes are those of
    is_open (B, T) that are the block's, (B, W) bool; steps (B, 1) are its share of steps (B, 1). A
    canvas that is longer than W slides through, with up to a quarter of W behind the block.
    """
    T = is_open.shape[1]
    n_open = F.pad(is_open.cumsum(1), (1, 0))  # (B, T + 1): ahead of each position
    share = (n_open * steps / n_open[:, -1:].clamp(min=1)).round().long()
    positions = torch.arange(T, device=is_open.device)
    margin = min(W // 4, (W - block_len) // 2)
    for number, start in enumerate(range(0, T, block_len)):
        end = min(start + block_len, T)
        left = max(0, start + block_len + margin - W) if T > W else 0
        window = slice(left, left + W)
        holes = (is_open & (positions >= start) & (positions < end))[:, window]
        if holes.any():
            yield number, window, holes, (share[:, end] - share[:, start]).clamp(min=1)[:, None]


def predict(model, canvas, where, given, guidance=0.0):
    """Logits (N, V) of the positions `where` (B, T) of a canvas, minus infinity for all that is no text.

    guidance w: (1 + w) times these less w times those of a canvas whose prompt, `given` (B, T), is
    masked too, so that what the prompt makes likelier becomes likelier still (2502.09992).
    """
    rows = where.any(1)
    if len(rows) > 1 and not rows.all():  # the others wait
        canvas, where, given = canvas[rows], where[rows], given[rows]
    guidance = guidance if guidance and given.any() else 0.0
    if guidance:
        canvas = torch.cat((canvas, canvas.masked_fill(given, model.config.mask_id)))
        where = torch.cat((where, where))
    padding = {}
    if (canvas[:, -1] == NOTHING).any():
        padding = {"padding": canvas == NOTHING}
        canvas = canvas.clamp(min=0)
    logits = model(canvas, where=where, **padding)
    if guidance:
        logits, unguided = logits.float().chunk(2)
        logits = logits + guidance * (logits - unguided)
    logits[:, [model.config.mask_id, *model.config.special_ids]] = -torch.inf
    return logits


def masked_again(written, noise, revise, limit):
    """The written (B, T) that become holes again: each with probability revise, at most limit (B, 1)."""
    n = (written & (noise < revise)).sum(1, keepdim=True)
    return highest(-noise, written, torch.minimum(n, limit))


@torch.no_grad()
def denoise(
    model, canvas, steps=None, order="random", temperature=1.0, top_k=0, top_p=1.0, *,
    seeds=None, tau=0.9, block_len=None, revise=0.0, guidance=0.0, token_nats=None, text=None,
    probability=None,
):  # fmt: skip
    """Fill the holes of canvas (B, T) int64 in `steps` steps; yields the canvas after each.

    The holes are where canvas is `model.config.mask_id`; all other tokens are prompt and stay, and
    NOTHING stands behind the end of a shorter row. After step k of n, round(k/n) of each row's holes
    are set, so the last canvas has none; with more steps than holes, it ends as soon as these are set,
    unless it rewrites. Without `steps`, 128, or half the row's holes if that is more.

    order: UNSEEN and SURENESS name the rules. Besides, `threshold` sets all of whose likeliest token the
        model is as sure as tau, and at least one, in as many steps as it needs (Fast-dLLM 2505.22618);
        and `remask` draws all that were open at the start anew at every step and makes the rest holes
        again, so that early mistakes are written over (RoBERTa diffusion, Barry 2025).
    block_len: fill the canvas in blocks of this many positions, from left to right; each has its
        share of the steps, and at least one (semi-autoregressive, 2502.09992). By default the canvas
        is one block, or if it is longer than the model's block_size, blocks of a quarter of that.
    revise: each step masks a written token again with this probability, as far as there are steps
        left to write as many more (ReMDM 2503.00307, at a constant rate with its cap).
    seeds: one for each row (0, 1, ..); what is written depends on the row's own, in any batch of
        canvases that are all longer than block_size or all not.
    token_nats: (V,), minus the log of each token's share of the training text, for `information`.
    text: (B, T) int64, tokens to set instead of drawing any. In an order that looks at the model's
        distributions alone, their probabilities then multiply to exactly that with which the sampler
        writes this text, at temperature 1 (DUEL 2603.01367).
    probability: a (B, T) float tensor to fill with what the model, guided or not, gave each token when
        it was set.
    """
    mask_id, (B, T), W = model.config.mask_id, canvas.shape, model.config.block_size
    seeds = range(B) if seeds is None else seeds
    canvas, is_open = canvas.clone(), canvas == mask_id
    not_text = torch.tensor([mask_id, NOTHING, *model.config.special_ids], device=canvas.device)
    given = torch.isin(canvas, not_text, invert=True)  # (B, T)
    block_len = block_len or (W if T <= W else max(1, W // 4))
    n_holes = is_open.sum(1, keepdim=True)  # (B, 1)
    steps = (n_holes // 2).clamp(min=128) if steps is None else torch.full_like(n_holes, steps)
    score = UNSEEN.get(order) or SURENESS[order]
    if order == "information":
        score = functools.partial(score, token_nats=token_nats)
    if not is_open.any():
        yield canvas
    for block, window, block_open, n_steps in blocks(is_open, steps, block_len, W):
        view = canvas[:, window]  # (B, W), written in place
        n_open = block_open.sum(1, keepdim=True)  # (B, 1)
        if order == "threshold":
            n_steps = n_open
        elif order != "remask" and not revise:  # these set at least one a step, and then are done
            n_steps = torch.minimum(n_steps, n_open.clamp(min=1))
        for step in range(1, n_steps.max().item() + 1):
            holes = block_open & (view == mask_id)
            n_written = n_open - holes.sum(1, keepdim=True)
            if order == "threshold" and not holes.any():
                break
            due = n_written + 1 if order == "threshold" else (n_open * step / n_steps).round().long()
            due = torch.minimum(due, n_open)  # so many are written after this step, or more
            candidates = block_open & (step <= n_steps) if order == "remask" else holes
            noise = uniforms(seeds, block, step, view.shape[1])  # (B, W, 3)
            order_noise, again_noise = noise[..., :2].to(canvas.device, torch.float32).unbind(-1)
            n_set, again = due - (0 if order == "remask" else n_written), None
            if revise:
                again = masked_again(block_open & ~holes, again_noise, revise, n_open - due)
                n_set = n_set + again.sum(1, keepdim=True)
            if (candidates & (n_set > 0)).any():  # else the canvas stays, and with it the logits
                if order in UNSEEN:  # chosen first: only these need logits
                    chosen = highest(score(order_noise), candidates, n_set)
                    logits = predict(model, view, chosen, given[:, window], guidance)  # (N, V)
                else:
                    logits = predict(model, view, holes, given[:, window], guidance)
                    scores = torch.zeros_like(order_noise).masked_scatter(holes, in_parts(score, logits))
                    if order == "threshold":
                        n_set = torch.maximum(n_set, (holes & (scores >= tau)).sum(1, keepdim=True))
                    chosen = highest(scores, holes, n_set)
                    logits = logits[chosen[holes]]
                if text is None:
                    u = 1 - noise[chosen.cpu()][:, 2]  # in (0, 1]
                    tokens = draw(logits, u, temperature, top_k, top_p)
                else:
                    tokens = text[:, window][chosen]
                if probability is not None:
                    probability[:, window][chosen] = in_parts(probability_of, logits, tokens)
                view.masked_fill_(candidates if again is None else candidates | again, mask_id)
                view[chosen] = tokens
            yield canvas.clone()


# --- the command ---------------------------------------------------------------------------------


def negative_log_likelihood(model, text, tokenizer, steps, batch_size=32, **flags):
    """(nats, tokens) of a text under the sampler at temperature 1: minus the log of the probability with
    which it writes the text, in windows of block_size that are independent of each other.
    """
    W, device = model.config.block_size, next(model.parameters()).device
    windows = torch.tensor(tokenizer.encode(text)).split(W)
    nats = 0.0
    for start in tqdm(range(0, len(windows), batch_size), unit="batch", leave=False):
        tokens = pad_sequence(windows[start : start + batch_size], True, NOTHING).to(device)  # (B, T)
        canvas = tokens.masked_fill(tokens != NOTHING, model.config.mask_id)
        probability = torch.ones(tokens.shape, device=device)
        for _ in denoise(model, canvas, steps, text=tokens, probability=probability, **flags):
            pass
        nats -= probability.double().log().sum().item()
    return nats, sum(map(len, windows))


def check(config, prompts):
    """Raise Mistake for flags that cannot work together, before the model is loaded."""
    for text in (*prompts, config.suffix):
        if re.search("[\ud800-\udfff]", text):  # what Python makes of bytes that are no text
            raise Mistake("--prompt: it is not UTF-8")
    n_holes = max(sum(part[0] for part in split_prompt(text) if isinstance(part, range)) for text in prompts)
    if n_holes > (config.length or MOST):
        raise Mistake(f"--prompt: {n_holes} holes; the canvas has {config.length or MOST} tokens (--length)")
    if HOLE.search(config.suffix):
        raise Mistake("--suffix: holes go into --prompt, which may have several")
    if config.revise and config.order == "remask":
        raise Mistake("--revise: not with --order remask, which writes every token anew at each step")
    if config.guidance and not all(HOLE.sub("", text) or config.suffix for text in prompts):
        raise Mistake("--guidance: it needs a --prompt to heed")
    if config.score is not None and config.order in ("random", "remask"):
        raise Mistake(
            f"--score: under --order {config.order} a text has no one probability; see train.py's bound"
        )
    if config.save is not None:
        path = Path(config.save)
        if path.suffix not in (".html", ".svg"):
            raise Mistake(f"--save {path}: the name of a page ends in .html, that of a picture in .svg")
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise Mistake(f"--save {path}: it cannot be written there")
    if config.ckpt == SampleConfig.ckpt and not os.path.exists(config.ckpt):
        raise Mistake(f"{config.ckpt}: there is no checkpoint yet; `python train.py` makes one")


def write(model, tokenizer, rows, config, token_nats):
    """Fill the canvases of rows [(text's number, ids, seed)] as the flags say: [(ids, log p, History)],
    log p per token as the model gave it; the latter two are None where no flag needs them.
    """
    device = next(model.parameters()).device
    start = pad_sequence([torch.tensor(ids) for _, ids, _ in rows], True, NOTHING).to(device)  # (B, T)
    several = len({text for text, *_ in rows}) < len(rows)
    recorded = config.watch or config.save is not None
    probability = torch.ones(start.shape, device=device) if several or recorded else None
    histories = [History(tokenizer, row) for row in start.tolist()] if recorded else [None] * len(rows)
    canvas = start
    canvases = denoise(
        model, start, config.steps, config.order, config.temperature, config.top_k, config.top_p,
        seeds=[seed for *_, seed in rows], tau=config.tau, block_len=config.block_len, revise=config.revise,
        guidance=config.guidance, token_nats=token_nats, probability=probability,
    )  # fmt: skip
    with Watch() if config.watch else nullcontext() as watch:
        for canvas in tqdm(canvases, unit="step", leave=False, disable=config.watch):
            if recorded:
                for history, ids, p in zip(histories, canvas.tolist(), probability.tolist()):
                    history.add(ids, p)
            if watch:
                watch.show(histories[0], len(rows))
    is_open = start == tokenizer.mask_id
    log_p = [None] * len(rows)
    if several:
        log_p = ((probability.log() * is_open).sum(1) / is_open.sum(1).clamp(min=1)).tolist()
    texts = [[i for i in ids if i != NOTHING] for ids in canvas.tolist()]
    return list(zip(texts, log_p, histories))


def likeliest(rows, written):
    """Of every text the likeliest of its rows: rows [(text's number, ...)], written as `write` has it."""
    best = {}
    for (text, *_), (ids, log_p, history) in zip(rows, written):
        if text not in best or log_p > best[text][1]:
            best[text] = ids, log_p, history
    return [best[text] for text in sorted(best)]


def main():
    given = parse(SampleConfig, __doc__.splitlines()[0])
    config = SampleConfig(**given)
    if config.score is not None:
        goes = "score", "ckpt", "order", "steps", "tau", "block_len", "device", "dtype"
        if wrong := [name for name in given if name not in goes]:
            raise Mistake(f"--score: not with --{wrong[0]}; it is at temperature 1, and nothing is written")
    prompts = [*config.prompt, *map(read_text, config.prompt_file)] or [""]
    check(config, prompts)
    scored = None if config.score is None else read_text(config.score)
    if scored == "":
        raise Mistake(f"--score {config.score}: it is empty")
    device = pick_device(config.device)
    model, tokenizer, checkpoint = load_checkpoint(config.ckpt, device)
    token_nats = checkpoint.get("token_nats")
    if config.order == "information" and token_nats is None:
        raise Mistake(f"--order information: {config.ckpt} does not say how common its tokens are")
    if scored is not None:
        if tokenizer.bos_id is not None:
            raise Mistake("--score: not of a model whose lines begin with a token of their own")
        flags = {
            "order": config.order,
            "tau": config.tau,
            "block_len": config.block_len,
            "token_nats": token_nats,
        }
        with autocast(device, config.dtype):
            nats, n_tokens = negative_log_likelihood(model, scored, tokenizer, config.steps, **flags)
        bits = nats / math.log(2) / len(scored.encode())
        return print(f"{nats / n_tokens:.4f} nats per token, {bits:.4f} bits per byte; {n_tokens:,} tokens")
    W = model.config.block_size
    rows = []
    for prompt in prompts:
        canvases = make_canvases(prompt, config.suffix, config.length, tokenizer, W)
        if (config.block_len or 0) > W or (config.block_len == W < max(map(len, canvases))):
            raise Mistake(f"--block_len {config.block_len}: the model sees {W} tokens at a time")
        for sample in range(config.num_samples):
            rows += [(len(rows), ids, config.seed + sample) for ids in canvases]

    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    began, results = time.perf_counter(), {}
    with autocast(device, config.dtype):
        for long in (False, True):  # canvases that the model sees whole, and those it does not
            group = [row for row in rows if (len(row[1]) > W) == long]
            if group:
                results |= zip(map(id, group), write(model, tokenizer, group, config, token_nats))
    seconds = time.perf_counter() - began
    texts = likeliest(rows, [results[id(row)] for row in rows])
    for number, (ids, _, _) in enumerate(texts, 1):
        if len(texts) > 1:
            print(f"--- {number} of {len(texts)}", file=sys.stderr, flush=True)
        text = tokenizer.decode(ids)
        print(inert(text) if sys.stdout.isatty() else text, flush=True)
    n_written = sum(ids.count(tokenizer.mask_id) for _, ids, _ in rows)
    speed = f"{n_written:,} tokens in {seconds:.2f} s: {n_written / seconds:,.0f} tokens/s"
    print(f"{speed}, {len(passes)} forward passes", file=sys.stderr)
    if config.save is not None:
        save = save_html if config.save.endswith(".html") else save_svg
        save(config.save, [history for *_, history in texts])


if __name__ == "__main__":
    command(main)
