"""Write text by denoising: start from a canvas of `<mask>`, set some of its tokens, then more.

    canvas = prompt + <mask> ... <mask>
    repeat: an order chooses which to set, having looked at the model or not; take their tokens; set them

An autoregressive model calls `.append(token)`; this one calls `.setitem(i, token)`.

    python sample.py --prompt "ROMEO:" --watch
    python sample.py --prompt "Good morrow, my <mask*3:9>." --order confidence
    python sample.py --length 2000 --order entropy --save run.html
    python sample.py --ckpt out-gpt/ckpt.pt out/ckpt.pt --prompt "def " --watch    # append and set
    python sample.py --ckpt out-sums/ckpt.pt --chat    # a conversation, a line of stdin for each turn
"""

import functools
import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data.lib.chat import chat_of, converse, reply_length
from data.lib.errors import Mistake, command
from data.lib.fast import Cache, in_parts, rows_at_once
from data.lib.flags import flag, parse
from data.lib.history import History
from data.lib.machine import autocast, device_of, pick_device, send
from data.lib.picture import save_histories
from data.lib.pixels import as_shown
from data.lib.prompt import MOST, make_canvases, read_text, shown_of, standing
from data.lib.settings import check_writing, default_checkpoint, flags_for
from data.lib.terminal import Watch
from model import load_checkpoint

NEAR = 4  # tokens on either side of a hole that say which of several lengths fits it
ORDERS = "random", "remask", "confidence", "margin", "entropy", "threshold", "information", "left"


@dataclass
class SampleConfig:
    ckpt: list[str] = flag((), "checkpoint, or several (out/ckpt.pt, or else data/shakespeare/ckpt.pt)")
    prompt: list[str] = flag((), "text to start from, or several; <mask> is a hole in it, <mask*8> are eight")
    prompt_file: list[str] = flag((), "the same from a file, or from - for stdin")
    suffix: str = flag("", "text that stands after the hole")
    chat: bool = flag(False, "a prompt, or else each line of stdin, is a message; its reply alone is printed")
    length: int | None = flag(None, "tokens of the canvas (block_size, or the prompt's)", least=1, most=MOST)
    steps: int | None = flag(None, "denoising steps (128, or half the holes if more)", least=1, most=MOST)
    order: list[Literal[ORDERS]] = flag(("random",), "what is set first; or several orders to compare")
    tau: float = flag(0.9, "threshold: set every hole as sure as this", least=0, most=1)
    block_len: int | None = flag(None, "fill the canvas from left to right in blocks of this", least=1)
    revise: float = flag(0.0, "probability that a step masks a written token again", least=0, below=1)
    guidance: float = flag(0.0, "classifier-free guidance by the prompt; 0 for none", least=0, most=1e3)
    temperature: float = flag(0.7, "divides the logits; 0 takes the likeliest token", least=0, most=1e6)
    top_k: int = flag(0, "draw from the k likeliest tokens; 0 for all", least=0)
    top_p: float = flag(1.0, "draw from the likeliest that together reach this", above=0, most=1)
    num_samples: int = flag(1, "texts of each prompt, with successive seeds", least=1, most=10_000)
    seed: int = flag(0, "the same seed writes the same text", least=0, most=2**32)
    judge: str | None = flag(None, "checkpoint that says how likely each text is, in nats per byte")
    score: str | None = flag(None, "print how likely the order and steps make the text of a file, or of -")
    watch: bool = flag(False, "show the canvas while it fills")
    save: str | None = flag(None, "write how it filled: a page, run.html, or an animated picture, run.svg")
    device: str = flag("auto", "auto (cuda, then mps, then cpu) or a device's name")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto", "of the matrix products, and of weights that the file has in it"
    )


# --- the loop: look, choose, take, set -----------------------------------------------------------


