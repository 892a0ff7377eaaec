"""Saves how a canvas filled (`--save`): as a page to step through, or as an animated SVG."""

import bisect
import itertools
import json
import math
from html import escape
from pathlib import Path

from data.lib.escape import inert
from data.lib.files import replacing
from data.lib.history import lines_of, visible
from data.lib.pixels import shade, split_picture


def save_histories(path, texts, names=("",)):
    """Write a page of all texts, or an animation of the first. A text is a list of histories, one for each name."""
    content = page(texts, names) if Path(path).suffix == ".html" else animation(texts[0], names)
    with replacing(path) as file:
        file.write(content.encode())


def page(texts, names):
    def side(name, history):
        fields = "start", "holes", "steps", "seconds", "pixels"
        return {"name": name} | {field: getattr(history, field) for field in fields}

    data = json.dumps([list(map(side, names, sides)) for sides in texts], separators=(",", ":"))
    data = data.replace("<", "\\u003c")  # no text can end the script it is in
    return Path(__file__).with_name("page.html").read_text(encoding="utf-8").replace("[/* runs */]", data)


LETTER, LINE, MARGIN = 7.85, 17, 12  # width and height of a character, and space on the left and right of a canvas
SECONDS, REST = 0.16, 3.0  # how long a frame is shown, and the last one


def animation(sides, names):
    """The SVG of a text: a group for each frame, which CSS shows in turn."""
    n = min(39, max(len(history.steps) for history in sides))  # frames after the first
    total, columns = SECONDS * n + REST, 72 if len(sides) == 1 else 48
    width, groups, tallest = 2 * MARGIN + round(LETTER * columns), [""] * (n + 1), 0
    # Several canvases are shown as they were at the same time, one alone after the same number of steps.
    clocks = [history.seconds if len(sides) > 1 else range(1, 1 + len(history.steps)) for history in sides]
    for side, (name, history, clock) in enumerate(zip(names, sides, clocks)):
        frames, x = list(history.frames()), MARGIN + side * width
        for i in range(n + 1):
            step = bisect.bisect_right(clock, max(each[-1] for each in clocks) * (i / n))
            title = f"step {step} of {len(history.steps)}"
            if len(sides) > 1:
                title = f"{name}: {title}, {[0, *history.seconds][step]:.2f} s"
            drawing, height = draw_canvas(*frames[step], history.pixels, x, columns)
            groups[i] += f'<text class="step" x="{x}" y="22">{escape(inert(title)[-columns:])}</text>{drawing}'
            tallest = max(tallest, height)
    delays = (f"animation-delay: {SECONDS * i - total:.2f}s" for i in range(n + 1))
    drawn = "\n".join(f'<g style="{delay}">{group}</g>' for delay, group in zip(delays, groups))
    width, height = len(sides) * width, 46 + math.ceil(tallest)
    sizes = {"width": width, "height": height, "inner_width": width - 1, "inner_height": height - 1}
    times = {"total": total, "first": 100 * SECONDS / total, "last": 100 * REST / total}
    template = Path(__file__).with_name("animation.svg").read_text(encoding="utf-8")
    return template.format(**sizes, **times, steps=len(sides[0].steps), frames=drawn)


def draw_canvas(tokens, kinds, pixels, x, columns):
    """A canvas from x on in SVG, and its height. At most 32 lines of text are shown."""
    text, picture = split_picture(tokens, pixels)
    lines, drawn = visible(lines_of(text, kinds, columns), 32), ""
    for y, line in enumerate(lines):
        spans = "".join(f'<tspan class="{kind}">{escape(c)}</tspan>' if kind else escape(c) for c, kind in line)
        drawn += f'<text xml:space="preserve" x="{x}" y="{46 + LINE * y}">{spans}</text>'
    pixel = min(LINE, LETTER * columns / max(map(len, picture), default=1))  # a line high if that is not too wide
    for i, row in enumerate(picture):
        left, top = x, 34 + LINE * len(lines) + i * pixel
        for grey, run in itertools.groupby(shade(token, pixels, 255, 0) for token in row):
            paint = 'class="pixel"' if grey is None else f'fill="#{grey:02x}{grey:02x}{grey:02x}"'
            width = pixel * len(list(run))
            drawn += f'<path {paint} d="M{left:g} {top:g}h{width:g}v{pixel:g}h-{width:g}"/>'
            left += width
    return drawn, LINE * len(lines) + pixel * len(picture)
