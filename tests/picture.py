"""Draws the README's picture: six moments of one denoising run, as an SVG.

python tests/picture.py --ckpt out/ckpt.pt --prompt "def " > .github/denoising.svg
"""

import sys
from dataclasses import dataclass
from html import escape
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from data.flags import command, flag, parse
from model import autocast, load_checkpoint, pick_device
from sample import denoise, make_canvas

COLUMNS, LINES, STEPS, MOMENTS = 46, 11, 64, (1, 8, 20, 32, 48, 64)
CHAR, LINE, PAD = 7.25, 16, 14  # pixels
STYLE = """
  text { font: 12px ui-monospace, Menlo, Consolas, monospace; white-space: pre; fill: #57606a }
  rect { fill: #f6f8fa; stroke: #d0d7de }
  .hole { fill: #c4ccd4 } .new { fill: #0969da; font-weight: 600 } .prompt { fill: #1a7f37; font-weight: 600 }
  @media (prefers-color-scheme: dark) {
    text { fill: #8d96a0 } rect { fill: #161b22; stroke: #30363d }
    .hole { fill: #3d444d } .new { fill: #58a6ff } .prompt { fill: #3fb950 }
  }
"""


@dataclass
class PictureConfig:
    ckpt: str = flag("out/ckpt.pt", "checkpoint to sample from")
    prompt: str = flag("def ", "text to start from")
    temperature: float = flag(0.7, "divides the logits")
    seed: int = flag(0, "of the draw")


def lines_of(canvas, earlier, prompt, mask_id):
    """The canvas as lines of (character, class) pairs, wrapped and cut to the panel. One byte a character."""
    lines = [[]]
    for token, before, given in zip(canvas, earlier, prompt):
        kind = "hole" if token == mask_id else "prompt" if given else "new" if before == mask_id else ""
        if len(lines[-1]) == COLUMNS:
            lines.append([])
        if token == ord("\n"):
            lines.append([])
        else:
            lines[-1].append(("·" if token == mask_id else chr(token) if 32 <= token < 127 else " ", kind))
    return lines[:LINES]


def panel(x, y, title, lines):
    width, height = COLUMNS * CHAR + 2 * PAD, (LINES + 2) * LINE + PAD
    yield f'<rect x="{x}" y="{y}" width="{width:.0f}" height="{height}" rx="6"/>'
    yield f'<text x="{x + PAD}" y="{y + LINE + 4}">{title}</text>'
    for i, line in enumerate(lines):
        spans, kind_before = [], None
        for character, kind in line:
            if kind != kind_before:
                spans.append(f'</tspan><tspan class="{kind}">')
            spans.append(escape(character))
            kind_before = kind
        row = "".join(spans).removeprefix("</tspan>") + ("</tspan>" if spans else "")
        yield f'<text x="{x + PAD}" y="{y + (i + 2.4) * LINE:.0f}" xml:space="preserve">{row}</text>'


def main():
    config = PictureConfig(**parse(PictureConfig, __doc__.splitlines()[0]))
    device = pick_device("auto")
    model, tokenizer, _ = load_checkpoint(config.ckpt, device)
    canvas = make_canvas(config.prompt, None, tokenizer, model.config.block_size).to(device)
    prompt = (canvas != tokenizer.mask_id)[0].tolist()
    generator = torch.Generator().manual_seed(config.seed)
    with autocast(device):
        steps = denoise(model, canvas, STEPS, temperature=config.temperature, generator=generator)
        canvases = [canvas[0].tolist(), *(canvas[0].tolist() for canvas in steps)]

    width, height = COLUMNS * CHAR + 2 * PAD + 12, (LINES + 2) * LINE + PAD + 12
    print(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {3 * width:.0f} {2 * height}" role="img">')
    print("<title>A canvas of masks becomes text: six moments of 64 denoising steps</title>")
    print(f"<style>{STYLE}</style>")
    for i, moment in enumerate(MOMENTS):
        earlier = canvases[max(0, moment - 2)]
        lines = lines_of(canvases[moment], earlier, prompt, tokenizer.mask_id)
        x, y = 1 + i % 3 * width, 1 + i // 3 * height
        print(*panel(round(x), round(y), f"step {moment} of {STEPS}", lines), sep="\n")
    print("</svg>")


if __name__ == "__main__":
    command(main)