class Rule(NamedTuple):
    """An order, which says what is set next. Of `random`: the holes with the highest random numbers, k/n of
    all by step k of n, and what is written stays.

    lot (B, W): uniform numbers. n_written() -> (B, 1): how many of the open positions stand written.
    choose(look, candidates (B, W), n (B, 1), lot (B, W)) -> which n are set, (B, W), and their logits
        (N, V); it looks before it chooses, or after.
    pace(n_open, n_steps, n_written) yields for each step `due`, how many tokens must stand written once it
        is done, at least, and `going`, the rows that still take steps, (B, 1) each.
    reopen(holes, written, lot, n_left) -> which of the written become holes again, and which positions
        may be set in this step, (B, W) each. n_left (B, 1) holes are to remain after it.
    """

    choose: Callable
    pace: Callable
    reopen: Callable


def fill(canvas, is_open, n_steps, rule, look, take, noise, mask_id):
    """Write canvas (B, W), one block of the whole, where is_open (B, W), in place, in n_steps (B, 1); yields
    after each step.

    look(where) -> logits (N, V) asks the model about positions of the block. take(logits, u, where) ->
    tokens (N,). noise gives for each step uniform numbers to choose, reopen and draw by, (B, W) each.
    """
    n_open = is_open.sum(1, keepdim=True)  # (B, 1)

    def n_written():
        return (is_open & (canvas != mask_id)).sum(1, keepdim=True)

    for (due, going), (lot, again_lot, u) in zip(rule.pace(n_open, n_steps, n_written), noise):
        holes = is_open & (canvas == mask_id)
        again, candidates = rule.reopen(holes, is_open & ~holes & going, again_lot, n_open - due)
        n = due - n_written() + again.sum(1, keepdim=True)  # n_written - again + n = due
        # A row with nothing to set is not asked about.
        chosen, logits = rule.choose(look, candidates & (n > 0), n, lot)
        canvas.masked_fill_(again, mask_id)  # not before the model has seen it
        canvas[chosen] = take(logits, u[chosen], where=chosen).cpu()  # .setitem
        yield


