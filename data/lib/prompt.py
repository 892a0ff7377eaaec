"""A prompt as canvases: `<mask>` is a hole in it, `<mask*8>` are eight, `<mask*4:12>` any length of these."""

import itertools
import math
import re
import sys
from pathlib import Path

from data.lib.errors import Mistake

MOST = 10**6  # tokens of a canvas
MASK_TAG = re.compile(r"<mask(\*[^>]*|[:\d][\d:*-]*)?>")  # or a slip, <mask:8>, which is refused


def split_prompt(prompt):
    """A prompt as its texts and, between them, the lengths that each hole may have, a range."""
    parts, end = [], 0
    for hole in MASK_TAG.finditer(prompt):
        size = re.fullmatch(r"\*(\d+)(?::(\d+))?", hole[1] or "*1")
        lengths = range(int(size[1]), int(size[2] or size[1]) + 1) if size else range(0)
        if not (lengths and lengths[0]):
            raise Mistake(
                f"--prompt: {hole[0]}: a hole is <mask>, <mask*8> or, with 4 to 12 tokens, <mask*4:12>"
            )
        parts += [prompt[end : hole.start()], lengths]
        end = hole.end()
    return [*parts, prompt[end:]]


def check_prompts(prompts, suffix, length):
    """Raise Mistake for what is wrong with prompts on canvases of `length` tokens whatever the model."""
    for text in (*prompts, suffix):
        if re.search("[\ud800-\udfff]", text):  # what Python makes of bytes that are no text
            raise Mistake("--prompt: it is not UTF-8")
    n_holes = max(sum(part[0] for part in split_prompt(text) if isinstance(part, range)) for text in prompts)
    if n_holes > length:
        raise Mistake(f"--prompt: {n_holes} holes; the canvas has {length} tokens (--length)")
    if MASK_TAG.search(suffix):
        raise Mistake("--suffix: holes go into --prompt, which may have several")


def standing(ids, tokenizer):
    """ids, with holes ahead of each token that may not stand where it would, up to the next place where it
    may. Mistake for one that no place is left for.
    """
    places = [range(first, end) for n, first, end in tokenizer.kinds for _ in range(n)]
    placed = []
    for i in ids:
        while i != tokenizer.mask_id and len(placed) < len(places) and i not in places[len(placed)]:
            placed.append(tokenizer.mask_id)
        placed.append(i)
        if places and len(placed) > len(places):
            sizes, piece = " and ".join(str(n) for n, _, _ in tokenizer.kinds), tokenizer.pieces([i])[0]
            raise Mistake(f"{piece!r} has no place left on the model's canvas, of {sizes} tokens of a kind")
    return placed


def make_canvases(prompt, suffix, length, tokenizer, block_size):
    """The canvases of a prompt, lists of ids, one for every choice of lengths in its ranges.

    Its tokens, holes up to `length` tokens in all, and the suffix. Without a length: as many tokens as the
    prompt with its holes has, or block_size if it has none. The canvas begins with the token that opens
    a line, where there is one, and ends with the one that closes it if the end is known: by a suffix, or
    by holes and no length. Where places have kinds, the canvas has all of them, and text goes to the next
    place where it may stand.
    """
    parts = split_prompt(prompt)
    if tokenizer.kinds and length not in (None, tokenizer.canvas_len):
        raise Mistake(f"--length {length}: the model's canvas has {tokenizer.canvas_len} tokens")
    own = length is None and len(parts) > 1 and not tokenizer.kinds
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    end = [] if tokenizer.eos_id is None or not (own or suffix) else [tokenizer.eos_id]
    parts = [part if isinstance(part, range) else tokenizer.encode(part) for part in parts]
    suffix = tokenizer.encode(suffix) + end
    n_text = len(begin) + len(suffix) + sum(len(part) for part in parts if isinstance(part, list))
    ranges = [part for part in parts if isinstance(part, range)]
    longest = n_text + sum(lengths[-1] for lengths in ranges)
    T = tokenizer.canvas_len or length or max(longest if own else 0, block_size)
    if longest > min(T, MOST):
        raise Mistake(f"--prompt: {longest} tokens with its holes; the canvas has {min(T, MOST)} (--length)")
    if math.prod(map(len, ranges)) > 64:
        raise Mistake(f"--prompt: {math.prod(map(len, ranges))} choices of lengths; at most 64 are tried")
    canvases = []
    for lengths in itertools.product(*ranges):
        sizes = iter(lengths)
        filled = (part if isinstance(part, list) else [tokenizer.mask_id] * next(sizes) for part in parts)
        ids = standing(begin + list(itertools.chain(*filled)), tokenizer)
        rest = 0 if own else T - len(ids) - len(suffix)
        canvases.append(standing(ids + [tokenizer.mask_id] * rest + suffix, tokenizer))
    return canvases


def shown_of(ids, canvas, mask_id, end_ids, start=0):
    """What is shown, from start on, of ids, which filled a canvas: what comes before an end that was written
    after all of the prompt.
    """
    last = max((i for i, token in enumerate(canvas) if token != mask_id), default=-1)
    end = next((i for i in range(last + 1, len(ids)) if ids[i] in end_ids), len(ids))
    return ids[start:end]


def read_text(path):
    """The UTF-8 text of a file, or of stdin for -."""
    try:
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
        return data.decode()
    except OSError as error:
        raise Mistake(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise Mistake(f"{path}: it is not UTF-8") from None
