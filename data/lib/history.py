"""Records how a canvas filled, step by step, as text that is safe to show."""

import itertools

from data.lib.escape import inert

HOLE = "·"


def tokens_of(tokenizer, ids):
    """The text of each token of a canvas, safe to show; HOLE for a hole."""
    return [HOLE if i == tokenizer.mask_id else inert(piece) for i, piece in zip(ids, tokenizer.pieces(ids))]


class History:
    """Records how one canvas, a list of ids, filled. steps: the changes of each step, [position, text, probability].

    The probability of a draft is "draft". A change with a number follows when it becomes certain or is replaced.
    """

    def __init__(self, tokenizer, canvas, name="", about="", prompt="", seed=0):
        self.tokenizer, self.pixels, self.name, self.text = tokenizer, tokenizer.pixels, name, ""
        self.about, self.prompt, self.seed = inert(about or name), inert(prompt), seed  # for the captions of a page
        self.canvas, self.probability, self.drafts = canvas, [1.0] * len(canvas), [False] * len(canvas)
        self.holes = [i == tokenizer.mask_id for i in canvas]
        self.start, self.steps, self.seconds = tokens_of(tokenizer, canvas), [], []  # seconds: when a step was done
        self.tokens, self.kinds = next(self.frames())

    def add(self, canvas, probability, seconds, drafts=None):
        """Record the canvas after a step, the probability with which each token was set, and which are still drafts."""
        changes, drafts = [], drafts or [False] * len(canvas)
        for i, token in enumerate(tokens_of(self.tokenizer, canvas)):
            is_new = canvas[i] != self.canvas[i] or probability[i] != self.probability[i]  # drawn again
            is_new |= drafts[i] != self.drafts[i]  # or a draft became certain
            if is_new and canvas[i] == self.tokenizer.mask_id:
                changes.append([i, None, None])  # masked again
            elif is_new or token != self.tokens[i]:  # or a later token completed its character
                changes.append([i, token, "draft" if drafts[i] else round(probability[i], 3) if is_new else None])
        self.steps.append(changes)
        self.seconds.append(round(seconds, 3))
        self.canvas, self.probability, self.drafts = canvas, probability, drafts
        self.tokens, self.kinds = frame_after((self.tokens, self.kinds), changes)

    def frames(self):
        """The (tokens, kinds) at the start and after every step."""
        kinds = ["hole" if hole else "given" for hole in self.holes]
        return itertools.accumulate(self.steps, frame_after, initial=(self.start, kinds))


def frame_after(frame, changes):
    """The (tokens, kinds) after a step. kinds: given, hole, draft, new if this step set it, "" if an older one did."""
    tokens, kinds = list(frame[0]), ["" if kind == "new" else kind for kind in frame[1]]
    for i, token, p in changes:
        if p is not None:
            kinds[i] = "draft" if p == "draft" else "new"
        tokens[i], kinds[i] = (HOLE, "hole") if token is None else (token, kinds[i])
    return tokens, kinds
