"""Saves how a canvas filled (`--save`): as a page to step through, or as an animated SVG."""

import bisect
import itertools
import json
import math
from html import escape
from pathlib import Path

from data.lib.escape import inert
from data.lib.files import replacing
from data.lib.pixels import blackness, split_picture
from data.lib.wrap import lines_of, visible


def save_histories(path, texts, names=("",)):
    """Write a page of all texts, or an animation of the first. A text is a list of histories, one for each name."""
    write = page if Path(path).suffix == ".html" else animation
    with replacing(path) as file:
        file.write(write(texts, names).encode())


def page(texts, names):
    fields = "start", "holes", "steps", "seconds", "pixels"
    runs = [
        [{"name": name} | {field: getattr(history, field) for field in fields} for name, history in zip(names, sides)]
        for sides in texts
    ]
    data = json.dumps(runs, separators=(",", ":")).replace("<", "\\u003c")  # no text can end the script it is in
    return Path(__file__).with_name("page.html").read_text(encoding="utf-8").replace("[/* runs */]", data)


LETTER, LINE, MARGIN = 7.85, 17, 12  # width and height of a character, and space on the left and right of a canvas
SECONDS, REST = 0.16, 3.0  # how long a frame is shown, and the last one


def animation(texts, names):
    """The SVG of the first text: a group for each frame, which CSS shows in turn."""
    sides = texts[0]
    frames = [list(history.frames()) for history in sides]
    n = min(39, max(len(history.steps) for history in sides))  # frames after the first
    total, (columns, pixel) = SECONDS * n + REST, size_canvas(sides)
    pane_width, groups, tallest = 2 * MARGIN + round(LETTER * columns), [], 0
    for i, steps in enumerate(moments(sides, n)):
        elements = []
        for side, (history, step) in enumerate(zip(sides, steps)):
            x, title = MARGIN + side * pane_width, f"step {step} of {len(history.steps)}"
            if len(sides) > 1:
                title = f"{names[side]}: {title}, {[0, *history.seconds][step]:.2f} s"
            elements.append(f'<text class="step" x="{x}" y="22">{escape(inert(title)[-columns:])}</text>')
            drawn, height = draw_canvas(*frames[side][step], history.pixels, x, columns, pixel)
            elements += drawn
            tallest = max(tallest, height)
        groups.append(f'<g style="animation-delay: {SECONDS * i - total:.2f}s">{"".join(elements)}</g>')
    width, height = len(sides) * pane_width, 46 + math.ceil(tallest)
    sizes = {"width": width, "height": height, "inner_width": width - 1, "inner_height": height - 1}
    times = {"total": total, "first": 100 * SECONDS / total, "last": 100 * REST / total}
    template = Path(__file__).with_name("animation.svg").read_text(encoding="utf-8")
    return template.format(**sizes, **times, steps=len(sides[0].steps), frames="\n".join(groups))


def size_canvas(sides):
    """How many columns a canvas has, and the side of a pixel, which is a line high if that is not too wide."""
    widest = max(history.pixels["columns"] if history.pixels else 0 for history in sides)
    columns = 72 if len(sides) == 1 else 48
    if all(history.pixels for history in sides):
        columns = max(36, math.ceil(LINE * widest / LETTER))
    return columns, min(LINE, LETTER * columns / max(1, widest))


def moments(sides, n):
    """The steps after which each canvas is shown in each of n + 1 frames: several of them at the same time."""
    if len(sides) == 1:
        return [(round(i * len(sides[0].steps) / max(1, n)),) for i in range(n + 1)]
    longest = max(history.seconds[-1] if history.seconds else 0 for history in sides)
    times = [longest * (i / max(1, n)) for i in range(n + 1)]
    return [tuple(bisect.bisect_right(history.seconds, time) for history in sides) for time in times]


def draw_canvas(tokens, kinds, pixels, x, columns, pixel):
    """SVG elements of a canvas from x on, and its height. At most 32 lines of text are shown."""
    text, picture = split_picture(tokens, pixels)
    lines, elements = visible(lines_of(text, kinds, columns), 32), []
    for y, line in enumerate(lines):
        spans = "".join(f'<tspan class="{kind}">{escape(c)}</tspan>' if kind else escape(c) for c, kind in line)
        elements.append(f'<text xml:space="preserve" x="{x}" y="{46 + LINE * y}">{spans}</text>')
    for i, row in enumerate(picture):
        left, top = x, 34 + LINE * len(lines) + i * pixel
        for black, run in itertools.groupby(blackness(token, pixels) for token in row):
            width, grey = pixel * len(list(run)), 255 - round(255 * (black or 0))
            paint = 'class="pixel"' if black is None else f'fill="#{grey:02x}{grey:02x}{grey:02x}"'
            elements.append(f'<path {paint} d="M{left:g} {top:g}h{width:g}v{pixel:g}h-{width:g}"/>')
            left += width
    return elements, LINE * len(lines) + pixel * len(picture)
