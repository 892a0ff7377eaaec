"""The KV cache: keys, values and convolution inputs of the finished part of a text."""


class Cache:
    """Keeps what each layer computed for the first `length` positions of a window of W."""

    def __init__(self, W):
        # A pass adds the blocks before position `final`. In a GPT, where no position reads a hole, it adds everything.
        self.W, self.length, self.final, self.kept = W, 0, 0, {}

    def join(self, name, x, zeros=0):
        """Append x (..., S, D) to the tensor kept under a name, with zeros in front: (..., zeros + length + S, D)."""
        if name not in self.kept:  # allocated once for the whole window, so nothing is copied later
            self.kept[name] = x.new_zeros(*x.shape[:-2], zeros + self.W, x.shape[-1])
        kept = self.kept[name][..., : zeros + self.length + x.shape[-2], :]
        kept[..., zeros + self.length :, :] = x
        return kept
