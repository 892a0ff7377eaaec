"""Write text by denoising: start from a canvas full of `<mask>`, set some of its tokens, look again, set more.

An autoregressive model calls `.append(token)` on its text. This one calls `.setitem(i, token)` on its canvas.

    python sample.py --prompt "Once upon a time" --watch
    python sample.py --prompt "The king <mask*3> a golden <mask>." --order confidence
    python sample.py --length 2000 --order entropy --save run.html
    python sample.py --race --ckpt out-gpt/ckpt.pt out/ckpt.pt --prompt "def "    # a GPT beside it
    python sample.py --ckpt out-sums/ckpt.pt --chat    # a conversation on stdin
"""

import functools
import itertools
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data.lib.ahead import Ahead, gumbel_noise
from data.lib.errors import Mistake, command
from data.lib.flags import Dtype, flag, parse
from data.lib.kernels import in_parts, rows_at_once
from data.lib.live import serve
from data.lib.machine import send
from data.lib.session import Session
from data.lib.window import blocks
from model import load_checkpoint


@dataclass
class SampleConfig:
    groups = {  # --help starts a section at each of these flags
        "ckpt": "what to write",
        "steps": "how to write it",
        "num_samples": "how many, and where to",
        "device": "machine",
    }
    ckpt: list[str] = flag((), "one or more checkpoints (the included model: data/fairytales/canvas.pt)")
    prompt: list[str] = flag((), "one or more texts to start from; <mask> is a hole, <mask*8> is eight")
    prompt_file: list[str] = flag((), "the same from files; - is stdin")
    suffix: str = flag("", "text after the holes")
    chat: bool = flag(False, "treat prompts, or lines of stdin, as messages; print only the replies")
    length: int | None = flag(
        None, "tokens of the canvas (the prompt's if it has holes, else context)", least=1, most=10**6
    )
    steps: int | None = flag(None, "denoising steps (the larger of 128 and half the holes)", least=1, most=10**6)
    order: list[
        Literal["random", "left", "confidence", "margin", "entropy", "threshold", "entropy-bound", "remask", "draft"]
    ] = flag(("random",), "which holes are set first; several orders are compared")
    tau: float = flag(0.9, "threshold: set every hole that is at least this confident", least=0, most=1)
    gamma: float = flag(0.5, "entropy-bound: limit of the summed entropy, in nats", least=0)
    draft_len: int | None = flag(None, "draft: tokens drafted in each pass (as in training)", least=1, most=64)
    block: int | None = flag(None, "fill the canvas from left to right in blocks of this many tokens", least=1)
    guidance: float = flag(0.0, "strength of classifier-free guidance by the prompt", least=0, most=1e3)
    temperature: float = flag(0.7, "divides the logits; 0 takes the most likely token", least=0, most=1e6)
    top_k: int = flag(0, "draw from the k most likely tokens; 0 for all", least=0)
    top_p: float = flag(1.0, "draw from the most likely tokens with this total probability", above=0, most=1)
    num_samples: int = flag(1, "texts for each prompt, with successive seeds", least=1, most=10_000)
    seed: int = flag(0, "the same seed writes the same text", least=0, most=2**32)
    judge: str | None = flag(None, "checkpoint that says how likely each text is, in nats per byte")
    score: str | None = flag(None, "print a file's likelihood under this order and steps; - is stdin")
    watch: bool = flag(False, "show the canvas while it fills, in a terminal")
    race: bool = flag(False, "watch the included models append, draft and set, side by side, each at its own speed")
    page: bool = flag(False, "serve a page on this machine, where you type, watch and set tokens by hand")
    save: str | None = flag(None, "save how texts filled, as a page (run.html), or the first as an animation (run.svg)")
    overwrite: bool = flag(False, "let --save replace a file")
    device: str = flag("auto", "auto (cuda, then mps, then cpu) or a device's name")
    dtype: Dtype = flag("auto", "precision of matrix products; weights stored in it stay as they are")


# --- the loop ------------------------------------------------------------------------------------


