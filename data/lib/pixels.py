"""Shows a canvas that holds a picture, in a terminal: each character is two pixels, one above the other."""

from data.lib.escape import inert

HOLE_COLOUR, BLACK, WHITE = 67, 232, 255  # in 256 colours: a blue, and the ends of the greys


def split_picture(tokens, pixels):
    """Split a canvas into the caption's tokens and the rows of the picture. pixels: the tokenizer's, or None."""
    if pixels is None:
        return tokens, []
    first, width = pixels["first"], pixels["columns"]
    return tokens[:first], [tokens[i : i + width] for i in range(first, len(tokens), width)]


def blackness(token, pixels):
    """How black a pixel's token is, in [0, 1]; None for a hole."""
    grey = pixels["greys"].find(token)
    return None if grey < 0 else grey / (len(pixels["greys"]) - 1)


def half_blocks(rows, pixels, width=None):
    """Rows of a picture as lines of a terminal, cut after `width` columns: (text, columns) each."""

    def colour(token):
        black = blackness(token, pixels)
        return HOLE_COLOUR if black is None else round(WHITE + (BLACK - WHITE) * black)

    lines = []
    for i in range(0, len(rows), 2):
        cells = [f"\x1b[38;5;{colour(token)}" for token in rows[i][:width]]
        if i + 1 < len(rows):
            cells = [f"{cell};48;5;{colour(token)}" for cell, token in zip(cells, rows[i + 1])]
        lines.append(("".join(f"{cell}m▀" for cell in cells) + "\x1b[0m", len(cells)))
    return lines


def as_shown(text, tokenizer):
    """The decoded text of a canvas as a terminal shows it: safe, and with pixels for a picture."""
    if tokenizer.pixels is None:
        return inert(text)
    caption, *rows = text.split("\n")
    return "\n".join([inert(caption), *(line for line, _ in half_blocks(rows, tokenizer.pixels))])
