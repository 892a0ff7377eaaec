"""The picture on a canvas that has one, as the terminal shows it: two pixels in each character."""

from data.lib.escape import inert

HOLE_COLOUR = 67  # of a terminal's 256: a blue
BLACK, WHITE = 232, 255  # and its greys, which end with white


def split_picture(tokens, pixels):
    """The tokens of a canvas that are text, and the rows of its picture, lists of tokens. pixels: which are
    the picture, as a tokenizer says; or None.
    """
    if pixels is None:
        return tokens, []
    first, width = pixels["first"], pixels["columns"]
    return tokens[:first], [tokens[i : i + width] for i in range(first, len(tokens), width)]


def as_text(tokens, pixels):
    """The tokens of a canvas, list[str], as text: a line for each row of a picture."""
    text, rows = split_picture(tokens, pixels)
    return "\n".join(["".join(text), *map("".join, rows)])


def share_of_black(token, pixels):
    """In [0, 1] for a pixel's token; None for a hole, whose token is none of the greys."""
    grey = pixels["greys"].find(token)
    return None if grey < 0 else grey / (len(pixels["greys"]) - 1)


def half_blocks(rows, pixels, width=None):
    """Rows of a picture as lines of a terminal, `width` columns at most: (text, columns) each."""

    def colour(token):
        black = share_of_black(token, pixels)
        return HOLE_COLOUR if black is None else round(WHITE + (BLACK - WHITE) * black)

    lines = []
    for i in range(0, len(rows), 2):
        upper, lower = rows[i][:width], rows[i + 1][:width] if i + 1 < len(rows) else []
        cells = [f"\x1b[38;5;{colour(token)}" for token in upper]
        cells = [f"{cell};48;5;{colour(token)}" for cell, token in zip(cells, lower)] or cells
        lines.append(("".join(f"{cell}m▀" for cell in cells) + "\x1b[0m", len(cells)))
    return lines


def as_shown(text, tokenizer):
    """The text of a canvas as a terminal shows it: what does something is inert, a pixel is a pixel."""
    if tokenizer.pixels is None:
        return inert(text)
    caption, *rows = text.split("\n")
    return "\n".join([inert(caption), *(line for line, _ in half_blocks(rows, tokenizer.pixels))])
