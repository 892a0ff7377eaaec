"""The KV cache: what the layers made of the finished part of a text."""


class Cache:
    """What each layer needs of the first `length` positions of a window of W: keys, values, and the inputs
    of its convolution. A pass reads the positions after them, and leaves here those that are final: the
    blocks before `final`, or in a GPT, where no position reads a hole, all.
    """

    def __init__(self, W):
        self.W, self.length, self.final, self.kept = W, 0, 0, {}

    def join(self, name, x, zeros=0):
        """What is kept under this name, and x (..., S, D) after it: (..., zeros + length + S, D).

        zeros: how many rows of zeros stand in front. There is room for W from the start: nothing is copied.
        """
        if name not in self.kept:
            self.kept[name] = x.new_zeros(*x.shape[:-2], zeros + self.W, x.shape[-1])
        kept = self.kept[name][..., : zeros + self.length + x.shape[-2], :]
        kept[..., zeros + self.length :, :] = x
        return kept
