"""What the model sees while a canvas is filled: block by block, through a sliding window, with cache and guidance."""

import functools

import torch
import torch.nn.functional as F

from data.lib.cache import Cache
from data.lib.machine import device_of, send


def blocks(model, canvas, steps=None, block=None, guidance=0.0):
    """Cut a canvas (B, T) into blocks, which share the steps in proportion to their holes. For parameters see denoise.

    For each block with holes, from left to right, yield its number, its slice of T, its number of steps (B, 1), and
    look(where) -> logits (N, V) at where (B, block), bool. ValueError if `block` does not divide the model's blocks.
    """
    config, T = model.config, canvas.shape[1]
    context, K = config.context, config.block or T + config.context  # without blocks, K is larger than any canvas
    default = K if T <= context or K < context else max(1, context // 4)
    block = min(default if block is None else block, context, K)
    if K < context and K % block:
        raise ValueError(f"block {block}: it does not divide the model's blocks of {K}")
    holes = canvas == config.mask_id  # (B, T)
    prompt = torch.isin(canvas, torch.tensor([config.mask_id, *config.special_ids]), invert=True)  # (B, T)
    n_holes = holes.sum(1, keepdim=True)  # (B, 1)
    steps = (n_holes // 2).clamp(min=128) if steps is None else torch.full_like(n_holes, steps)
    steps_before = (F.pad(holes.cumsum(1), (1, 0)) * steps / n_holes.clamp(min=1)).round().long()  # (B, T + 1)
    # A canvas model sees up to a quarter of the context after the part that it fills; a model with blocks sees nothing
    # after its own block. Its window moves by about a quarter at a time, because each move empties the cache.
    jump, ahead = (max(1, context // 4 // K) * K, K) if K < context else (1, min(context // 4, (context - block) // 2))
    old_left = cache = None
    for start in [first for first in range(0, T, block) if holes[:, first : first + block].any()]:
        number, part = start // block, slice(start, min(start + block, T))
        end = (start // K + 1) * K  # the end of the model's own block
        left = max(0, -((context - min(end, start + block + ahead)) // jump) * jump) if T > context else 0
        if left != old_left:  # the window moved, so every position in it changed
            old_left, cache = left, Cache(min(T, context)) if K < context else None  # one block alone is never final
        window = slice(left, min(left + context, T, end))
        n_steps = (steps_before[:, part.stop] - steps_before[:, start]).clamp(min=1)[:, None]
        yield number, part, n_steps, functools.partial(look, model, canvas, prompt, window, part, K, guidance, cache)


def look(model, canvas, prompt, window, part, K, guidance, cache, where):
    """Logits (N, V) at where (B, block), bool, for the canvas as it is now; minus infinity for special tokens."""
    config, device = model.config, device_of(model)
    if not where.any():
        return torch.zeros(0, config.vocab_size, device=device)
    rows = where.any(1) | (cache is not None)  # a cache holds all rows
    text = canvas[rows, window]
    place = F.pad(where[rows], (part.start - window.start, window.stop - part.stop))  # padded to the whole window
    # Either all blocks of a window are guided or none is, so that a cache keeps its number of rows.
    guided = guidance and prompt[:, window.start : window.start + config.context].any()
    if guided:
        text = torch.cat((text, text.masked_fill(prompt[rows, window], config.mask_id)))
        place = place.repeat(2, 1)
    if cache is not None:  # the first look at a block also reads the one before it, which is final now
        cache.final = part.start // K * K - window.start  # where the model's own block begins
        cache.length = min(cache.length, cache.final)
    text, place, not_text = send(device, text, place, torch.tensor([config.mask_id, *config.special_ids]))
    logits = model(text, where=place, cache=cache)
    if guided:  # (1 + w) times the model's logits, minus w times those with the prompt masked too (2410.18514)
        logits, blind = logits.float().chunk(2)
        logits = torch.where(logits > -torch.inf, logits + guidance * (logits - blind), logits)  # inf - inf is nan
    return logits.index_fill_(1, not_text, -torch.inf)
