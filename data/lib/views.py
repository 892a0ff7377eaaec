"""Saves how a canvas filled (`--save`): as a page to step through, or as an animated SVG."""

import bisect
import itertools
import json
import math
from html import escape
from pathlib import Path

from data.lib.escape import inert
from data.lib.files import replacing
from data.lib.layout import lines_of, shade, split_picture

LETTER, LINE, MARGIN = 7.85, 17, 12  # width and height of a character, and the space beside the text
SECONDS, REST = 0.16, 3.0  # how long a frame is shown, and the last one
RUN = "name", "about", "prompt", "seed", "start", "holes", "steps", "seconds", "pixels"  # fields of a History in a page


def save_histories(path, texts, command=""):
    """Write a page of all texts, each a list of histories side by side, or an animation of the first text."""
    if Path(path).suffix == ".html":
        content = page([list(map(run_of, sides)) for sides in texts], command)
    else:
        content = animation(texts[0])
    with replacing(path) as file:
        file.write(content.encode())


def run_of(history):
    """A history as the page reads it."""
    return {name: getattr(history, name) for name in RUN}


def page(texts, command="", live=None):
    """The page of texts, each a list of what `run_of` returns. live: the models, orders and flags of a served page."""
    data = json.dumps({"texts": texts, "command": command, "live": live}, separators=(",", ":"))
    data = data.replace("<", "\\u003c")  # no text can end the script it is in
    return Path(__file__).with_name("page.html").read_text(encoding="utf-8").replace("{/* data */}", data)


def animation(sides):
    """The SVG of a text, or of several side by side: a group for each frame, which CSS shows in turn."""
    columns = {1: 72, 2: 48}.get(len(sides), 32)
    panel, height = 2 * MARGIN + round(LETTER * columns), 0
    frames = [list(history.frames()) for history in sides]
    n = min(39, max(len(history.steps) for history in sides))  # frames after the first
    width, total, groups = panel * len(sides), SECONDS * n + REST, []
    for i in range(n + 1):
        group, time = "", i / n * max(history.seconds[-1] for history in sides)  # several are shown at the same time
        for side, history in enumerate(sides):
            step = bisect.bisect_right(history.seconds, time) if len(sides) > 1 else round(i / n * len(history.steps))
            title = f"step {step} of {len(history.steps)}"
            if len(sides) > 1:
                title = f"{history.name}: {title}, {[0, *history.seconds][step]:.2f} s"[-columns:]
            drawing, bottom = draw_canvas(*frames[side][step], history.pixels, columns, MARGIN + side * panel)
            group += f'<text class="step" x="{MARGIN + side * panel}" y="22">{escape(inert(title))}</text>{drawing}'
            height = max(height, math.ceil(bottom) + MARGIN)
        groups.append(f'<g style="animation-delay: {SECONDS * i - total:.2f}s">{group}</g>')
    sizes = {"width": width, "height": height, "inner_width": width - 1, "inner_height": height - 1}
    times = {"total": total, "first": 100 * SECONDS / total, "last": 100 * REST / total}
    template = Path(__file__).with_name("animation.svg").read_text(encoding="utf-8")
    return template.format(**sizes, **times, steps=len(sides[0].steps), frames="\n".join(groups))


def draw_canvas(tokens, kinds, pixels, columns, x):
    """A canvas in SVG, and where it ends. At most 32 lines of text are shown."""
    text, picture = split_picture(tokens, pixels)
    top, drawn = 34, ""
    for line in lines_of(text, kinds, columns, 32):
        spans = "".join(f'<tspan class="{kind}">{escape(c)}</tspan>' if kind else escape(c) for c, kind in line)
        drawn += f'<text xml:space="preserve" x="{x}" y="{top + 12}">{spans}</text>'
        top += LINE
    side = min(LINE, LETTER * columns / max(map(len, picture), default=1))  # a line high if that is not too wide
    for row in picture:
        left = x
        for grey, run in itertools.groupby(shade(token, pixels, 255, 0) for token in row):
            paint = 'class="pixel"' if grey is None else f'fill="#{grey:02x}{grey:02x}{grey:02x}"'
            width = side * len(list(run))
            drawn += f'<path {paint} d="M{left:g} {top:g}h{width:g}v{side:g}h-{width:g}"/>'
            left += width
        top += side
    return drawn, top
