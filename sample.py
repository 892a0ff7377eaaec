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


@dataclass
class SampleConfig:
    ckpt: str = flag("out/ckpt.pt", "checkpoint to sample from")
    prompt: str = flag("", "text to start from; <mask> is a hole in it and <mask*8> are eight")
    length: int | None = flag(
        None, "tokens of the canvas (block_size; a prompt with holes: its own)", least=1
    )
    steps: int = flag(128, "denoising steps", least=1)
    order: Literal["random", "confidence", "remask"] = flag("random", "which holes are set first")
    temperature: float = flag(0.7, "divides the logits; 0 takes the likeliest token", least=0, most=1e6)
    top_k: int = flag(0, "draw from the k likeliest tokens; 0 for all", least=0)
    top_p: float = flag(1.0, "draw from the likeliest that together reach this", above=0, most=1)
    num_samples: int = flag(1, "texts to write, as one batch", least=1)
    seed: int = flag(0, "the same seed writes the same text", least=0, most=2**32)
    device: str = flag("auto", "auto (cuda, then mps, then cpu) or a device's name")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag("auto", "of the matrix products")


# --- proposing tokens ----------------------------------------------------------------------------


def keep_top_k(logits, k):
    """logits (N, V) with all below the k-th largest of each row at minus infinity."""
    smallest = logits.topk(min(k, logits.shape[-1])).values[:, -1:]  # (N, 1)
    return logits.masked_fill(logits < smallest, -torch.inf)


def keep_top_p(logits, p):
    """logits (N, V) with only the likeliest tokens that together reach probability p (1904.09751)."""
    ordered, index = logits.sort(descending=True)
    probabilities = ordered.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # mass of the tokens ahead of each
    return logits.scatter(-1, index, ordered.masked_fill(before >= p, -torch.inf))


def draw(logits, temperature, top_k, top_p, generator):
    """One token per row of logits (N, V): (N,) int64.

    By inversion of the cumulative distribution in float64: a float32 draw, by Gumbel noise above
    all, would truncate the tail and so lower the temperature unseen (2409.02908).
    """
    if temperature < 1e-6:
        return logits.argmax(-1)
    device = logits.device
    if device.type == "mps":  # it has no float64
        logits = logits.cpu()
    logits = (logits - logits.amax(-1, keepdim=True)) / temperature  # no overflow at any temperature
    if top_k:
        logits = keep_top_k(logits, top_k)
    if top_p < 1:
        logits = keep_top_p(logits, top_p)
    cumulative = logits.softmax(-1).cumsum(-1, dtype=torch.float64)  # (N, V)
    u = 1 - torch.rand(len(logits), 1, generator=generator, dtype=torch.float64)  # in (0, 1]
    # The first token whose cumulative probability reaches u; one of probability 0 never is.
    return torch.searchsorted(cumulative, u.to(cumulative.device) * cumulative[:, -1:]).squeeze(-1).to(device)


# --- orders: a score for every position, the highest are set -------------------------------------


def random_order(holes, logits, tokens, generator):
    """Any position as likely as the next: ancestral sampling (MDLM 2406.07524, MD4 2406.04329)."""
    return torch.rand(holes.shape, generator=generator).to(holes.device)  # (B, T)


def confidence_order(holes, logits, tokens, generator):
    """The proposed token's probability, highest first (MaskGIT 2202.04200, LLaDA 2502.09992)."""
    probabilities = logits.softmax(-1).gather(-1, tokens[:, None]).squeeze(-1)  # (N,)
    return torch.zeros(holes.shape, device=holes.device).masked_scatter(holes, probabilities)  # (B, T)


# `remask` chooses as `random` does, but among all open positions, so that written ones are holes again.
ORDERS = {"random": random_order, "remask": random_order, "confidence": confidence_order}


@torch.no_grad()
def denoise(model, canvas, steps, order="random", temperature=1.0, top_k=0, top_p=1.0, generator=None):
    """Fill the holes of canvas (B, T) int64 in `steps` steps; yields the canvas after each.

    The holes are where canvas is `model.config.mask_id`; all other tokens are prompt and stay. After
    step k of n, round(k/n) of each row's holes are set, so the last canvas has none. With the order
    "remask" every step fills all holes and masks a random share of the whole text again, at rates
    (n-1)/n .. 0, so that early mistakes are written over (RoBERTa diffusion, Barry 2025).
    generator: a torch.Generator on the CPU.
    """
    mask_id = model.config.mask_id
    open_positions = canvas == mask_id  # (B, T)
    n_open = open_positions.sum(1, keepdim=True)  # (B, 1)
    for step in range(1, steps + 1):
        holes = canvas == mask_id
        candidates = open_positions if order == "remask" else holes
        n_kept = n_open - candidates.sum(1, keepdim=True)
        n_set = (n_open * step / steps).round().long() - n_kept  # (B, 1)
        if holes.any() and (n_set > 0).any():  # with more steps than holes, some steps set nothing
            logits = model(canvas, where=holes)  # (N, V)
            tokens = draw(logits, temperature, top_k, top_p, generator)  # (N,)
            scores = ORDERS[order](holes, logits, tokens, generator).masked_fill(~candidates, -torch.inf)
            ranks = scores.argsort(descending=True).argsort()  # (B, T), 0 for the highest score
            proposal = canvas.masked_scatter(holes, tokens)
            canvas = torch.where(ranks < n_set, proposal, canvas.masked_fill(candidates, mask_id))
        yield canvas


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

    Without a length, block_size; a prompt that has holes is then the whole canvas.
    """
    if (length or 0) > block_size:
        raise Mistake(f"--length {length}: the canvas of this model has at most {block_size} tokens")
    ids = read_prompt(prompt, tokenizer, length or block_size)
    if length is None:
        length = len(ids) if tokenizer.mask_id in ids else block_size
    return torch.tensor([ids + [tokenizer.mask_id] * (length - len(ids))])


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
            config.temperature, config.top_k, config.top_p, generator,
        )  # fmt: skip
        for canvas in tqdm(canvases, total=config.steps, unit="step", leave=False):
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