def fill(canvas, n_steps, look, take, draws, mask_id, score, count):
    """Fill the holes of canvas (B, K), in place, in n_steps (B, 1) unless `count` sets the pace; yield after each.

    look(where) -> logits (N, V), the model's prediction. take(logits, rows, u, where) -> tokens for `where` (B, K)
    from logits[rows], rows (N,); both are bool. draws: `uniforms`. score: a value of ORDERS. count: `how_many`.
    """
    n_holes = (canvas == mask_id).sum(1, keepdim=True)  # (B, 1)
    n_steps = n_steps.minimum(n_holes.clamp(min=1))  # no step without a token
    for step in itertools.count(1):
        holes = canvas == mask_id  # (B, K)
        if not holes.any():
            return
        noise, u = next(draws)
        n = due(step, n_steps, n_holes) - (n_holes - holes.sum(1, keepdim=True))  # due by now, less those set
        asked = shortlist(score, holes, n, noise)
        logits = look(asked)  # (N, V)
        scores = score_holes(score, logits, asked, noise)  # (B, K)
        chosen = highest(scores, asked, count(scores, n))
        canvas[chosen] = take(logits, chosen[asked], u, chosen)  # .setitem
        yield


def rewrite(canvas, n_steps, look, take, draws, mask_id):
    """Order `remask`: each step draws new tokens for a growing random share of the places, and masks all others.

    The model sees the tokens that it replaces (nathan.rs/posts/roberta-diffusion).
    """
    is_open = canvas == mask_id  # (B, K)
    n_open = is_open.sum(1, keepdim=True)
    for step in range(1, n_steps.max() + 1):
        noise, u = next(draws)
        going = is_open & (step <= n_steps)
        chosen = highest(noise, going, due(step, n_steps, n_open))
        tokens = take(look(chosen), chosen[chosen], u, chosen)  # all True: every row of the logits
        canvas[going] = mask_id
        canvas[chosen] = tokens
        yield


def append(canvas, text, n, ahead, draw_at, mask_id):
    """Write a GPT's canvas (B, T) from left to right, in place; yield `ends` (B,), before which it is certain.

    A pass reads the drafts of the pass before, and so verifies them: they are right up to the first that is not what
    the GPT draws there. Then it drafts more (order `draft`, after TiDAR, 2511.08923), or nothing (order `left`).

    text (B, more than T): the canvas, or a known text to verify, then masks. n: places read in a pass. ahead: an Ahead.
    draw_at(logits (B, n, V), places (B, n)) -> tokens, by a noise that each place keeps.
    """
    T, near = canvas.shape[1], torch.arange(n)
    ends = F.pad(canvas == mask_id, (0, 1), value=True).int().argmax(1)
    while (ends < T).any():
        places = ends[:, None] + near  # (B, n)
        logits, most = ahead.look(text, ends)  # (B, n, V), (B,)
        drafts, drawn = text.gather(1, places), draw_at(logits, places)
        n_right = 1 + (drawn == drafts)[:, :-1].cumprod(1).sum(1, keepdim=True)  # the right drafts, and one more token
        text.scatter_(1, places, drawn.where(near < n_right, mask_id))  # .append
        kept = n_right.squeeze(1).minimum(most)
        ends, last = ends + kept, (kept - 1).clamp(min=0)
        for i, guess in enumerate(ahead.guesses(last)):  # draft the next, each after those before it
            place = ends[:, None] + i
            text.scatter_(1, place, draw_at(guess(text, place), place))
        canvas[:] = text[:, :T]
        yield ends


def due(step, n_steps, n_holes):
    """How many of the holes are set after a step, (B, 1): the fraction step/n_steps, rounded."""
    return (n_holes * step / n_steps).round().long().minimum(n_holes)


