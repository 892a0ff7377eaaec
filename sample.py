"""Write text by denoising: start from a canvas of `<mask>`, propose a token for every hole, set some.

    canvas = prompt + <mask> ... <mask>
    repeat: logits = model(canvas); propose a token for every hole; choose which to set

An autoregressive model calls `.append(token)`; this one calls `.setitem(i, token)`. An order is the
rule that chooses where, and `denoise` is the loop they share.

    python sample.py --prompt "def "
    python sample.py --prompt "def <mask*8>(self):" --order confidence
"""

import os
import re
import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch
from tqdm import tqdm

from data.flags import Mistake, command, flag, parse
from model import autocast, load_checkpoint, pick_device

ORDERS = "random", "remask", "confidence", "threshold"


@dataclass
class SampleConfig:
    ckpt: str = flag("out/ckpt.pt", "checkpoint to sample from")
    prompt: str = flag("", "text to start from; <mask> is a hole in it and <mask*8> are eight")
    length: int | None = flag(
        None, "tokens of the canvas (block_size; a prompt with holes: its own)", least=1
    )
    steps: int = flag(128, "denoising steps; threshold takes as many as it needs", least=1)
    order: Literal[ORDERS] = flag("random", "what is set first")
    tau: float = flag(0.9, "threshold: set every token as probable as this", least=0, most=1)
    temperature: float = flag(0.7, "divides the logits; 0 takes the likeliest token", least=0, most=1e6)
    top_k: int = flag(0, "draw from the k likeliest tokens; 0 for all", least=0)
    top_p: float = flag(1.0, "draw from the likeliest that together reach this", above=0, most=1)
    num_samples: int = flag(1, "texts to write, as one batch", least=1)
    seed: int = flag(0, "the same seed writes the same text", least=0, most=2**32)
    device: str = flag("auto", "auto (cuda, then mps, then cpu) or a device's name")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag("auto", "of the matrix products")


# --- proposing tokens ----------------------------------------------------------------------------


def drop_tail(probabilities, top_p):
    """probabilities (N, K), largest first, without those behind a sum of top_p (1904.09751)."""
    before = probabilities.cumsum(-1) - probabilities  # mass of the tokens ahead of each
    return probabilities.masked_fill(before >= top_p, 0)


