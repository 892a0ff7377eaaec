"""What the model sees while a canvas is filled: block by block, through a sliding window, with cache and guidance."""

import torch
import torch.nn.functional as F

from data.lib.cache import Cache
from data.lib.machine import device_of, send


def blocks(model, canvas, steps=None, block=None, guidance=0.0):
    """Cut a canvas (B, T) into blocks, which share the steps by their holes. The parameters are those of denoise.

    For each block with holes, from left to right, yield its number, its slice of T, its number of steps (B, 1), and
    look(where) -> logits (N, V) at where (B, block), bool. ValueError if `block` does not divide the model's blocks.
    """
    config, T = model.config, canvas.shape[1]
    context, K = config.context, config.block or T + config.context  # without blocks, one that is larger than all
    if block is None:
        block = K if T <= context or K < context else max(1, context // 4)
    block = min(block, context, K)
    if K < context and K % block:
        raise ValueError(f"block {block}: it does not divide the model's blocks of {K}")
    holes, special = canvas == config.mask_id, torch.tensor([config.mask_id, *config.special_ids])
    prompt = torch.isin(canvas, special, invert=True)  # (B, T)
    n_holes = holes.sum(1, keepdim=True)  # (B, 1)
    steps = (n_holes // 2).clamp(min=128) if steps is None else torch.full_like(n_holes, steps)
    n_before = F.pad(holes.cumsum(1), (1, 0))  # (B, T + 1): holes before each position
    share = (n_before * steps / n_holes.clamp(min=1)).round().long()  # steps before each position
    window_start = cache = None
    for number, start in enumerate(range(0, T, block)):
        part = slice(start, min(start + block, T))
        if not holes[:, part].any():
            continue
        window = window_of(part, block, T, context, K)
        if window.start != window_start:  # it moved, so every position in it changed
            window_start = window.start
            cache = Cache(min(T, context)) if K < context else None  # a canvas of one block has nothing final
        n_steps = (share[:, part.stop] - share[:, start]).clamp(min=1)[:, None]
        yield number, part, n_steps, look_at(model, canvas, prompt, window, part, K, guidance, cache)


def window_of(part, block, T, context, K):
    """The slice of a canvas of T that the model sees, at most `context` tokens, while it fills the block `part`.

    A canvas model sees up to a quarter of the context after the part. A model with blocks sees nothing after its own
    block of K. Its window moves by about a quarter of the context at a time, because each move empties the cache.
    """
    jump, ahead = (max(1, context // 4 // K) * K, K) if K < context else (1, min(context // 4, (context - block) // 2))
    unseen = (part.start // K + 1) * K  # where the model's next block begins
    left = max(0, -((context - min(unseen, part.start + block + ahead)) // jump) * jump) if T > context else 0
    return slice(left, min(left + context, T, unseen))


def look_at(model, canvas, prompt, window, part, K, guidance, cache):
    """Return look(where) -> logits (N, V) at where (B, block), bool; minus infinity for special tokens.

    It sees the window of the canvas as it is when called. With guidance w the logits are (1 + w) times the model's,
    minus w times those of a canvas whose prompt is masked, too (2410.18514).
    """
    mask_id, context, device = model.config.mask_id, model.config.context, device_of(model)
    (not_text,) = send(device, torch.tensor([mask_id, *model.config.special_ids]))
    seen, seen_prompt = canvas[:, window], prompt[:, window]  # (B, context), views
    inside = slice(part.start - window.start, part.stop - window.start)
    final = max(0, part.start // K * K - window.start)  # where the model's own block begins
    # Guide all blocks of a window or none, so that a cache keeps its number of rows.
    guidance = guidance if prompt[:, window.start : window.start + context].any() else 0.0

    def look(where):
        if not where.any():
            return torch.zeros(0, model.config.vocab_size, device=device)
        rows = where.any(1) | (cache is not None)  # a cache holds all rows
        text, place = seen[rows], torch.zeros_like(seen_prompt[rows])
        place[:, inside] = where[rows]
        if guidance:
            text = torch.cat((text, text.masked_fill(seen_prompt[rows], mask_id)))
            place = torch.cat((place, place))
        if cache is not None:  # the first look at a block also reads the one before it, which is final now
            cache.length, cache.final = min(cache.length, final), final
        text, place = send(device, text, place)
        logits = model(text, where=place, cache=cache)
        if guidance:
            logits, unguided = logits.float().chunk(2)
            guided = logits + guidance * (logits - unguided)
            logits = guided.where(logits > -torch.inf, logits)  # inf - inf is nan where no token may stand
        return logits.index_fill_(1, not_text, -torch.inf)

    return look
