"""Draws canvases in the terminal while they fill (`--watch`)."""

import itertools
import os
import sys

from data.lib.escape import inert
from data.lib.layout import half_blocks, lines_of, split_picture

CODES = {"hole": "\x1b[2m", "draft": "\x1b[4;35m", "new": "\x1b[1;32m"}


class Watch:
    """Draws on stderr, over and over in one place, with n_panes side by side."""

    def __init__(self, n_panes):
        self.panes, self.back = [([], [], None, "", "")] * n_panes, ""  # back moves the cursor to the first line drawn

    def __enter__(self):
        print("\x1b[?25l\x1b[?7l", end="", file=sys.stderr)  # hide the cursor, and don't let the terminal wrap lines
        return self

    def __exit__(self, failure, *_):  # unless something failed, the text replaces the last canvas
        print(f"{'' if failure else self.back}\x1b[J\x1b[?7h\x1b[?25h", end="", file=sys.stderr, flush=True)

    def show(self, pane, history, n_canvases):
        """Draw the canvas after its newest step in a pane; it is the first of n_canvases."""
        n_holes = sum(history.holes)
        n_set = n_holes - history.kinds.count("hole") - history.kinds.count("draft")
        speed = n_set / max(1e-3, history.seconds[-1])
        status = f"{n_set / max(1, n_holes):.0%} filled, {speed:,.0f} tokens/s, step {len(history.steps)}"
        title = [inert(history.name)] * (len(self.panes) > 1) + [f"the first of {n_canvases}"] * (n_canvases > 1)
        self.panes[pane] = history.tokens, history.kinds, history.pixels, ", ".join(title), status
        width, height = os.get_terminal_size(sys.stderr.fileno())
        width = max(8, (width + 3) // len(self.panes) - 3)  # " | " between two panes
        bodies, statuses = zip(*(draw_pane(*each, width, height) for each in self.panes))
        rows = [*itertools.zip_longest(*bodies, fillvalue=""), statuses]
        for first, *others in rows:
            others = (f"\x1b[{i * (width + 3) - 2}G | {cell}" for i, cell in enumerate(others, 1))
            self.back += f"\x1b[K{first}{''.join(others)}\n"
        print(f"{self.back}\x1b[J", end="", file=sys.stderr, flush=True)
        self.back = f"\x1b[{len(rows)}F"


def draw_pane(tokens, kinds, pixels, title, status, width, height):
    text, picture = split_picture(tokens, pixels)
    lines = [f"\x1b[1m{title[-width:]}\x1b[0m"] if title else []
    picture = half_blocks(picture, pixels, width)[: max(0, height - 3 - len(lines))]
    room = height - 2 - len(lines) - len(picture)  # leaves the status and the cursor a line
    for line in lines_of(text, kinds, width, max(1, room)):
        lines.append("".join(f"{CODES[kind]}{run}\x1b[0m" if kind in CODES else run for run, kind in line))
    return [*lines, *picture], f"\x1b[7m{status[:width]}\x1b[0m"