@torch.no_grad()
def denoise(
    model, canvas, steps=None, order="random", temperature=1.0, top_k=0, top_p=1.0, *, seeds=None,
    tau=0.9, gamma=0.5, block=None, guidance=0.0, draft_len=None, text=None, log_p=None, drafts=None,
):  # fmt: skip
    """Fill the holes of canvas (B, T) int64, on any device, in `steps` steps; yield the canvas after each.

    A hole is where canvas is `model.config.mask_id`; all other tokens are prompt, and stay. After step k of n, k/n of
    each row's holes are set, unless the order sets its own pace. steps: as --steps by default.

    order: a key of ORDERS, or "remask". tau, gamma: see `how_many`. A GPT writes from left to right whatever the order.
        If it was trained to draft, it drafts draft_len tokens a pass (default: as in training), but not by "left".
    block: fill the canvas from left to right in blocks of K tokens, which share the steps (semi-autoregressive,
        2502.09992). Default: the model's own blocks; else the whole canvas if it fits the context; else quarters of
        the context, in a sliding window. ValueError if K does not divide the model's blocks.
    guidance: strength of classifier-free guidance by the prompt (2410.18514). seeds: one for each row (0, 1, ..).
    text (B, T), on the CPU: set the tokens of this text instead of drawing them. A GPT verifies them as drafts.
    log_p (B, T) float32, on the CPU: receives the log probability of each token set, at temperature 1, in nats.
    drafts (B, T) bool, on the CPU: receives which tokens are drafts, which the next pass may replace.
    """
    device, canvas = canvas.device, canvas.to("cpu", copy=True)
    seeds = range(len(canvas)) if seeds is None else seeds
    if not (canvas == model.config.mask_id).any():
        yield canvas.to(device)
    if model.config.is_gpt:
        can_draft = model.config.draft_len and order != "left" and text is None
        K = (draft_len or model.config.draft_len) if can_draft else 0
        how = functools.partial(draw_with_noise, temperature=temperature, top_k=top_k, top_p=top_p)
        for _ in append_or_draft(model, canvas, K, how, seeds, text, log_p, drafts):
            yield canvas.to(device, copy=True)
        return
    count = functools.partial(how_many, order=order, tau=tau, gamma=gamma)
    loop = rewrite if order == "remask" else functools.partial(fill, score=ORDERS[order], count=count)
    # part is a slice; look sees the canvas as it stands.
    for number, part, n_steps, look in blocks(model, canvas, steps, block, guidance):

        def take(logits, rows, u, where, part=part):
            (rows,) = send(logits.device, rows)
            logits = logits[rows]
            if text is None:
                tokens = draw(logits, u[where], temperature, top_k, top_p).to(logits.device)
            else:
                (tokens,) = send(logits.device, text[:, part][where])
            if log_p is not None:
                log_p[:, part][where] = log_probability(logits, tokens)
            return tokens.cpu()

        draws = uniforms(seeds, number, part.stop - part.start)
        for _ in loop(canvas[:, part], n_steps, look, take, draws, model.config.mask_id):  # writes into the view
            yield canvas.to(device, copy=True)


def append_or_draft(model, canvas, K, draw, seeds, text, log_p, drafts):
    """`denoise` for a GPT: write its canvas (B, T) in place; yield after each pass. draw: like `draw_with_noise`."""
    T, is_hole, mask_id = canvas.shape[1], canvas == model.config.mask_id, model.config.mask_id
    n = K + 1 if text is None else 64  # a known text is itself a draft, and is verified 64 tokens at a time
    noise = gumbel_noise(seeds, K, model.config.vocab_size)
    given = F.pad(canvas if text is None else text.where(is_hole, canvas), (0, K + n), value=mask_id)
    nats = torch.zeros(given.shape)

    def draw_at(logits, places):
        tokens = given.gather(1, places)
        if text is None:
            tokens = draw(logits, noise(places)).cpu().where(tokens == mask_id, tokens)
        if log_p is not None:
            (sent,) = send(logits.device, tokens.flatten())
            nats.scatter_(1, places, log_probability(logits.flatten(0, 1), sent).view(places.shape))
        return tokens

    for ends in append(canvas, given.clone(), n, Ahead(model, *canvas.shape, K, n), draw_at, mask_id):
        if log_p is not None:
            log_p[is_hole] = nats[:, :T][is_hole]
        if drafts is not None:
            drafts[:] = is_hole & (canvas != mask_id) & (torch.arange(T) >= ends[:, None])
        yield


# --- orders: which holes are set next ------------------------------------------------------------
#
# An order is a score, and the holes with the highest scores are set. Scores never depend on the token that is drawn.
# So with one hole per step, at temperature 1, an order draws exactly from the product of p(x_i | tokens set before).
# These joint distributions differ a little between orders, because a network's conditionals don't quite agree.