@torch.no_grad()
def denoise(
    model, canvas, steps=None, order="random", temperature=1.0, top_k=0, top_p=1.0, *,
    seeds=None, tau=0.9, block_len=None, revise=0.0, guidance=0.0, token_nats=None, take=None,
):  # fmt: skip
    """Fill the holes of canvas (B, T) int64, on any device, in `steps` steps; yields the canvas after each.

    The holes are where canvas is `model.config.mask_id`; all other tokens are prompt and stay. After
    step k of n, k/n of each row's holes are written, rounded (but for `threshold`, which takes as many
    steps as it needs); so the last canvas has none. With more steps than holes it ends as soon as these
    are written, unless it rewrites. Without `steps`, 128, or half the row's holes if that is more.

    order: one of ORDERS; `rule_of` says what each does.
    block_len: fill the canvas in blocks of this many positions, from left to right; each has its
        share of the steps, and at least one (semi-autoregressive, 2502.09992). By default the canvas
        is one block, or if it is longer than the model's block_size, blocks of a quarter of that. A model
        that sees in blocks of K writes in these, or in parts that divide them.
    revise: each step masks each written token again with this probability, and no more of them than
        holes remain after it, which will replace them (ReMDM 2503.00307, at a constant rate).
    guidance: see `look_at`.
    seeds: one for each row (0, 1, ..), on which alone its random numbers depend.
    token_nats: (V,), minus the log of each token's share of the training text, for `information`.
    take: how tokens come of logits, in place of a `draw` at temperature, top_k and top_p: `read` sets
        those of a given text, `Recorded` keeps the probability of each.
    """
    mask_id, (B, T), W, K = model.config.mask_id, canvas.shape, model.config.block_size, model.config.K
    # A canvas is small, and what is chosen depends on it: it stays on the CPU, logits on the model's device.
    wanted, canvas = canvas.device, canvas.to("cpu", copy=True)
    is_open, seeds = canvas == mask_id, range(B) if seeds is None else seeds
    not_text = torch.tensor([mask_id, *model.config.special_ids])
    prompt = torch.isin(canvas, not_text, invert=True)  # (B, T)
    if token_nats is not None:
        (token_nats,) = send(device_of(model), token_nats)
    rule = rule_of(order, tau, token_nats, revise)
    take = take or functools.partial(draw, temperature=temperature, top_k=top_k, top_p=top_p)
    if block_len is None:  # the model's own; on a canvas longer than it sees, a quarter of what it sees
        block_len = K if T <= W or K < W else max(1, W // 4)
    block_len = min(block_len, W, K)
    if K < W and K % block_len:
        raise ValueError(f"block_len {block_len}: it does not divide the model's blocks of {K}")
    n_holes = is_open.sum(1, keepdim=True)  # (B, 1)
    steps = (n_holes // 2).clamp(min=128) if steps is None else torch.full_like(n_holes, steps)
    if not is_open.any():
        yield canvas.to(wanted)
    window_start = cache = None
    for number, window, block, n_steps in blocks(is_open, steps, block_len, W, K):
        if window.start != window_start:  # other tokens to see, at other positions
            window_start = window.start
            cache = Cache(min(T, W)) if K < W else None  # on a canvas nothing is final: all see the holes
        look = look_at(model, canvas, prompt, window, block, guidance, cache)
        noise = uniforms(seeds, number, canvas[:, block].shape[1])

        def take_here(logits, u, where, block=block):
            place = torch.zeros_like(is_open)  # the same positions, of the whole canvas
            place[:, block] = where
            return take(logits, u, where=place)

        for _ in fill(canvas[:, block], is_open[:, block], n_steps, rule, look, take_here, noise, mask_id):
            yield canvas.to(wanted, copy=True)


def blocks(is_open, steps, block_len, W, K):
    """Cut a canvas into blocks, from left to right; (number, window, block, steps) of each that has holes.

    is_open (B, T): the holes. window and block: slices of T, what is seen and what is filled. A block's steps
    (B, 1) are its share of all, steps (B, 1). A canvas longer than W slides through the window, with up to a
    quarter of W in sight after the block. A model of blocks sees nothing after its own block of K; its window
    moves by whole ones, about a quarter of W at a time, since each move empties the cache.
    """
    T = is_open.shape[1]
    n_before = F.pad(is_open.cumsum(1), (1, 0))  # (B, T + 1): holes before each position
    share = (n_before * steps / n_before[:, -1:].clamp(min=1)).round().long()
    jump, ahead = (max(1, W // 4 // K) * K, K) if K < W else (1, min(W // 4, (W - block_len) // 2))
    for number, start in enumerate(range(0, T, block_len)):
        end = min(start + block_len, T)
        unseen = (start // K + 1) * K  # where the model's next block begins
        left = max(0, -((W - min(unseen, start + block_len + ahead)) // jump) * jump) if T > W else 0
        window = slice(left, min(left + W, T, unseen))
        if is_open[:, start:end].any():
            yield number, window, slice(start, end), (share[:, end] - share[:, start]).clamp(min=1)[:, None]


def look_at(model, canvas, prompt, window, block, guidance=0.0, cache=None):
    """look(where) -> logits (N, V) at where (B, block_len), of a block; minus infinity for what is no text.

    It sees the window of the canvas (B, T) as it is when asked. guidance w: (1 + w) times the logits less
    w times those of a canvas whose prompt (B, T) is masked too, so that what the prompt makes likelier
    becomes likelier still (2410.18514). cache: what the model keeps of the window. Its blocks of K before
    this one are final; the first pass over a block reads the one before as well, now that it is written.
    """
    mask_id, K, W, device = model.config.mask_id, model.config.K, model.config.block_size, device_of(model)
    (not_text,) = send(device, torch.tensor([mask_id, *model.config.special_ids]))
    seen, seen_prompt = canvas[:, window], prompt[:, window]  # (B, W)
    inside = slice(block.start - window.start, block.stop - window.start)
    final = max(0, block.start // K * K - window.start)  # where the model's own block begins
    # Asked of all that the window will see, so that a cache keeps its number of rows.
    guidance = guidance if prompt[:, window.start : window.start + W].any() else 0.0

    def look(where):
        if not where.any():
            return torch.zeros(0, model.config.vocab_size, device=device)
        rows = where.any(1) | (cache is not None)  # a cache is of all rows
        text, place = seen[rows], torch.zeros_like(seen_prompt[rows])
        place[:, inside] = where[rows]
        if guidance:
            text = torch.cat((text, text.masked_fill(seen_prompt[rows], mask_id)))
            place = torch.cat((place, place))
        if cache is not None:
            cache.length, cache.final = min(cache.length, final), final
        text, place = send(device, text, place)
        logits = model(text, where=place, cache=cache)
        if guidance:
            logits, unguided = logits.float().chunk(2)
            guided = logits + guidance * (logits - unguided)
            logits = guided.where(logits > -torch.inf, logits)  # what cannot stand there stays so
        return logits.index_fill_(1, not_text, -torch.inf)

    return look


# --- orders: which holes are set next ------------------------------------------------------------
#
# An order scores the holes, and the highest are set. Some do without the logits. The others say how
# sure the model is of a hole, from its distributions p (N, V) alone. Since no score sees a token that is
# drawn, an order that writes each token once, one hole a step, at temperature 1, draws exactly from the
# product of p(x_i | tokens set before it). That joint distribution is the order's own: a network's
# conditionals do not quite agree with each other, so the joints of two orders differ a little.


def rule_of(order, tau=0.9, token_nats=None, revise=0.0):
    """The Rule of one of ORDERS. tau is for `threshold`; token_nats (V,), how much each token says, for
    `information`, which sets what is expected to say the least.
    """
    rule = {
        # MDLM 2406.07524, MD4 2406.04329; they draw the number of each step, too, and so it is binomial
        "random": Rule(blind(lambda lot: lot), evenly, never),
        "left": Rule(blind(lambda lot: -torch.ones_like(lot).cumsum(1)), evenly, never),  # as GPT does
        # MaskGIT 2202.04200 and LLaDA 2502.09992; they score the token that they have drawn
        "confidence": Rule(surest(largest), evenly, never),
        "margin": Rule(surest(margin), evenly, never),  # 2502.06768
        "entropy": Rule(surest(negative_entropy), evenly, never),  # Dream 2508.15487
        "information": Rule(surest(functools.partial(says_least, token_nats)), evenly, never),  # 2211.15029
        "threshold": Rule(surest(largest, tau), as_needed, never),  # Fast-dLLM 2505.22618
        "remask": Rule(blind(lambda lot: lot), at_every_step, all_anew),  # RoBERTa diffusion, Barry 2025
    }[order]
    if revise:  # rewriting has a use for more steps than there are holes
        pace = at_every_step if rule.pace is evenly else rule.pace
        rule = rule._replace(pace=pace, reopen=some_again(revise))
    return rule


def blind(score):
    """Chosen before the model looks, by score(lot) (B, W): only the chosen need logits."""

    def choose(look, candidates, n, lot):
        chosen = highest(score(lot), candidates, n)
        return chosen, look(chosen)

    return choose


def surest(score, tau=math.inf):
    """The n of which the model is surest, and all of which it is as sure as tau, by score(x) (N,) of its
    logits less the largest in each row, x (N, V).
    """

    def score_part(logits):
        x = logits.float()
        return score(x - x.amax(1, keepdim=True))

    def choose(look, candidates, n, lot):
        logits = look(candidates)
        scores = in_parts(score_part, logits).cpu()
        scores = torch.full_like(lot, -torch.inf).masked_scatter(candidates, scores)
        chosen = highest(scores, candidates, torch.maximum(n, (scores >= tau).sum(1, keepdim=True)))
        return chosen, logits[send(logits.device, chosen[candidates])[0]]

    return choose


def largest(x):
    """The probability of the likeliest token, whose x is 0."""
    return 1 / x.exp().sum(1)


def margin(x):
    """That probability less the next."""
    first, second = x.exp().topk(2).values.unbind(1)
    return (first - second) / x.exp().sum(1)


def negative_entropy(x):
    x = x.clamp(min=-1e4)  # 0 log 0 is 0
    return (x.exp() * x).sum(1) / x.exp().sum(1) - x.exp().sum(1).log()


def says_least(token_nats, x):
    """Minus what the token is expected to say."""
    return -(x.exp() * token_nats).sum(1) / x.exp().sum(1)


def highest(scores, candidates, n):
    """The n (B, 1) candidates of each row with the highest scores, (B, W) bool."""
    scores = scores.masked_fill(~candidates, -torch.inf)
    order = scores.argsort(descending=True, stable=True)
    first = torch.arange(scores.shape[1]) < n  # (B, W): of the order
    return candidates & torch.zeros_like(candidates).scatter(1, order, first)


def at_every_step(n_open, n_steps, n_written):
    """After step k of n, k/n of n_open are written, rounded. A row that has had its n steps rests."""
    for step in range(1, n_steps.max().item() + 1):
        yield (n_open * step / n_steps).round().long().minimum(n_open), step <= n_steps


def evenly(n_open, n_steps, n_written):
    """As at_every_step, in no more steps than there are holes: each step sets one at least."""
    return at_every_step(n_open, torch.minimum(n_steps, n_open.clamp(min=1)), n_written)


def as_needed(n_open, n_steps, n_written):
    """One more at each step, at least, until all are written."""
    while (n_written() < n_open).any():
        yield (n_written() + 1).minimum(n_open), n_open > 0


def never(holes, written, lot, n_left):
    """What is written stays."""
    return torch.zeros_like(holes), holes


def all_anew(holes, written, lot, n_left):
    """All become holes again, and may be set at once. The model still sees what was written there."""
    return written, holes | written


def some_again(share):
    """Each becomes a hole again with this probability, n_left at most, to be set in a later step."""

    def reopen(holes, written, lot, n_left):
        return highest(-lot, written & (lot < share), n_left), holes

    return reopen


# --- how a token is drawn ------------------------------------------------------------------------
#
# The draw must be that of the softmax, at a vocabulary of 50,000 too. In float32 it is not: Gumbel noise
# and cumulative sums lose the tail, which lowers the temperature unseen and makes text look better than
# the model is (2409.02908). So sums and random numbers are in float64, a few rows at a time.


def uniforms(seeds, number, W):
    """Yields for each step of block `number`, W positions wide, uniform numbers: two (B, W) float32 in [0, 1]
    for the order, and one (B, W) float64 in (0, 1] for the draw.

    They depend on the row's seed, the block's number, the step and the position alone (Philox, a
    generator that counts), so that a row is written the same in every batch.
    """
    streams = [np.random.Philox(key=seed, counter=[0, 0, 0, number]) for seed in seeds]
    rows = [np.random.Generator(stream) for stream in streams]
    while True:
        noise = torch.from_numpy(np.stack([row.random((W, 3)) for row in rows]))
        lot, again_lot, u = noise.unbind(-1)
        yield lot.float(), again_lot.float(), 1 - u


def read(text, logits, u, where):
    """A way to take: the tokens of text (B, T) at where (B, T), whatever the logits are."""
    return text[where]


class Recorded:
    """A way to take that keeps what the model, guided or not, gave each token when it was set.

    log_p: (B, T) float32, in nats, of the token last set; 0 where none was. Of tokens that were `read`,
    in an order that looks at the model's distributions alone, it sums to the log of the probability with
    which the sampler writes that text at temperature 1 (DUEL 2603.01367).
    """

    def __init__(self, take, canvas):
        self.take, self.log_p = take, torch.zeros(canvas.shape)

    def __call__(self, logits, u, where):
        tokens = self.take(logits, u, where=where).to(logits.device)
        self.log_p[where] = log_p = in_parts(log_probability, logits, tokens).cpu()
        if log_p.isnan().any():
            raise Mistake("the model's logits are not finite; --dtype float32 may help")
        return tokens


def log_probability(logits, tokens):
    """What logits (N, V) give to tokens (N,), in nats, (N,) float32."""
    logits = logits.float()
    return logits.gather(1, tokens[:, None]).squeeze(1) - logits.logsumexp(-1)


def first(sums, x):
    """Where sums (N, V), which rise, first reach x (N, 1): (N, 1); at their end where they are nan."""
    return torch.searchsorted(sums, x).clamp(max=sums.shape[1] - 1)


def draw(logits, u, temperature=1.0, top_k=0, top_p=1.0, where=None):
    """A way to take: one token per row of logits (N, V), the one that u (N,) float64, uniform in (0, 1],
    selects: (N,) int64. top_k: of the k likeliest alone. top_p: of the likeliest, as many as reach that
    share (1904.09751).
    """
    V = logits.shape[1]
    if temperature < 1e-6:
        return logits.argmax(-1)

    logits = logits.cpu() if logits.device.type == "mps" else logits  # mps has no float64
    (u,) = send(logits.device, u)

    def draw_part(logits, u):
        logits = logits.float()
        weights = ((logits - logits.amax(-1, keepdim=True)) / temperature).exp()  # none overflows
        ids = None
        if top_k or top_p < 1:
            weights, ids = weights.topk(min(top_k or V, V))  # largest first
        sums = weights.cumsum(-1, dtype=torch.float64)
        total = sums.gather(1, first(sums, top_p * sums[:, -1:]))
        tokens = first(sums, u[:, None] * total)  # u > 0: never a weight of 0
        return (tokens if ids is None else ids.gather(1, tokens)).squeeze(1)

    return in_parts(draw_part, logits, u)


# --- the command ---------------------------------------------------------------------------------


def negative_log_likelihood(model, tokens, steps=None, **flags):
    """Minus the log of the probability with which the sampler writes tokens (N,) at temperature 1, in nats,
    in windows of block_size that are independent of each other. flags: as denoise has them.
    """
    W = model.config.block_size
    whole, batch_size = len(tokens) // W * W, rows_at_once(32, W, model.config.vocab_size)
    batches = [*tokens[:whole].view(-1, W).split(batch_size), tokens[None, whole:]]
    nats = 0.0
    for x0 in tqdm(batches, unit="batch", leave=False):
        take = Recorded(functools.partial(read, x0), x0)  # (B, W), and a last one that is shorter or empty
        for _ in denoise(model, torch.full_like(x0, model.config.mask_id), steps, take=take, **flags):
            pass
        nats -= take.log_p.double().sum().item()
    return nats


def fit(model, canvas):
    """How well the holes of a canvas (1, T) fit in number: the mean log p, in nats, of the likeliest text for
    them, one token a step, and of up to NEAR tokens on either side, each given all others.
    """
    holes = canvas == model.config.mask_id  # (1, T)
    take = Recorded(functools.partial(draw, temperature=0.0), canvas)
    *_, text = denoise(model, canvas, int(holes.sum()), "confidence", take=take)
    near = F.max_pool1d(holes.float(), 2 * NEAR + 1, 1, NEAR).bool() & ~holes
    near &= torch.isin(canvas, torch.tensor(model.config.special_ids), invert=True)
    each = torch.eye(canvas.shape[1], dtype=torch.bool)[near[0]]  # (n, T)
    known = Recorded(functools.partial(read, text.expand_as(each)), each)
    *_, _ = denoise(model, text.masked_fill(each, model.config.mask_id), take=known)
    return ((take.log_p.sum() + known.log_p.sum()) / (holes.sum() + len(each))).item()


def nats_per_byte(judge, tokenizer, text):
    """Nats per byte of a text under a judge that sets one token a step, the surest first; a GPT, whose blocks
    are one token, goes from the left.
    """
    nats = negative_log_likelihood(judge, torch.tensor(tokenizer.encode(text)), MOST, order="confidence")
    return nats / max(1, tokenizer.n_bytes(text))


def write(model, tokenizer, canvas, seeds, flags, config, watch):
    """Fill a canvas (B, T) as the flags say: (ids, History) of each row, and the seconds that it took,
    without those of showing it. The History is None where none is needed.
    """
    shown = config.watch or config.save is not None
    histories = [History(tokenizer, ids) for ids in canvas.tolist()] if shown else [None] * len(canvas)
    how = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
    take = Recorded(functools.partial(draw, **how), canvas)
    canvases = denoise(model, canvas, seeds=seeds, take=take, **flags)
    seconds, began = 0.0, time.perf_counter()
    for canvas in tqdm(canvases, unit="step", leave=False, disable=config.watch):
        seconds += time.perf_counter() - began
        if shown:
            for history, ids, p in zip(histories, canvas.tolist(), take.log_p.exp().tolist()):
                history.add(ids, p, seconds)
        if watch:
            watch.show(histories[0], len(histories))
        began = time.perf_counter()
    return zip(canvas.tolist(), histories), seconds


class Plan(NamedTuple):
    """What one model writes in one order. choices: the canvases of each prompt, lists of ids, one for every
    length that its holes may have. flags: as denoise has them.
    """

    name: str
    model: torch.nn.Module
    tokenizer: object
    choices: list
    flags: dict


def make_plans(config, given, prompts, loaded):
    """The Plan of each checkpoint and order. prompts: texts; with --chat the messages before each reply."""
    W = min((model.config.block_size for model, _, _ in loaded if not model.config.kinds), default=0)
    all_causal = all(model.config.K == 1 for model, _, _ in loaded)
    by_path, by_order = len(loaded) > 1 or len(config.order) == 1, len(config.order) > 1
    for path, (model, tokenizer, checkpoint) in zip(config.ckpt, loaded):
        if config.chat:
            chat, length = chat_of(path, checkpoint, tokenizer), config.length or reply_length(checkpoint, W)
            choices = [[chat.canvas(messages, length)] for messages in prompts]
        else:
            choices = [make_canvases(text, config.suffix, config.length, tokenizer, W) for text in prompts]
        canvases, token_nats = [ids for each in choices for ids in each], checkpoint.get("token_nats")
        for flags in flags_for(config, given, path, model, token_nats, canvases, all_causal):
            name = ", ".join([path] * by_path + [flags["order"]] * by_order)
            yield Plan(name, model, tokenizer, choices, flags)


class Written(NamedTuple):
    """The texts that a plan of this name made, and what it took."""

    name: str
    tokenizer: object
    texts: list[str]
    histories: list
    summary: str


def write_all(plan, config, watch):
    """Write num_samples texts for each prompt: Written. Of a prompt's canvases the one that fits best is
    filled.
    """
    name, model, tokenizer, choices, flags = plan
    passes, began = [], time.perf_counter()
    hook = model.register_forward_hook(lambda *_: passes.append(1))
    rows, done = [], {}  # rows: (number, ids, seed) of each text
    for canvases in choices:
        best = canvases[-1]
        if len(canvases) > 1:
            best = max(canvases[::-1], key=lambda ids: fit(model, torch.tensor([ids])))
        rows += [(len(rows) + i, best, config.seed + i) for i in range(config.num_samples)]
    seconds = time.perf_counter() - began
    for T in sorted({len(ids) for _, ids, _ in rows}):  # rows of one batch have one length
        numbers, canvas, seeds = zip(*(row for row in rows if len(row[1]) == T))
        canvas = torch.tensor(canvas)  # (B, T)
        written, took = write(model, tokenizer, canvas, seeds, flags, config, watch)
        done |= zip(numbers, written)
        seconds += took
    hook.remove()
    n = sum(ids.count(tokenizer.mask_id) for _, ids, _ in rows)
    summary = f"{n:,} tokens in {seconds:.2f} s: {n / seconds:,.0f} tokens/s, {len(passes)} forward passes"
    ids, histories = zip(*(done[number] for number, _, _ in rows))
    ends = model.config.end_ids
    texts = []
    for new, (_, old, _) in zip(ids, rows):
        start = old.index(tokenizer.mask_id) if config.chat else 0  # the reply alone
        texts.append(tokenizer.decode(shown_of(new, old, tokenizer.mask_id, ends, start)))
    return Written(name, tokenizer, texts, histories, summary)


def score(path, model, tokenizer, flags):
    """Print how likely the text of a file is, by the steps that would write it."""
    if flags["order"] in ("random", "remask"):
        order = flags["order"]
        raise Mistake(f"--score: under --order {order} a text has no one probability; try confidence")
    if tokenizer.bos_id is not None:
        raise Mistake("--score: not of a model whose lines begin with a token of their own")
    text = read_text(path)
    if not text:
        raise Mistake(f"--score {path}: it is empty")
    ids = tokenizer.encode(text)
    if tokenizer.kinds and not (len(ids) == tokenizer.canvas_len and standing(ids, tokenizer) == ids):
        raise Mistake(f"--score {path}: not a whole canvas of the model, of {tokenizer.canvas_len} tokens")
    tokens = torch.tensor(ids)
    nats, n = negative_log_likelihood(model, tokens, **flags), len(tokens)
    bits = nats / math.log(2) / tokenizer.n_bytes(text)
    print(f"{nats / n:.4f} nats per token, {bits:.4f} bits per byte; {n:,} tokens")


def follow(plans, config):
    """What is Written by each of several plans."""
    results = []
    with Watch([plan.name for plan in plans]) if config.watch else nullcontext() as watch:
        for plan in plans:
            results.append(write_all(plan, config, watch))
            if watch:
                watch.next()
    return results


def print_texts(results, config, judge):
    """Print what was Written: texts on stdout, and the rest on stderr."""
    for name, tokenizer, texts, _, summary in results:
        for number, text in enumerate(texts, 1):
            if len(texts) > 1:
                print(f"--- {number} of {len(texts)}", file=sys.stderr, flush=True)
            print(as_shown(text, tokenizer) if sys.stdout.isatty() else text, flush=True)
        if judge:
            judged = ", ".join(f"{nats_per_byte(*judge[:2], text):.3f}" for text in texts)
            summary += f"; under {config.judge} {judged} nats per byte"
        print(f"{name}: {summary}", file=sys.stderr)


def main():
    given = parse(SampleConfig, __doc__.splitlines()[0])
    config = SampleConfig(**given)
    prompts = [*config.prompt, *map(read_text, config.prompt_file)]
    check_writing(config, given, prompts)
    config.ckpt = config.ckpt or [default_checkpoint()]
    device = pick_device(config.device)
    keep = getattr(torch, config.dtype, None)  # what is given; a model of it may be larger than memory is
    loaded = [load_checkpoint(path, device, keep) for path in config.ckpt]
    judge = None if config.judge is None else load_checkpoint(config.judge, device, keep)
    if judge and judge[1].bos_id is not None:
        raise Mistake(f"--judge {config.judge}: not a model whose lines begin with a token of their own")
    if judge and any(tokenizer.kinds != judge[1].kinds for _, tokenizer, _ in loaded):
        raise Mistake(f"--judge {config.judge}: its canvas is not of the kinds that are written")
    rounds = []  # one, or as many as a conversation has

    def answer(prompts):
        rounds.append(follow(list(make_plans(config, given, prompts, loaded)), config))
        print_texts(rounds[-1], config, judge)
        return rounds[-1][0].texts[0]

    with torch.no_grad(), autocast(device, config.dtype):
        if config.score is not None:
            (plan,) = make_plans(config, given, [""], loaded)
            return score(config.score, plan.model, plan.tokenizer, plan.flags)
        try:
            if not config.chat:
                answer(prompts or [""])
            elif prompts:
                answer([[{"role": "user", "content": text}] for text in prompts])
            else:
                (path,), ((_, tokenizer, checkpoint),) = config.ckpt, loaded
                converse(chat_of(path, checkpoint, tokenizer), lambda messages: answer([messages]))
        finally:  # a conversation may end in a mistake
            if config.save is not None and rounds:
                texts = [text for results in rounds for text in zip(*(each.histories for each in results))]
                save_histories(config.save, texts, [result.name for result in rounds[0]])


if __name__ == "__main__":
    command(main)
