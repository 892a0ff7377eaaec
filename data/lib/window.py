"""What the model sees while a canvas is filled: block by block, through a sliding window, with cache and guidance."""

import functools

import torch
import torch.nn.functional as F

from data.lib.cache import Cache
from data.lib.machine import device_of, send


def blocks(model, canvas, steps=None, block=None, guidance=0.0):
    """Cut a canvas (B, T) into blocks, which share the steps in proportion to their holes. The parameters are those of
    denoise.

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
            old_left, cache = (
                left,
                Cache(min(T, context)) if K < context else None,
            )  # with one block, nothing is ever final
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


class Ahead:
    """What a GPT sees while each row of a text goes on at a place of its own: a window, with a cache.

    It reads K drafts at a time and, after each place at which the text may turn out to go on, a group of K masks.
    """

    def __init__(self, model, T, K):
        self.model, self.T, self.K, self.lefts, self.cache = model, T, K, None, None
        config, device = model.config, device_of(model)
        self.W = min(T, config.context) + (K + 1) ** 2
        self.masks = torch.full((1, (K + 1) * K), config.mask_id, device=device)
        self.places = torch.arange(1, K + 2)[:, None] + torch.arange(K)  # of the masks, counted from the first draft
        self.places, self.not_text = send(device, self.places.flatten(), torch.tensor([config.mask_id, *config.special_ids]))

    def __call__(self, text, ends):
        """The GPT's logits (B, K + 1, V) at the places from ends (B,) on; how many places (B,) belong to the window.

        text (B, more than T + K): before `ends` it is certain, and then come drafts.
        """
        context, n = self.model.config.context, self.K + 1
        jump = max(1, context // 4)
        lefts = -((context - ends.clamp(max=self.T - 1) - 1).clamp(max=0) // jump) * jump  # (B,)
        read = F.pad(text, (1, 0), value=self.model.config.shift_id)
        if self.lefts is None or not lefts.equal(self.lefts):
            self.move(read, ends, lefts)
        lengths = ends - lefts
        first = lengths[0].item()
        self.cache.length = first if (lengths == first).all() else lengths[:, None].to(self.masks.device)
        (tokens,) = send(self.masks.device, read.gather(1, ends[:, None] + torch.arange(n)))
        x = self.model.run(tokens, self.masks.expand(len(text), -1), self.places, self.K or 1, self.cache)
        self.vectors = x[:, n:].unflatten(1, (n, self.K)) if self.K else None
        return self.unembed(x[:, :n], ends[:, None] + torch.arange(n)), (lefts + context).clamp(max=self.T) - ends

    def unembed(self, x, places):
        (places,) = send(x.device, places.clamp(max=self.T - 1))
        return self.model.unembed(x, places).index_fill_(-1, self.not_text, -torch.inf)

    def guess(self, text, ends, n, place):
        """The logits (B, 1, V) of the draft at place (B, 1), after the pass that made n (B,) places before ends certain."""
        device, rows = self.masks.device, torch.arange(len(n))
        x = self.vectors[rows, (n - 1).clamp(min=0), (place.squeeze(1) - ends)]
        before = F.pad(text, (1, 0), value=self.model.config.shift_id).gather(1, place).squeeze(1)
        return self.unembed(self.model.drafter(x, self.model.token_embedding(before.to(device)))[:, None], place)

    def move(self, read, ends, lefts):
        """Read the rows whose window moved again."""
        rows = torch.ones_like(ends, dtype=torch.bool) if self.lefts is None else lefts != self.lefts
        cache, n = Cache(self.W), (ends - lefts)[rows].max().item()
        if n:
            tokens = read[rows].gather(1, lefts[rows, None] + torch.arange(n))
            tokens[:, 0] = self.model.config.shift_id
            (tokens,) = send(self.masks.device, tokens)
            self.model.run(tokens, tokens[:, :0], self.places[:0], 1, cache)
        if rows.all():
            self.cache = cache
        else:
            self.cache.put(rows, cache)
        self.lefts = lefts
