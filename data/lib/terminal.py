"""Draws canvases in the terminal while they fill (`--watch`)."""

import itertools
import os
import sys

from data.lib.pixels import half_blocks, split_picture
from data.lib.wrap import columns, lines_of, visible

CODES = {"hole": "\x1b[2m", "new": "\x1b[1;32m"}


class Watch:
    """Draws on stderr, over and over in one place if that's a terminal. Each name has a pane, side by side."""

    def __init__(self, names):
        self.names, self.panes, self.n_lines = names, [([], [], "", None)] * len(names), 0
        self.in_place = sys.stdout.isatty() and sys.stderr.isatty()

    def __enter__(self):
        if self.in_place:
            self.write("\x1b[?25l\x1b[?7l")  # hide the cursor, and don't let the terminal wrap lines
        return self

    def __exit__(self, failure, *_):
        if self.in_place:  # unless something failed, the text replaces the last canvas
            self.write(f"{'' if failure else self.back()}\x1b[J\x1b[?7h\x1b[?25h")

    def write(self, text):
        print(text, end="", file=sys.stderr, flush=True)

    def back(self):
        """The code that moves the cursor to the first line that was drawn."""
        return f"\x1b[{self.n_lines}F" if self.n_lines else ""

    def show(self, pane, history, n_canvases):
        """Draw the canvas after its newest step in a pane; it is the first of n_canvases."""
        n_holes = sum(history.holes)
        n_set = n_holes - history.kinds.count("hole")
        speed = n_set / max(1e-3, history.seconds[-1])
        status = f"step {len(history.steps)}, {n_set / max(1, n_holes):.0%} filled, {speed:,.0f} tokens/s"
        status += f" (the first of {n_canvases})" if n_canvases > 1 else ""
        if self.in_place:
            self.panes[pane] = history.tokens, history.kinds, status, history.pixels
            self.redraw()
        else:
            name = f"{self.names[pane]}: " if len(self.names) > 1 else ""
            text, picture = split_picture(history.tokens, history.pixels)
            self.write("\n".join([f"--- {name}{status}", "".join(text), *map("".join, picture), ""]))

    def redraw(self):
        width, height = os.get_terminal_size(sys.stderr.fileno())
        width, height = width or 80, height or 24  # some terminals report 0
        width = max(8, (width + 3) // len(self.panes) - 3)  # " | " between two panes
        bodies, statuses = zip(*(draw_pane(*pane, width, height) for pane in self.panes))
        rows = []
        for *left, (last, _) in (*itertools.zip_longest(*bodies, fillvalue=("", 0)), statuses):
            rows.append("".join(text + " " * (width - size) + " | " for text, size in left) + last)
        self.write(self.back() + "".join(f"\x1b[K{row}\n" for row in rows) + "\x1b[J")
        self.n_lines = len(rows)


def draw_pane(tokens, kinds, status, pixels, width, height):
    """The lines of a pane, the text above the picture, and its status, as (text, columns) each."""
    text, picture = split_picture(tokens, pixels)
    picture = half_blocks(picture, pixels, width)[: max(0, height - 3)]
    room = max(1, height - 2 - len(picture))  # the status and the cursor need a line each
    lines = []
    for line in visible(lines_of(text, kinds, width), room):
        runs = (f"{CODES[kind]}{run}\x1b[0m" if kind in CODES else run for run, kind in line)
        lines.append(("".join(runs), sum(columns(c) for run, _ in line for c in run)))
    return [*lines, *picture], (f"\x1b[7m{status[:width]}\x1b[0m", len(status[:width]))
