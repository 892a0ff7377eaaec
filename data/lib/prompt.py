"""A prompt as a canvas: `<mask>` is a hole in it, and `<mask*8>` are eight."""

import re
import sys
from pathlib import Path

from data.lib.errors import Mistake

MOST = 10**6  # tokens of a canvas
MASK_TAG = re.compile(r"<mask(\*[^>]*|[:\d][\d:*-]*)?>")  # or a slip, <mask:8>, which is refused


def split_prompt(prompt):
    """A prompt as its texts, str, and between them the number of holes, int."""
    parts, end = [], 0
    for hole in MASK_TAG.finditer(prompt):
        size = re.fullmatch(r"\*(\d+)", hole[1] or "*1")
        if not (size and int(size[1])):
            raise Mistake(f"--prompt: {hole[0]}: a hole is <mask>, and eight of them are <mask*8>")
        parts += [prompt[end : hole.start()], int(size[1])]
        end = hole.end()
    return [*parts, prompt[end:]]


def check_prompts(prompts, suffix, length):
    """Raise Mistake for what is wrong with prompts on canvases of `length` tokens whatever the model."""
    for text in (*prompts, suffix):
        if re.search("[\ud800-\udfff]", text):  # what Python makes of bytes that are no text
            raise Mistake("--prompt: it is not UTF-8")
    n_holes = max(sum(part for part in split_prompt(text) if isinstance(part, int)) for text in prompts)
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


def make_canvas(prompt, suffix, length, tokenizer, context):
    """The canvas of a prompt, a list of ids: its tokens, holes up to `length` tokens in all, and the suffix.

    Without a length it has as many tokens as the prompt with its holes, or `context` if the prompt has none.
    If the tokenizer has tokens that open and close a line, the canvas begins with the first. It ends with the second
    if its end is known, because there is a suffix, or holes and no length. If places have kinds, the canvas has all
    places, and text goes to the next one where it may stand.
    """
    parts = split_prompt(prompt)
    if tokenizer.kinds and length not in (None, tokenizer.canvas_len):
        raise Mistake(f"--length {length}: the model's canvas has {tokenizer.canvas_len} tokens")
    own = length is None and len(parts) > 1 and not tokenizer.kinds
    ids = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    for part in parts:
        ids += [tokenizer.mask_id] * part if isinstance(part, int) else tokenizer.encode(part)
    suffix = tokenizer.encode(suffix) + [tokenizer.eos_id] * (tokenizer.eos_id is not None and bool(own or suffix))
    n = len(ids) + len(suffix)
    T = tokenizer.canvas_len or length or max(n if own else 0, context)
    if n > min(T, MOST):
        raise Mistake(f"--prompt: {n} tokens with its holes; the canvas has {min(T, MOST)} (--length)")
    ids = standing(ids, tokenizer)
    rest = 0 if own else T - len(ids) - len(suffix)
    return standing(ids + [tokenizer.mask_id] * rest + suffix, tokenizer)


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
