"""A canvas in the terminal, while it fills (`--watch`)."""

import os
import sys

from data.lib.history import columns, lines_of, visible
from data.lib.pixels import as_text, half_blocks, split_picture


class Watch:
    """Draws a canvas on stderr, over and over in the same place if that is a terminal, and stdout too; or
    several of these names, each in a pane of its own, that fill one after the other.
    """

    codes = {"hole": "\x1b[2m", "new": "\x1b[1;32m"}

    def __init__(self, names):
        self.moving = sys.stdout.isatty() and sys.stderr.isatty()
        self.n_lines, self.names, self.pane = 0, names, 0
        self.panes = [([], [], "", None)] * len(names)

    def __enter__(self):
        if self.moving:
            self.write("\x1b[?25l\x1b[?7l")  # no cursor, and no line that the terminal wraps itself
        return self

    def __exit__(self, failure, *_):
        if self.moving:  # the text itself will take the place of the last canvas
            self.write(f"{'' if failure else self.back()}\x1b[J\x1b[?7h\x1b[?25h")

    def write(self, text):
        sys.stderr.write(text)
        sys.stderr.flush()

    def back(self):
        return f"\x1b[{self.n_lines}F" if self.n_lines else ""

    def next(self):
        """What is shown from now on is in the next pane."""
        self.pane += 1

    def show(self, history, n_canvases):
        """Draw the canvas after its newest step, the first of n_canvases."""
        kinds, n_holes = history.kinds, sum(history.holes)
        n_set = n_holes - kinds.count("hole")
        speed = n_set / max(1e-3, history.seconds[-1])
        status = f"step {len(history.steps)}, {n_set / max(1, n_holes):.0%} filled, {speed:,.0f} tokens/s"
        status += f" (the first of {n_canvases})" if n_canvases > 1 else ""
        if self.moving:
            self.panes[self.pane] = history.tokens, kinds, status, history.pixels
            self.redraw()
        else:
            name = f"{self.names[self.pane]}: " if len(self.names) > 1 else ""
            self.write(f"--- {name}{status}\n{as_text(history.tokens, history.pixels)}\n")

    def redraw(self):
        width, height = os.get_terminal_size(sys.stderr.fileno())
        width, height = width or 80, height or 24  # some do not know
        width = max(8, (width + 3) // len(self.panes) - 3)  # three columns between two panes
        panes = []
        for tokens, kinds, status, pixels in self.panes:
            text, rows = split_picture(tokens, pixels)
            picture = half_blocks(rows, pixels, width)[: max(0, height - 3)]
            room = max(1, height - 2 - len(picture))  # below: status and cursor
            lines = [*map(self.coloured, visible(lines_of(text, kinds, width), room)), *picture]
            panes.append([*lines, (f"\x1b[7m{status[:width]}\x1b[0m", len(status[:width]))])
        tallest = max(map(len, panes))
        panes = [[*lines[:-1], *[("", 0)] * (tallest - len(lines)), lines[-1]] for lines in panes]
        rows = []
        for *left, (last, _) in zip(*panes):
            rows.append("".join(f"{text}{' ' * (width - size)} | " for text, size in left) + last)
        self.write(self.back() + "".join(f"\x1b[K{row}\n" for row in rows) + "\x1b[J")
        self.n_lines = len(rows)

    def coloured(self, line):
        """A line of (text, kind) runs as it is written, and how many columns it takes."""
        runs = (f"{self.codes[k]}{c}\x1b[0m" if k in self.codes else c for c, k in line)
        return "".join(runs), sum(columns(c) for text, _ in line for c in text)
