"""Saves how a canvas filled (`--save`): as a page to step through, or as an animated SVG."""

import itertools
import json
import math
from html import escape
from pathlib import Path

from data.lib.files import replacing
from data.lib.layout import lines_of, shade, split_picture


def save_histories(path, texts):
    """Write a page of all texts, each a list of histories side by side, or an animation of the first history."""
    if Path(path).suffix == ".html":
        fields = "name", "start", "holes", "steps", "seconds", "pixels"
        runs = [[{field: getattr(history, field) for field in fields} for history in sides] for sides in texts]
        data = json.dumps(runs, separators=(",", ":")).replace("<", "\\u003c")  # no text can end the script it is in
        content = Path(__file__).with_name("page.html").read_text(encoding="utf-8").replace("[/* runs */]", data)
    else:
        content = animation(texts[0][0])
    with replacing(path) as file:
        file.write(content.encode())


COLUMNS, LETTER, LINE, MARGIN = 72, 7.85, 17, 12  # characters in a line, their width and height, and space beside them
SECONDS, REST = 0.16, 3.0  # how long a frame is shown, and the last one


def animation(history):
    """The SVG of a text: a group for each frame, which CSS shows in turn."""
    frames, n_steps = list(history.frames()), len(history.steps)
    n = min(39, n_steps)  # frames after the first
    total, groups, width, height = SECONDS * n + REST, [], 2 * MARGIN + round(LETTER * COLUMNS), 0
    for i in range(n + 1):
        step = round(i * n_steps / n)
        drawing, bottom = draw_canvas(*frames[step], history.pixels)
        height = max(height, math.ceil(bottom) + MARGIN)
        title = f'<text class="step" x="{MARGIN}" y="22">step {step} of {n_steps}</text>'
        groups.append(f'<g style="animation-delay: {SECONDS * i - total:.2f}s">{title}{drawing}</g>')
    sizes = {"width": width, "height": height, "inner_width": width - 1, "inner_height": height - 1}
    times = {"total": total, "first": 100 * SECONDS / total, "last": 100 * REST / total}
    template = Path(__file__).with_name("animation.svg").read_text(encoding="utf-8")
    return template.format(**sizes, **times, steps=n_steps, frames="\n".join(groups))


def draw_canvas(tokens, kinds, pixels):
    """A canvas in SVG, and where it ends. At most 32 lines of text are shown."""
    text, picture = split_picture(tokens, pixels)
    top, drawn = 34, ""
    for line in lines_of(text, kinds, COLUMNS, 32):
        spans = "".join(f'<tspan class="{kind}">{escape(c)}</tspan>' if kind else escape(c) for c, kind in line)
        drawn += f'<text xml:space="preserve" x="{MARGIN}" y="{top + 12}">{spans}</text>'
        top += LINE
    side = min(LINE, LETTER * COLUMNS / max(map(len, picture), default=1))  # a line high if that is not too wide
    for row in picture:
        left = MARGIN
        for grey, run in itertools.groupby(shade(token, pixels, 255, 0) for token in row):
            paint = 'class="pixel"' if grey is None else f'fill="#{grey:02x}{grey:02x}{grey:02x}"'
            width = side * len(list(run))
            drawn += f'<path {paint} d="M{left:g} {top:g}h{width:g}v{side:g}h-{width:g}"/>'
            left += width
        top += side
    return drawn, top