def random(logits, noise, place):
    """MDLM 2406.07524, MD4 2406.04329; there the number of holes to set is random, too."""
    return noise


def left(logits, noise, place):
    return -place.float()


def confidence(logits, noise, place):
    """Top-1 probability; MaskGIT 2202.04200 and LLaDA 2502.09992 use the drawn token's."""
    return logits.softmax(-1).amax(-1)


def margin(logits, noise, place):
    """Top-1 minus top-2 probability (2502.06768)."""
    top = logits.softmax(-1).topk(2).values
    return top[:, 0] - top[:, 1]


def negative_entropy(logits, noise, place):
    """Dream, 2508.15487."""
    return -torch.special.entr(logits.softmax(-1)).sum(-1)


ORDERS = {
    "random": random,
    "left": left,
    "confidence": confidence,
    "margin": margin,
    "entropy": negative_entropy,
    "threshold": confidence,
    "entropy-bound": negative_entropy,
}


def how_many(scores, n, order, tau, gamma):
    """How many holes a step sets, (B, 1), given their scores (B, K): n, except for two orders, which set at least one.

    threshold: every hole with a confidence of at least tau (Fast-dLLM, 2505.22618).
    entropy-bound: the most certain holes, as long as their entropies, excluding the largest, sum to at most gamma
    nats (EB-Sampler, 2505.24857).
    """
    if order == "threshold":
        return (scores >= tau).sum(1, keepdim=True).clamp(min=1)
    if order == "entropy-bound":
        entropy = -scores.sort(1, descending=True).values  # lowest first; infinite where there is no hole
        return 1 + (entropy[:, :-1].cumsum(1) <= gamma).sum(1, keepdim=True)
    return n


def shortlist(score, holes, n, noise):
    """The holes to ask the model about: all, or only those to set, if the order chooses without looking."""
    if score in (random, left):
        return highest(score(None, noise, torch.arange(holes.shape[1]).expand(holes.shape)), holes, n)
    return holes


def score_holes(score, logits, holes, noise):
    """Scores (B, K) of the N `holes`, with logits (N, V); minus infinity elsewhere."""
    place = torch.arange(holes.shape[1]).expand(holes.shape)
    scores = in_parts(lambda logits, *more: score(logits.float(), *more), logits, noise[holes], place[holes])
    return torch.full_like(noise, -torch.inf).masked_scatter(holes, scores.cpu())


def highest(scores, among, n):
    """Mark the n (B, 1) highest-scoring positions of each row, among those in `among` (B, K): (B, K) bool."""
    ranking = scores.masked_fill(~among, -torch.inf).argsort(descending=True, stable=True)
    return among & torch.zeros_like(among).scatter(1, ranking, torch.arange(scores.shape[1]) < n)


# --- how a token is drawn ------------------------------------------------------------------------
#
# Draws must follow the softmax, even with 50,000 tokens. In float32, Gumbel noise and cumulative sums lose the
# tail of the distribution. That silently lowers the temperature and flatters the model (2409.02908). So sums and random
# numbers are float64, a few rows at a time.


def uniforms(seeds, number, K):
    """Yield the random numbers of each step in block `number`, K positions wide, as two tensors (B, K).

    Those for the order are float32 in [0, 1), those for the draw float64 in (0, 1]. They depend only on the row's seed,
    the block, the step and the position, whatever batch the row is in.
    """
    streams = [np.random.Philox(key=seed, counter=[0, 0, 0, number]) for seed in seeds]
    rows = [np.random.Generator(stream) for stream in streams]
    while True:
        noise, u = torch.from_numpy(np.stack([row.random((K, 2)) for row in rows])).unbind(-1)
        yield noise.float(), 1 - u


def first_reaching(sums, x):
    """Index at which each row of rising sums (N, V) first reaches x (N, 1): (N, 1). The last one if they are nan."""
    return torch.searchsorted(sums, x).clamp(max=sums.shape[-1] - 1)


