"""Wraps the tokens of a canvas into lines, for a terminal or an animation."""

import unicodedata


def columns(c):
    """How many columns a character takes in a terminal."""
    if unicodedata.category(c) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(c) in "WF" else 1


def lines_of(tokens, kinds, width):
    """Wrap tokens, list[str], after `width` columns: lines of (text, kind) runs, with spaces for tabs."""
    lines, used = [[]], 0
    for token, kind in zip(tokens, kinds):
        for c in token:
            c = " " * min(8 - used % 8, width) if c == "\t" else c
            size = 0 if c == "\n" else sum(map(columns, c))
            if c == "\n" or used + size > width:
                lines.append([])
                used = 0
            if c == "\n":
                continue
            used += size
            if lines[-1] and lines[-1][-1][1] == kind:
                c = lines[-1].pop()[0] + c
            lines[-1].append((c, kind))
    return lines


def visible(lines, room):
    """At most `room` of the lines, around the last one that has a new token."""
    newest = max((i for i, line in enumerate(lines) if any(kind == "new" for _, kind in line)), default=0)
    first = max(0, min(newest - room // 2, len(lines) - room))
    return lines[first : first + room]
