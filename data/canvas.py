"""Three views of a canvas while it fills: in the terminal, as a page, and as an animated picture.

All take the text of the model and of the prompt for what it may be, anything: nothing in it can
move the cursor, colour the terminal or become markup.
"""

import json
import os
import sys
import time
import unicodedata
from html import escape
from pathlib import Path

from data.files import replacing

HOLE = "·"
# Pictures of the control characters (`␛` for an escape), and of what turns around the text beside it.
PICTURES = {i: 0x2400 + i for i in range(32) if chr(i) not in "\n\t"} | {127: "␡"}
PICTURES |= dict.fromkeys([*range(128, 160), *range(0x202A, 0x202F), *range(0x2066, 0x206A)], "\ufffd")


def inert(text):
    """The text with a picture in place of every character that does something."""
    text = text.translate(PICTURES)
    return "".join(c if unicodedata.category(c) not in ("Cs", "Cn", "Zl", "Zp") else "\ufffd" for c in text)


def tokens_of(tokenizer, ids):
    """The inert text of each token of a canvas; a hole is HOLE."""
    ids = [i for i in ids if i >= 0]  # what is below 0 is behind the end
    pieces = map(inert, tokenizer.pieces(ids))
    return [HOLE if i == tokenizer.mask_id else piece for i, piece in zip(ids, pieces)]


class History:
    """How a canvas filled: `start`, the text of its tokens, `holes`, which of these are, and `steps`, a list
    of [position, text, probability] for each step, of what was set. The probability is None where a
    token only looks otherwise than before, since the rest of its character came; the text is None
    where it became a hole again.
    """

    def __init__(self, tokenizer, canvas):
        """canvas: token ids."""
        self.tokenizer, self.canvas, self.probability = tokenizer, canvas, [1.0] * len(canvas)
        self.start = self.tokens = tokens_of(tokenizer, canvas)
        self.holes = [i == tokenizer.mask_id for i in canvas[: len(self.start)]]
        self.kinds = ["hole" if hole else "given" for hole in self.holes]
        self.steps = []

    def add(self, canvas, probability):
        """The canvas after one more step, and what the model gave each token when it was set."""
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


# --- the terminal --------------------------------------------------------------------------------


class Watch:
    """Draws a canvas on stderr, over and over in the same place if that is a terminal, and stdout too."""

    codes = {"hole": "\x1b[2m", "new": "\x1b[1;32m"}

    def __init__(self):
        self.moving = sys.stdout.isatty() and sys.stderr.isatty()
        self.n_lines, self.n_set, self.began = 0, 0, time.perf_counter()

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

    def show(self, history, n_canvases):
        """Draw the canvas after its newest step, the first of n_canvases."""
        kinds = history.kinds
        self.n_set += kinds.count("new")
        filled = 1 - kinds.count("hole") / max(1, sum(history.holes))
        speed = self.n_set / (time.perf_counter() - self.began)
        status = f"step {len(history.steps)}, {filled:.0%} filled, {speed:,.0f} tokens/s"
        status += f" (the first of {n_canvases})" if n_canvases > 1 else ""
        if self.moving:
            self.redraw(history.tokens, kinds, status)
        else:
            self.write(f"--- {status}\n{''.join(history.tokens)}\n")

    def redraw(self, tokens, kinds, status):
        width, height = os.get_terminal_size(sys.stderr.fileno())
        width, height = width or 80, height or 24  # some do not know
        lines = visible(lines_of(tokens, kinds, width), max(1, height - 2))  # below: status and cursor
        rows = [
            "".join(f"{self.codes[k]}{c}\x1b[0m" if k in self.codes else c for c, k in line) for line in lines
        ]
        rows.append(f"\x1b[7m{status[:width]}\x1b[0m")
        self.write(self.back() + "".join(f"\x1b[K{row}\n" for row in rows) + "\x1b[J")
        self.n_lines = len(rows)


# --- files ---------------------------------------------------------------------------------------


def save_html(path, histories):
    """Write a page that shows how canvases filled."""
    page = Path(__file__).with_name("canvas.html").read_text(encoding="utf-8")
    runs = [{name: getattr(history, name) for name in ("start", "holes", "steps")} for history in histories]
    data = json.dumps(runs, separators=(",", ":")).replace("<", "\\u003c")  # no text ends the script it is in
    with replacing(path) as file:
        file.write(page.replace("[/* runs */]", data).encode("utf-8"))


SVG_WIDTH, SVG_LINES = 72, 32  # at most, in characters
SVG_FRAMES, SVG_SECONDS, SVG_REST = 40, 0.16, 3.0  # frames at most, and how long one and the last are shown
SVG_STYLE = """
text { font: 13px ui-monospace, Menlo, Consolas, monospace; white-space: pre; fill: #24292f }
rect { fill: #f6f8fa; stroke: #d0d7de } .hole { fill: #a8b1ba } .new { fill: #0969da; font-weight: 600 }
.given { fill: #1a7f37; font-weight: 600 } .step { fill: #57606a }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } rect { fill: #161b22; stroke: #30363d } .hole { fill: #57606a }
  .new { fill: #58a6ff } .given { fill: #3fb950 } .step { fill: #8d96a0 }
}
"""


def save_svg(path, histories):
    """Write an animated picture of how the first of the canvases filled."""
    frames = list(histories[0].frames())
    n = min(SVG_FRAMES, len(frames)) - 1
    total = SVG_SECONDS * n + SVG_REST
    groups, tallest = [], 0
    for i in range(n + 1):
        moment = round(i * (len(frames) - 1) / max(1, n))
        lines = visible(lines_of(*frames[moment], SVG_WIDTH), SVG_LINES)
        tallest = max(tallest, len(lines))
        rows = [f'<text class="step" x="12" y="22">step {moment} of {len(frames) - 1}</text>']
        for y, line in enumerate(lines):
            spans = "".join(f'<tspan class="{k}">{escape(c)}</tspan>' if k else escape(c) for c, k in line)
            rows.append(f'<text xml:space="preserve" x="12" y="{46 + 17 * y}">{spans}</text>')
        groups.append(f'<g style="animation-delay: {SVG_SECONDS * i - total:.2f}s">{"".join(rows)}</g>')
    width, height = 24 + round(7.85 * SVG_WIDTH), 46 + 17 * tallest
    first, last = (f"{100 * seconds / total:.2f}%" for seconds in (SVG_SECONDS, SVG_REST))
    style = SVG_STYLE + (
        f"g {{ visibility: hidden; animation: frame {total:.2f}s step-end infinite }}\n"
        f"g:last-of-type {{ visibility: visible; animation-name: last }}\n"
        f"@keyframes frame {{ 0% {{ visibility: visible }} {first}, 100% {{ visibility: hidden }} }}\n"
        f"@keyframes last {{ 0% {{ visibility: visible }} {last}, 100% {{ visibility: hidden }} }}\n"
        "@media (prefers-reduced-motion) { g { animation: none } }\n"
    )
    with replacing(path) as file:
        file.write(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">\n'
            f"<title>A canvas of masks becomes text in {len(frames) - 1} steps</title>\n"
            f"<style>{style}</style>\n"
            f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="6"/>\n'
            f"{chr(10).join(groups)}\n</svg>\n".encode()
        )