def weigh(logits, temperature, top_k=0, top_p=1.0):
    """Weights of the tokens that may be drawn from logits (.., V), and these tokens, or None if it's all.

    top_k: only the k most likely. top_p: only the most likely that add up to it (1904.09751); others weigh 0.
    """
    logits = logits.float()
    weights, ids = ((logits - logits.amax(-1, keepdim=True)) / temperature).exp(), None  # none overflows
    if top_k or top_p < 1:
        weights, ids = weights.topk(min(top_k or logits.shape[-1], logits.shape[-1]))  # largest first
        sums = weights.cumsum(-1, dtype=torch.float64)
        last = first_reaching(sums, top_p * sums[..., -1:])
        weights = weights.masked_fill(torch.arange(weights.shape[-1], device=weights.device) > last, 0)
    return weights, ids


def draw(logits, u, temperature=1.0, top_k=0, top_p=1.0):
    """Draw a token from each row of logits (N, V), selected by u (N,), uniform in (0, 1]: (N,). See `weigh`."""
    if temperature < 1e-6:
        return logits.argmax(-1)
    logits = logits.cpu() if logits.device.type == "mps" else logits  # mps has no float64
    (u,) = send(logits.device, u)

    def draw_part(logits, u):
        weights, ids = weigh(logits, temperature, top_k, top_p)
        sums = weights.cumsum(-1, dtype=torch.float64)
        tokens = first_reaching(sums, u[:, None] * sums[:, -1:])  # u > 0, so a weight of 0 is never drawn
        return (tokens if ids is None else ids.gather(1, tokens)).squeeze(1)

    return in_parts(draw_part, logits, u)


def draw_with_noise(logits, gumbel, temperature=1.0, top_k=0, top_p=1.0):
    """Draw tokens (..) from logits (.., V): the highest after adding Gumbel noise (.., V), float64, from the CPU.

    From two similar distributions the same noise mostly draws the same token (2408.07978), so drafts come true.
    """
    if temperature < 1e-6:
        return logits.argmax(-1)
    logits = logits.cpu() if logits.device.type == "mps" else logits  # mps has no float64
    (gumbel,) = send(logits.device, gumbel)
    if not top_k and top_p == 1:
        return (logits.double() / temperature + gumbel).argmax(-1)
    weights, ids = weigh(logits, temperature, top_k, top_p)
    return ids.gather(-1, (weights.double().log() + gumbel.gather(-1, ids)).argmax(-1, keepdim=True)).squeeze(-1)


# --- likelihood ----------------------------------------------------------------------------------


def log_probability(logits, tokens):
    """Log probability of tokens (N,) under logits (N, V), in nats, (N,) on the CPU. Mistake if it is nan."""
    log_p = in_parts(lambda x, y: x.float().log_softmax(-1).gather(1, y[:, None]).squeeze(1), logits, tokens).cpu()
    if log_p.isnan().any():
        raise Mistake("the model's logits are not finite; --dtype float32 may help")
    return log_p


def log_likelihood(model, tokens, steps=None, **flags):
    """Log of the probability that `denoise` with these flags writes tokens (N,) at temperature 1, in nats.

    It is exact for orders without random numbers (DUEL, 2603.01367); for others it is that of one draw of the order.
    The text is cut into independent windows of the model's context.
    """
    context, nats = model.config.context, 0.0
    whole, batch_size = len(tokens) // context * context, rows_at_once(32, context, model.config.vocab_size)
    batches = [*tokens[:whole].view(-1, context).split(batch_size), tokens[None, whole:]]
    for x0 in tqdm(batches, unit="batch", leave=False):
        log_p = torch.zeros(x0.shape)  # (B, context); the last one is shorter, or empty
        for _ in denoise(model, torch.full_like(x0, model.config.mask_id), steps, text=x0, log_p=log_p, **flags):
            pass
        nats += log_p.double().sum().item()
    return nats


# --- the command ---------------------------------------------------------------------------------


def main():
    given = parse(SampleConfig, __doc__)
    session = Session(SampleConfig(**given), given, load_checkpoint, denoise, log_likelihood)
    serve(session) if session.config.page else session.run()  # turns prompts into canvases


if __name__ == "__main__":
    command(main)
