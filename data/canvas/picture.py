"""How a canvas filled, as a file: a page to step through, or an animated picture (`--save`)."""

import json
import os
from html import escape
from pathlib import Path

from data.canvas.history import lines_of, visible
from data.run.errors import Mistake
from data.run.files import replacing


def check_path(path):
    """Raise Mistake if save_histories cannot write there."""
    path = Path(path)
    if path.suffix not in (".html", ".svg"):
        raise Mistake(f"--save {path}: the name of a page ends in .html, that of a picture in .svg")
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise Mistake(f"--save {path}: it cannot be written there")


def save_histories(path, histories):
    """Write a page of how canvases filled, or a picture of the first, as the path's ending says."""
    save = save_html if Path(path).suffix == ".html" else save_svg
    save(path, histories)


def save_html(path, histories):
    """Write a page that shows how canvases filled."""
    page = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
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
