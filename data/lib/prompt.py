"""Turns a prompt into a canvas: `<mask>` is a hole in it, and `<mask*8>` is eight."""

import contextlib
import re
import sys

from data.lib.errors import Mistake

MOST = 10**6  # the most tokens in one hole
MASK_TAG = re.compile(r"(<mask>|(?i:<\s*mask\s*\*[^<>]*>))")  # also near misses such as <Mask*3>, which are refused


def standing(ids, tokenizer):
    """If a tokenizer has kinds, insert holes before each id so that it lands on the next place that accepts it.

    Mistake if there is no such place, or no picture with such a caption.
    """
    places, placed = [range(first, end) for n, first, end in tokenizer.kinds for _ in range(n)], []
    for i in ids:
        while i != tokenizer.mask_id and len(placed) < len(places) and i not in places[len(placed)]:
            placed.append(tokenizer.mask_id)
        placed.append(i)
        if places and len(placed) > len(places):
            raise Mistake(f"{tokenizer.pieces([i])[0]!r} has no place left on the model's canvas")
    names = [name.ljust(tokenizer.caption).encode() for name in tokenizer.names]
    if names and not any(all(i in (tokenizer.mask_id, c) for i, c in zip(placed, name)) for name in names):
        caption = prompt_of(placed[: tokenizer.caption], tokenizer).strip()
        raise Mistake(f"no picture is called {caption!r}; there are {', '.join(tokenizer.names)}")
    return placed


def make_canvas(prompt, suffix, length, tokenizer, context):
    """The canvas of a prompt, a list of ids: the prompt, holes up to `length` tokens in all, and the suffix.

    Without a length, holes fill the context, unless the prompt has its own. If the text may go on after the canvas, it
    gets no closing token. A space before a hole is left to the hole if tokens begin with spaces, as RoBERTa does.
    """
    if MASK_TAG.search(suffix):
        raise Mistake("--suffix: holes go into --prompt, which may have several")
    if tokenizer.kinds and length not in (None, tokenizer.canvas_len):
        raise Mistake(f"--length {length}: the model's canvas has {tokenizer.canvas_len} tokens")
    parts = MASK_TAG.split(prompt)  # text, a hole, text, .., text
    is_whole = length is None and len(parts) > 1 and not tokenizer.kinds  # there are no holes but the prompt's
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for i, part in enumerate(parts):
        if i % 2 == 0:
            at_hole = tokenizer.begins_with_space and (i + 1 < len(parts) or not is_whole)
            encode = tokenizer.encode_rest if i else tokenizer.encode
            ids += encode(part.removesuffix(" ") if at_hole else part)
        elif (size := re.fullmatch(r"<mask(?:\*(\d{1,7}))?>", part)) and 0 < int(size[1] or 1) <= MOST:
            ids += [tokenizer.mask_id] * int(size[1] or 1)
        else:
            raise Mistake(f"--prompt: {part}: a hole is <mask>, and eight are <mask*8>; at most {MOST:,}")
    closes = tokenizer.eos_id is not None and (is_whole or suffix)
    after = tokenizer.encode_rest(suffix) + [tokenizer.eos_id] * bool(closes)
    n = len(ids) + len(after)
    T = tokenizer.canvas_len or length or (n if is_whole else context)
    if n > T:
        raise Mistake(f"--prompt: {n} tokens with its holes; the canvas has {T} (--length)")
    ids = standing(ids, tokenizer)
    return standing(ids + [tokenizer.mask_id] * (T - len(ids) - len(after)) + after, tokenizer)


def prompt_of(ids, tokenizer):
    """A canvas, a list of ids, written as a prompt, for captions. It is empty if there are only holes."""
    text = tokenizer.decode(ids)
    text = re.sub(r"(?:<mask>){2,}", lambda holes: f"<mask*{len(holes[0]) // len('<mask>')}>", text)
    return "" if set(ids) == {tokenizer.mask_id} else text


def shown_of(ids, canvas, mask_id, end_ids):
    """The ids that filled a canvas, up to the first end that the model wrote after the prompt."""
    last = max((i for i, token in enumerate(canvas) if token != mask_id), default=-1)
    return ids[: next((i for i in range(last + 1, len(ids)) if ids[i] in end_ids), None)]


def read_text(path, most=-1):
    """The UTF-8 text of a file, or of stdin for `-`. Mistake if it has more than `most` bytes (-1: any number)."""
    with contextlib.nullcontext(sys.stdin.buffer) if path == "-" else open(path, "rb") as file:
        content = file.read(most + 1 if most >= 0 else -1)
    if len(content) > most >= 0:
        raise Mistake(f"{path}: a prompt of more than {most:,} bytes")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise Mistake(f"{path}: it is not UTF-8") from None
