"""How a canvas filled, and when, as text that is safe to show.

The text of the model and of the prompt may be anything: nothing in it can move the cursor, colour the
terminal or become markup. terminal.py and picture.py show what is kept here.
"""

import unicodedata

from data.lib.escape import inert

HOLE = "·"


def tokens_of(tokenizer, ids):
    """The inert text of each token of a canvas; a hole is HOLE."""
    pieces = map(inert, tokenizer.pieces(ids))
    return [HOLE if i == tokenizer.mask_id else piece for i, piece in zip(ids, pieces)]


class History:
    """How a canvas filled. start: the text of each token at first. holes: whether each was a hole. pixels:
    which are a picture, as the tokenizer says, or None. steps: for each step a list of [position, text,
    probability] of what was set; the text is None where it became a hole again, the probability where the
    same token only looks otherwise, because a later one completed its character. seconds: when each step was
    done.
    """

    def __init__(self, tokenizer, canvas):
        """canvas: token ids."""
        self.tokenizer, self.canvas, self.probability = tokenizer, canvas, [1.0] * len(canvas)
        self.pixels = tokenizer.pixels
        self.start = self.tokens = tokens_of(tokenizer, canvas)
        self.holes = [i == tokenizer.mask_id for i in canvas[: len(self.start)]]
        self.kinds = ["hole" if hole else "given" for hole in self.holes]
        self.steps, self.seconds = [], []

    def add(self, canvas, probability, seconds):
        """The canvas after one more step, what the model gave each token when it was set, and when."""
        tokens, changes = tokens_of(self.tokenizer, canvas), []
        for i, token in enumerate(tokens):
            new = canvas[i] != self.canvas[i] or probability[i] != self.probability[i]
            if canvas[i] == self.tokenizer.mask_id:
                if canvas[i] != self.canvas[i]:
                    changes.append([i, None, None])
            elif new:
                changes.append([i, token, round(probability[i], 3)])
            elif token != self.tokens[i]:
                changes.append([i, token, None])
        self.kinds = kinds_after(self.kinds, changes)
        self.steps.append(changes)
        self.seconds.append(round(seconds, 3))
        self.canvas, self.probability, self.tokens = canvas, probability, tokens

    def frames(self):
        """The (texts, kinds) of the tokens at the start and after every step."""
        tokens, kinds = list(self.start), ["hole" if hole else "given" for hole in self.holes]
        yield tokens, kinds
        for changes in self.steps:
            tokens, kinds = list(tokens), kinds_after(kinds, changes)
            for i, token, _ in changes:
                tokens[i] = HOLE if token is None else token
            yield tokens, kinds


def kinds_after(kinds, changes):
    """What each token is after a step: `hole`, `new`, `given` or, ``, old."""
    kinds = ["" if kind == "new" else kind for kind in kinds]
    for i, token, p in changes:
        if token is None or p is not None:
            kinds[i] = "hole" if token is None else "new"
    return kinds


def columns(c):
    """How many columns of a terminal a character takes."""
    if unicodedata.category(c) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(c) in "WF" else 1


def lines_of(tokens, kinds, width):
    """The tokens wrapped at a width: lines of (text, kind) runs, with spaces for tabs."""
    lines, used = [[]], 0
    for token, kind in zip(tokens, kinds):
        for c in token:
            if c == "\n":
                lines.append([])
                used = 0
                continue
            if c == "\t":
                c = " " * min(8 - used % 8, width)
            size = sum(map(columns, c))
            if used + size > width:
                lines.append([])
                used = 0
            used += size
            if lines[-1] and lines[-1][-1][1] == kind:
                c = lines[-1].pop()[0] + c
            lines[-1].append((c, kind))
    return lines


def visible(lines, room):
    """As many of the lines as there is room for, about the last that has something new."""
    newest = max((i for i, line in enumerate(lines) if any(kind == "new" for _, kind in line)), default=0)
    first = max(0, min(newest - room // 2, len(lines) - room))
    return lines[first : first + room]