def draw(logits, temperature, top_k, top_p, generator):
    """One token per row of logits (N, V): (N,) int64.

    By inversion of the cumulative distribution in float64: a float32 draw, by Gumbel noise above
    all, would truncate the tail and so lower the temperature unseen (2409.02908).
    """
    if temperature < 1e-6:
        return logits.argmax(-1)
    u = 1 - torch.rand(len(logits), 1, generator=generator, dtype=torch.float64)  # in (0, 1]
    tokens = []
    rows = max(1, 2**24 // logits.shape[1])  # bounds the memory of the float64 sums
    for part, u in zip(logits.split(rows), u.split(rows)):
        index = None
        if part.device.type == "mps":  # it has no float64
            part = part.cpu()
        if top_k or top_p < 1:  # largest first
            part, index = part.topk(min(top_k or part.shape[1], part.shape[1]))
        part = part.float()
        part = (part - part.amax(-1, keepdim=True)) / temperature  # no overflow at any temperature
        probabilities = part.softmax(-1)
        if top_p < 1:
            probabilities = drop_tail(probabilities, top_p)
        cumulative = probabilities.cumsum(-1, dtype=torch.float64)
        # The first token whose cumulative probability reaches u; one of probability 0 never is.
        place = torch.searchsorted(cumulative, u.to(cumulative.device) * cumulative[:, -1:])  # (n, 1)
        tokens.append(place if index is None else index.gather(1, place))
    return torch.cat(tokens).squeeze(1).to(logits.device)


# --- orders: which of the candidates are set next ------------------------------------------------


def highest(scores, candidates, n):
    """The n (B, 1) candidates of each row with the highest scores, (B, T) bool."""
    ranks = scores.masked_fill(~candidates, -torch.inf).argsort(descending=True).argsort()
    return candidates & (ranks < n)


def confidence(holes, logits, tokens):
    """The probability of each hole's proposed token, (B, T); 0 elsewhere."""
    chosen = logits.float().gather(-1, tokens[:, None]).squeeze(-1)
    probabilities = (chosen - logits.float().logsumexp(-1)).exp()  # (N,)
    return torch.zeros(holes.shape, device=holes.device).masked_scatter(holes, probabilities)


@torch.no_grad()
def denoise(
    model, canvas, steps, order="random", temperature=1.0, top_k=0, top_p=1.0, generator=None, tau=0.9
):
    """Fill the holes of canvas (B, T) int64 in `steps` steps; yields the canvas after each.

    The holes are where canvas is `model.config.mask_id`; all other tokens are prompt and stay. After
    step k of n, round(k/n) of each row's holes are set, so the last canvas has none. The order says
    which:

    random: any, each as likely as the next; ancestral sampling (MDLM 2406.07524, MD4 2406.04329).
    remask: a share k/n of all open positions, drawn anew at every step, and the rest holes again, so
        that early mistakes are written over (RoBERTa diffusion, Barry 2025).
    confidence: those whose token is the likeliest (MaskGIT 2202.04200, LLaDA 2502.09992).
    threshold: all whose token has probability tau or more, and at least one; it takes as many steps
        as it needs, whatever `steps` says (Fast-dLLM 2505.22618).

    generator: a torch.Generator on the CPU.
    """
    mask_id = model.config.mask_id
    special_ids = torch.tensor(model.config.special_ids, dtype=torch.int64, device=canvas.device)
    open_positions = canvas == mask_id  # (B, T)
    n_open = open_positions.sum(1, keepdim=True)  # (B, 1)
    if order == "threshold":
        steps = n_open.max().item()
    for step in range(1, steps + 1):
        holes = canvas == mask_id
        candidates = open_positions if order == "remask" else holes
        n_set = (n_open * step / steps).round().long() - (n_open - candidates.sum(1, keepdim=True))  # (B, 1)
        if order == "threshold":
            n_set = n_set.clamp(min=1)
        if (n_set > 0).any():  # with more steps than holes, some steps set nothing
            where = holes
            if order in ("random", "remask"):  # chosen before anything is drawn: no others need logits
                scores = torch.rand(canvas.shape, generator=generator).to(canvas.device)
                where = chosen = highest(scores, candidates, n_set)
            logits = model(canvas, where=where)  # (N, V)
            logits[:, special_ids] = -torch.inf
            tokens = draw(logits, temperature, top_k, top_p, generator)  # (N,)
            if order in ("confidence", "threshold"):
                scores = confidence(holes, logits, tokens)
                chosen = highest(scores, candidates, n_set)
            if order == "threshold":
                chosen |= holes & (scores >= tau)
            proposal = canvas.masked_scatter(where, tokens)
            canvas = torch.where(chosen, proposal, canvas.masked_fill(candidates, mask_id))
        yield canvas
        if order == "threshold" and not (canvas == mask_id).any():
            return


# --- the command ---------------------------------------------------------------------------------


def read_prompt(prompt, tokenizer, limit):
    """Token ids of a prompt in which `<mask>` and `<mask*N>` are holes; Mistake if more than limit."""
    ids, end = [], 0
    for hole in re.finditer(r"<mask(?:\*(\d{1,9}))?>", prompt):
        ids += tokenizer.encode(prompt[end : hole.start()])
        ids += [tokenizer.mask_id] * min(int(hole[1] or 1), limit + 1)
        end = hole.end()
    ids += tokenizer.encode(prompt[end:])
    if len(ids) > limit:
        raise Mistake(f"--prompt: it is longer than the canvas of {limit} tokens")
    return ids


def make_canvas(prompt, length, tokenizer, block_size):
    """The (1, T) canvas of a prompt: its tokens, and holes behind them up to `length` tokens.

    Without a length, block_size; a prompt that has holes is then the whole canvas. Where lines begin
    and end with tokens of their own, as RoBERTa's do, the canvas begins with one; a whole one ends so.
    """
    if (length or 0) > block_size:
        raise Mistake(f"--length {length}: the canvas of this model has at most {block_size} tokens")
    limit = length or block_size
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    ids = begin + read_prompt(prompt, tokenizer, limit - len(begin))
    if length is None and tokenizer.mask_id in ids:
        end = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
        return torch.tensor([(ids + end)[:limit]])
    return torch.tensor([ids + [tokenizer.mask_id] * (limit - len(ids))])


def main():
    config = SampleConfig(**parse(SampleConfig, __doc__.splitlines()[0]))
    if config.ckpt == SampleConfig.ckpt and not os.path.exists(config.ckpt):
        raise Mistake(f"{config.ckpt}: there is no checkpoint yet; `python train.py` makes one")
    if re.search("[\ud800-\udfff]", config.prompt):  # what Python makes of bytes that are no text
        raise Mistake("--prompt: it is not UTF-8")
    device = pick_device(config.device)
    model, tokenizer, _ = load_checkpoint(config.ckpt, device)
    canvas = make_canvas(config.prompt, config.length, tokenizer, model.config.block_size)
    canvas = canvas.repeat(config.num_samples, 1).to(device)  # (B, T)
    written = (canvas == tokenizer.mask_id).sum().item()
    generator = torch.Generator().manual_seed(config.seed)

    start = time.perf_counter()
    with autocast(device, config.dtype):
        canvases = denoise(
            model, canvas, config.steps, config.order,
            config.temperature, config.top_k, config.top_p, generator, config.tau,
        )  # fmt: skip
        total = None if config.order == "threshold" else config.steps
        for canvas in tqdm(canvases, total=total, unit="step", leave=False):
            pass
    texts = [tokenizer.decode(row) for row in canvas.tolist()]  # waits for the device
    seconds = time.perf_counter() - start
    for i, text in enumerate(texts, 1):
        if len(texts) > 1:
            print(f"--- {i} of {len(texts)}", file=sys.stderr, flush=True)
        print(text, flush=True)
    print(f"{written} tokens in {seconds:.2f} s: {written / seconds:,.0f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    command(main)
