"""What a GPT sees while it appends and drafts: each row's window, with a cache; and the noise of each place."""

import functools

import numpy as np
import torch
import torch.nn.functional as F

from data.lib.cache import Cache
from data.lib.machine import device_of, send


class Ahead:
    """Reads the next n tokens of each row of a text and, after each place where the text may go on, K masks.

    The text has B rows of T tokens. They advance at their own pace, so each has a window of its own.
    """

    def __init__(self, model, B, T, K, n):
        self.model, self.T, self.K, self.n, self.device = model, T, K, n, device_of(model)
        self.lefts, self.cache = torch.full((B,), -1), None  # where each row's window begins; -1: it has none yet
        places = (torch.arange(1, n + 1)[:, None] + torch.arange(K)).flatten()  # of the masks, after the cache
        not_text = torch.tensor([model.config.mask_id, *model.config.special_ids])
        self.places, self.not_text = send(self.device, places, not_text)

    def look(self, text, ends):
        """Logits (B, n, V) at the places from ends (B,) on, and how many places (B,) each window still holds.

        text (B, T + K + n): it is certain before `ends`, and then come drafts.
        """
        config, places = self.model.config, ends[:, None] + torch.arange(self.n)  # (B, n)
        jump = max(1, config.context // 4)  # each move of a window empties its cache
        lefts = -((config.context - 1 - ends.clamp(max=self.T - 1)).clamp(max=0) // jump) * jump
        before = F.pad(text, (1, 0), value=config.shift_id)  # the token before each place
        if not lefts.equal(self.lefts):
            self.move(before, ends, lefts)
        lengths = (ends - lefts)[:, None]
        self.cache.length = lengths[0].item() if (lengths == lengths[0]).all() else lengths.to(self.device)
        (tokens,) = send(self.device, before.gather(1, places))
        masks = tokens.new_full((len(text), len(self.places)), config.mask_id)
        x = self.model.run(tokens, masks, self.places, max(1, self.K), self.cache)
        self.vectors = x[:, self.n :].unflatten(1, (self.n, self.K))
        return self.unembed(x[:, : self.n], places), (lefts + config.context).clamp(max=self.T) - ends

    def move(self, before, ends, lefts):
        """Move windows to lefts (B,), and read the text before `ends` again in the rows whose window moved."""
        moved = lefts != self.lefts
        cache = Cache(min(self.T, self.model.config.context) + self.n * (self.K + 1))
        n, self.lefts = (ends - lefts)[moved].max().item(), lefts
        if n:
            places = lefts[moved, None] + torch.arange(n)
            tokens = before[moved].gather(1, places.clamp(max=before.shape[1] - 1))  # some rows need fewer
            tokens[:, 0] = self.model.config.shift_id
            (tokens,) = send(self.device, tokens)
            self.model.run(tokens, tokens[:, :0], self.places[:0], 1, cache)
        self.cache = cache if moved.all() else self.cache.with_rows(moved.to(self.device), cache)

    def guesses(self, last):
        """K functions (text, place (B, 1)) -> logits (B, 1, V), one for each draft. last (B,): the last token kept."""
        x = self.vectors[torch.arange(len(last)), last]  # (B, K, C)
        return [functools.partial(self.guess, x[:, i]) for i in range(self.K)]

    def guess(self, x, text, place):
        look = self.model.drafter.LOOK
        before = F.pad(text, (look, 0), value=self.model.config.shift_id).gather(1, place + torch.arange(look))
        (before,) = send(self.device, before)  # (B, look)
        return self.unembed(self.model.drafter(x, self.model.token_embedding(before))[:, None], place)

    def unembed(self, x, places):
        (places,) = send(self.device, places.clamp(max=self.T - 1))
        return self.model.unembed(x, places).index_fill_(-1, self.not_text, -torch.inf)


def gumbel_noise(seeds, K, V):
    """noise(places (B, n)) -> Gumbel noise (B, n, V) float64, which depends on V, a row's seed and the place alone."""
    n = max(1, 2**14 // V)  # places whose noise is drawn at once

    @functools.lru_cache(2 * len(seeds) * (K + 1))
    def chunk(seed, number):
        generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, number]))
        return torch.from_numpy(-np.log(generator.standard_exponential((n, V))))

    def rows(places):
        return [chunk(seed, i // n)[i % n] for seed, row in zip(seeds, places.tolist()) for i in row]

    return lambda places: torch.stack(rows(places)).view(*places.shape, V)
