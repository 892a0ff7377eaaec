"""Lays out a canvas for a terminal or an animation: text in lines, and a picture in rows of pixels."""

import itertools
import shutil
import textwrap
import unicodedata

from data.lib.escape import inert


def columns(c):
    """How many columns a character takes in a terminal."""
    return 0 if unicodedata.category(c) in ("Mn", "Me", "Cf") else 2 if unicodedata.east_asian_width(c) in "WF" else 1


def lines_of(tokens, kinds, width, room):
    """Wrap tokens after `width` columns: at most `room` lines of (text, kind) runs, around the newest token."""
    lines, used, newest = [[]], 0, 0
    for c, kind in ((c, kind) for token, kind in zip(tokens, kinds) for c in token):
        c = " " * min(8 - used % 8, width) if c == "\t" else c
        size = sum(map(columns, c))
        if c == "\n" or used + size > width:
            lines.append([])
            used = 0
        if c != "\n":
            used += size
            before = lines[-1].pop()[0] if lines[-1] and lines[-1][-1][1] == kind else ""
            lines[-1].append((before + c, kind))
            newest = len(lines) - 1 if kind in ("new", "draft") else newest
    first = max(0, min(newest - room // 2, len(lines) - room))
    return lines[first : first + room]


def split_picture(tokens, pixels):
    """Split a canvas into the caption's tokens and the rows of the picture. pixels: the tokenizer's, or None."""
    if pixels is None:
        return tokens, []
    first, width = pixels["first"], pixels["columns"]
    return tokens[:first], [tokens[i : i + width] for i in range(first, len(tokens), width)]


def shade(token, pixels, white, black):
    """The grey of a pixel's token on a scale from white to black, rounded; None for a hole."""
    i = pixels["greys"].find(token)
    return None if i < 0 else round(white + (black - white) * i / (len(pixels["greys"]) - 1))


def half_blocks(rows, pixels, width=None):
    """Rows of a picture as lines of a terminal, two rows in each, cut after `width` columns."""
    # In the terminal's 256 colours the greys run from 232 (black) to 255 (white), and 67 is a blue.
    colours, lines = [[shade(token, pixels, 255, 232) or 67 for token in row[:width]] for row in rows], []
    for upper, lower in itertools.zip_longest(colours[::2], colours[1::2]):
        cells = [f"38;5;{colour}" for colour in upper]
        if lower:
            cells = [f"{cell};48;5;{colour}" for cell, colour in zip(cells, lower)]
        lines.append("".join(f"\x1b[{cell}m▀" for cell in cells) + "\x1b[0m")
    return lines


def as_shown(text, tokenizer):
    """The decoded text of a canvas as a terminal shows it: safe, and with pixels for a picture."""
    if tokenizer.pixels is None:
        return inert(text)
    caption, *rows = text.split("\n")
    return "\n".join([inert(caption), *half_blocks(rows, tokenizer.pixels)])


def wrapped(sentence):
    """A sentence in lines that fit the terminal, broken between words. In a file it is one line."""
    return textwrap.fill(sentence, shutil.get_terminal_size((10**6, 0)).columns)
