"""How a canvas filled, as a file: a page to step through, or an animated picture (`--save`)."""

import bisect
import itertools
import json
import math
import os
from html import escape
from pathlib import Path

from data.lib.errors import Mistake
from data.lib.escape import inert
from data.lib.files import replacing
from data.lib.history import lines_of, visible
from data.lib.pixels import share_of_black, split_picture


def check_path(path):
    """Raise Mistake if save_histories cannot write there."""
    path = Path(path)
    if path.suffix not in (".html", ".svg"):
        raise Mistake(f"--save {path}: the name of a page ends in .html, that of a picture in .svg")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise Mistake(f"--save {path}: it cannot be written there")


def save_histories(path, texts, names=("",)):
    """Write a page of how texts came to be, or a picture of the first, as the path's ending says. Each is a
    list of histories, by one model, or by several of these names, side by side in the time that each took.
    """
    save = save_html if Path(path).suffix == ".html" else save_svg
    save(path, texts, names)


def save_html(path, texts, names):
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    kept = "start", "holes", "steps", "seconds", "pixels"
    runs = [
        [{"name": name} | {field: getattr(history, field) for field in kept} for name, history in zip(names, sides)]
        for sides in texts
    ]
    data = json.dumps(runs, separators=(",", ":")).replace("<", "\\u003c")  # no text ends the script it is in
    with replacing(path) as file:
        file.write(page.replace("[/* runs */]", data).encode("utf-8"))


SVG_WIDTH, SVG_LINES = 72, 32  # at most, in characters
SVG_FRAMES, SVG_SECONDS, SVG_REST = 40, 0.16, 3.0  # frames at most, and how long one and the last are shown
SVG_STYLE = """
text { font: 13px ui-monospace, Menlo, Consolas, monospace; white-space: pre; fill: #24292f }
rect { fill: #f6f8fa; stroke: #d0d7de } .hole { fill: #a8b1ba } .new { fill: #0969da; font-weight: 600 }
.given { fill: #1a7f37; font-weight: 600 } .step { fill: #57606a }
path { shape-rendering: crispEdges } .pixel { fill: #5f87af }
@media (prefers-color-scheme: dark) {
  text { fill: #e6edf3 } rect { fill: #161b22; stroke: #30363d } .hole { fill: #57606a }
  .new { fill: #58a6ff } .given { fill: #3fb950 } .step { fill: #8d96a0 }
}
"""


def moments(sides, n):
    """After how many steps each of several canvases is shown in each of n + 1 frames: at the same share of
    its steps if it is alone, and otherwise at the same time.
    """
    if len(sides) == 1:
        return [(round(i * len(sides[0].steps) / max(1, n)),) for i in range(n + 1)]
    longest = max(history.seconds[-1] if history.seconds else 0 for history in sides)
    times = [longest * (i / max(1, n)) for i in range(n + 1)]
    return [tuple(bisect.bisect_right(history.seconds, time) for history in sides) for time in times]


def squares(rows, pixels, x, y, side):
    """The rows of a picture as SVG, from x and y on; pixels side by side that are alike as one."""
    for i, row in enumerate(rows):
        left, top = x, y + i * side
        for black, run in itertools.groupby(share_of_black(token, pixels) for token in row):
            width, grey = side * len(list(run)), 255 - round(255 * (black or 0))
            paint = 'class="pixel"' if black is None else f'fill="#{grey:02x}{grey:02x}{grey:02x}"'
            yield f'<path {paint} d="M{left:g} {top:g}h{width:g}v{side:g}h-{width:g}"/>'
            left += width


def save_svg(path, texts, names):
    """Write an animated picture of how the first text came to be."""
    sides = texts[0]
    frames = [list(history.frames()) for history in sides]
    n = min(SVG_FRAMES - 1, max(len(history.steps) for history in sides))
    total = SVG_SECONDS * n + SVG_REST
    columns = SVG_WIDTH if len(sides) == 1 else SVG_WIDTH * 2 // 3
    widest = max(history.pixels["columns"] if history.pixels else 0 for history in sides)
    if all(history.pixels for history in sides):  # no wider than it need be
        columns = max(36, math.ceil(17 * widest / 7.85))
    pixel = min(17, 7.85 * columns / max(1, widest))  # its side, where a letter is 7.85 wide and a line 17
    groups, tallest = [], 0
    for i, steps in enumerate(moments(sides, n)):
        rows = []
        for side, step in enumerate(steps):
            x = 12 + side * (24 + round(7.85 * columns))
            (tokens, kinds), pixels = frames[side][step], sides[side].pixels
            text, picture = split_picture(tokens, pixels)
            lines = visible(lines_of(text, kinds, columns), SVG_LINES)
            title = f"step {step} of {len(frames[side]) - 1}"
            if len(sides) > 1:
                title = f"{names[side]}: {title}, {[0, *sides[side].seconds][step]:.2f} s"
            title = escape(inert(title)[-columns:])  # of a long name the end
            rows.append(f'<text class="step" x="{x}" y="22">{title}</text>')
            for y, line in enumerate(lines):
                spans = "".join(f'<tspan class="{k}">{escape(c)}</tspan>' if k else escape(c) for c, k in line)
                rows.append(f'<text xml:space="preserve" x="{x}" y="{46 + 17 * y}">{spans}</text>')
            rows += squares(picture, pixels, x, 34 + 17 * len(lines), pixel)
            tallest = max(tallest, len(lines) + len(picture) * pixel / 17)
        groups.append(f'<g style="animation-delay: {SVG_SECONDS * i - total:.2f}s">{"".join(rows)}</g>')
    width, height = len(sides) * (24 + round(7.85 * columns)), 46 + math.ceil(17 * tallest)
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
            f"<title>A canvas of masks becomes text in {len(frames[0]) - 1} steps</title>\n"
            f"<style>{style}</style>\n"
            f'<rect x="0.5" y="0.5" width="{width - 1}" height="{height - 1}" rx="6"/>\n'
            f"{chr(10).join(groups)}\n</svg>\n".encode()
        )
