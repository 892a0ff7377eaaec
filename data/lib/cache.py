"""The KV cache: keys, values and convolution inputs of the finished part of a text."""

import torch
import torch.nn.functional as F


class Cache:
    """Keeps what each layer computed for the first `length` positions of a window of W.

    length: an int or, if each row of the batch has its own, a tensor (B, 1).
    """

    def __init__(self, W):
        # A pass adds the blocks before position `final`. In a GPT, where no position reads a hole, it adds everything.
        self.W, self.length, self.final, self.kept = W, 0, 0, {}

    @property
    def is_ragged(self):
        return torch.is_tensor(self.length)

    def join(self, name, x, zeros=0):
        """Append x (B, .., S, D) to the tensor kept under a name, with zeros in front: (B, .., zeros + length + S, D).

        If rows have lengths of their own, the tensor ends after the longest.
        """
        if name not in self.kept:  # allocated once for the whole window, so nothing is copied later
            self.kept[name] = x.new_zeros(*x.shape[:-2], zeros + self.W, x.shape[-1])
        kept, S = self.kept[name], x.shape[-2]
        if self.is_ragged:
            rows, slots = torch.arange(len(x), device=x.device)[:, None], self.slots(zeros, S)
            kept.movedim(-2, 1)[rows, slots] = x.movedim(-2, 1)
            return kept[..., : zeros + int(self.length.max()) + S, :]
        kept = kept[..., : zeros + self.length + S, :]
        kept[..., zeros + self.length :, :] = x
        return kept

    def slots(self, zeros, S):
        return zeros + self.length + torch.arange(S, device=self.length.device)  # (B, S)

    def recent(self, name, x, n):
        """Append x (B, S, D) to the tensor kept under a name and return its last n + S rows, (B, n + S, D)."""
        kept = self.join(name, x, n)
        if self.is_ragged:
            return kept[torch.arange(len(x), device=x.device)[:, None], self.slots(0, n + x.shape[1])]
        return kept[:, self.length :]

    def sees(self, pattern):
        """Who sees whom (S, S), widened by the cache, which all see: (S, length + S), or (B, 1, S, .. + S)."""
        if not self.is_ragged:
            return F.pad(pattern, (self.length, 0), value=True)
        S = len(pattern)
        place = torch.arange(int(self.length.max()) + S, device=pattern.device) - self.length  # (B, .. + S)
        pattern = F.pad(F.pad(pattern, (1, 0), value=True), (0, 1), value=False)
        return pattern[:, place.clamp(-1, S) + 1].transpose(0, 1)[:, None]

    def with_rows(self, rows, cache):
        """Take these rows (B,) bool from another cache, and return this one."""
        for name, kept in cache.kept.items():
            self.kept[name][rows] = kept
        return self
