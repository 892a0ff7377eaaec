"""Writes corpora, loads them, and reads windows of their tokens.

A corpus is a folder with token ids in train.bin and val.bin, and with meta.json, which has the tokenizer and counts. A
split is running text, canvases (captioned pictures), or examples (prompts with replies, which .rows files list).
"""

import hashlib
import json
import re
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tiktoken

from data.lib.byte_pairs import PATTERN, learn_byte_pairs
from data.lib.chat import Chat
from data.lib.errors import Mistake
from data.lib.files import replacing
from data.lib.tokenizer import BPETokenizer, ByteTokenizer, tokenizer_from_state

DATA = Path(__file__).resolve().parents[1]  # the folder data/
SPLITS = ("train", "val")
SCRIPT_FOLDERS = {"wikitext2": "wikitext", "wikitext103": "wikitext", "enwik8": "text8", "mnist": "digits"}


def check_name(name):
    """Raise Mistake if data/ can't have this folder, or if it belongs to another script than the one that runs."""
    if name in ("", ".", "..") or Path(name).name != name:
        raise Mistake(f"--name {name}: a corpus is one folder of data/, so it needs a name, not a path")
    own = Path(getattr(sys.modules["__main__"], "__file__", "")).resolve().parent
    if own != DATA / name and any((DATA / name).glob("*.py")):
        raise Mistake(f"--name {name}: data/{name} is this project's own folder; choose another name")


class BytePairs(NamedTuple):
    """The tokenizer `bpe:N`, whose n tokens `write_corpus` has to learn from the training split."""

    n: int
    template, state, special = None, {"kind": "bpe"}, {}  # conversations need a token that ends a text; it has none


def write_corpus(name, pieces, tokenizer, source, by_line=False, least=1):
    """Write data/NAME from (split, text) pairs, which are read one at a time. by_line: each text is a line.

    least: the fewest tokens that a split may have.
    """
    if isinstance(tokenizer, BytePairs):
        pieces = [*pieces]  # read twice
        tokens = learn_byte_pairs((text for split, text in pieces if split == "train"), tokenizer.n)
        tokenizer = BPETokenizer([token.decode("latin-1") for token in tokens], PATTERN)
    encode = tokenizer.encode_line if by_line else tokenizer.encode
    encoded = (  # if a special token replaces the newline, the newline's byte doesn't count
        (split, ids := encode(text), len(text.encode()) - (text.endswith("\n") and tokenizer.eos_id in ids))
        for split, text in pieces
    )
    return write_tokens(name, encoded, tokenizer, source, least=least)


def write_tokens(name, pieces, tokenizer, source, template=None, least=1):
    """Write data/NAME from (split, ids, bytes) or, with a template, (split, ids, bytes of the reply, prompt length)."""
    check_name(name)
    counts, digests = {split: Counter() for split in SPLITS}, {split: hashlib.sha256() for split in SPLITS}
    occurrences, kinds = np.zeros(tokenizer.vocab_size, np.int64), ("bin", "rows") if template else ("bin",)
    names = "meta.json", *(f"{split}.{kind}" for kind in kinds for split in SPLITS)
    with ExitStack() as stack:  # when it exits without an error, it renames the files, meta.json last
        files = {file: stack.enter_context(replacing(DATA / name / file)) for file in names}
        for split, ids, n_bytes, *prompt_len in pieces:
            ids = np.asarray(ids, np.min_scalar_type(tokenizer.vocab_size - 1))
            row = np.array([counts[split]["tokens"], *prompt_len], np.int64)
            for kind, array in zip(kinds, (ids, row)):
                files[f"{split}.{kind}"].write(array)
                digests[split].update(array)
            counts[split].update(tokens=len(ids), bytes=n_bytes, examples=len(prompt_len))
            if split == "train":
                np.add.at(occurrences, ids, 1)
        for split in SPLITS:
            n = counts[split]["tokens"]
            if n < least or not counts[split]["bytes"]:
                raise Mistake(f"{source}: too little text, its {split} split has {n} tokens; {least} are needed")
            counts[split]["sha256"] = digests[split].hexdigest()
        meta = {"source": str(source), **counts, "tokenizer": tokenizer.state, "occurrences": occurrences.tolist()}
        meta |= {"chat": template} if template else {}
        files["meta.json"].write(json.dumps(meta, indent=1).encode())
    print(f"{DATA / name}: {counts['train']['tokens']:,} train, {counts['val']['tokens']:,} val tokens")
    return meta


def split_at(pieces, cut):
    """Turn pieces of text into (split, text) pairs. The first `cut` bytes train, rounded to whole characters."""
    for text in pieces:
        data = text.encode("utf-8")
        head = data[: max(0, cut)].decode("utf-8", errors="ignore")
        cut -= len(data)
        yield from (("train", head), ("val", text[len(head) :]))


def read_pieces(path, size=1 << 20):
    """Yield the text of a UTF-8 file about a megabyte at a time, in whole lines unless one is very long."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            while text := file.read(size):
                yield text + file.readline(size)
    except UnicodeDecodeError as error:
        raise Mistake(f"{path}: not UTF-8 text ({error.reason})") from None


def load_corpus(name, context=1):
    """Load data/NAME as (train, val, tokenizer, meta). A split is an array of ids, or Examples of `context` tokens."""
    folder = DATA / name
    if name == "python" and not (folder / "meta.json").exists():
        print("data/python is not there yet: making it from this Python's standard library", flush=True)
        if subprocess.run([sys.executable, folder / "prepare.py"]).returncode:
            sys.exit(2)  # it has said why
    if not (folder / "meta.json").exists():
        ready = ", ".join(sorted(path.parent.name for path in DATA.glob("*/meta.json"))) or "none"
        script = f"{SCRIPT_FOLDERS[name]}/prepare.py {name}" if name in SCRIPT_FOLDERS else f"{name}/prepare.py"
        script = script if (DATA / script.split()[0]).exists() else "text/prepare.py FILE --name NAME"
        raise Mistake(f"--data {name}: no such corpus; ready are: {ready}; `python data/{script}` makes one")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        tokenizer, occurrences = tokenizer_from_state(meta["tokenizer"]), meta["occurrences"]
        if len(occurrences) != tokenizer.vocab_size or not all(type(n) is int and 0 <= n < 2**62 for n in occurrences):
            raise ValueError("its occurrences can't be")
        splits = [open_split(folder, split, meta, tokenizer, context) for split in SPLITS]
    except Exception as error:
        raise Mistake(f"{folder}: not a whole corpus ({str(error)[:200]}); prepare it again") from None
    for split, tokens in zip(SPLITS, splits):
        meta[split]["tokens"] = n = len(tokens)  # includes the padding of examples
        if "chat" in meta and (longest := tokens.lengths.max()) > context:
            raise Mistake(f"--context {context}: an example of {longest} tokens needs --context {longest}")
        if n < context:
            raise Mistake(f"--data {name}: its {split} split has {n} tokens, fewer than one --context of {context}")
    return *splits, tokenizer, meta


def open_split(folder, split, meta, tokenizer, context):
    """Open a split as memory-mapped tokens, or as Examples. Raises some error if its files don't fit meta.json."""
    tokens = np.memmap(folder / f"{split}.bin", np.min_scalar_type(tokenizer.vocab_size - 1), "r")
    tokens.vocab_size, counts = tokenizer.vocab_size, meta[split]  # windows_at checks the ids that it reads
    if len(tokens) != counts["tokens"] or not 0 < counts["bytes"] < 2**62 or type(counts["sha256"]) is not str:
        raise ValueError(f"{split}.bin is not what meta.json says")
    if "chat" in meta:
        rows = np.fromfile(folder / f"{split}.rows", np.int64).reshape(counts["examples"], 2)
        return Examples(tokens, rows, Chat(meta["chat"], tokenizer).end_id, context)
    if tokenizer.kinds:  # canvases are examples of one length without prompts
        starts = np.arange(0, len(tokens), tokenizer.canvas_len)
        return Examples(tokens, starts[:, None] * (1, 0), 0, tokenizer.canvas_len)
    return tokens


class Examples:
    """N windows of T tokens, each an example filled up with end_id. rows: (N, 2), their starts and prompt lengths."""

    def __init__(self, tokens, rows, end_id, T):
        self.tokens, self.end_id, self.T = tokens, end_id, T
        self.starts, self.prompts = rows.T  # (N,) each
        self.lengths = np.diff(self.starts, append=len(tokens))  # (N,)
        if self.starts[0] or rows.min() < 0 or (self.prompts >= self.lengths).any():
            raise ValueError("its examples do not fit its tokens")

    def __len__(self):
        return len(self.starts) * self.T  # the tokens of all windows


def canvas_len(name):
    """How many tokens a canvas of the corpus data/NAME has, or 0 if the corpus has no canvases or is not there."""
    with suppress(Exception):
        state = json.loads((DATA / name / "meta.json").read_text())["tokenizer"]
        return tokenizer_from_state(state).canvas_len if state["kind"] == "picture" else 0
    return 0


def n_windows(split, T):
    """How many windows of T tokens a split has. Each example is one, and in running text one starts at each token."""
    return len(split.starts) if isinstance(split, Examples) else len(split) - T + 1


def windows_at(split, places, T):
    """Read windows by index (B, 1): tokens (B, T), and the lengths of their own prompts (B, 1), 0 for running text."""
    i = np.arange(T)
    if isinstance(split, Examples):
        tokens, prompts = split.tokens, split.prompts[places]
        x0 = tokens[np.minimum(split.starts[places] + i, len(tokens) - 1)]
        x0 = np.where(i < split.lengths[places], x0, split.end_id)
    else:
        tokens, prompts, x0 = split, np.zeros_like(places), split[places + i]
    if (largest := x0.max()) >= getattr(tokens, "vocab_size", np.inf):
        raise Mistake(f"{tokens.filename}: token {largest} is not one of its tokenizer's; prepare it again")
    return x0.astype(np.int64), prompts


def random_windows(split, B, T, generator):
    """Read B random windows, like windows_at but as torch tensors."""
    import torch  # takes a second to load, and preparing a corpus doesn't need it

    places = torch.randint(n_windows(split, T), (B, 1), generator=generator).numpy()
    return tuple(map(torch.from_numpy, windows_at(split, places, T)))


def spaced_windows(split, T, n_tokens):
    """Read windows that are evenly spaced and don't overlap, about n_tokens in all, as windows_at does."""
    count = max(1, min(n_tokens, len(split)) // T)
    places = np.linspace(0, n_windows(split, T) - 1, count).astype(np.int64)[:, None]
    return windows_at(split, places, T)


def tokenizer_by_name(name):
    """The tokenizer called `bytes`, `gpt2` (tiktoken downloads it once) or `bpe:N`, or that of a checkpoint's file."""
    if name == "bytes":
        return ByteTokenizer()
    if name == "gpt2":
        try:
            encoding = tiktoken.get_encoding("gpt2")
        except OSError:  # requests' errors are OSErrors, too
            raise Mistake("--tokenizer gpt2: tiktoken could not download it; bpe:N needs no download") from None
        tokens = [encoding.decode_single_token_bytes(i).decode("latin-1") for i in range(encoding.eot_token)]
        return BPETokenizer(tokens, encoding._pat_str)
    if re.fullmatch(r"bpe:\d{3,7}", name) and int(name[4:]) > 256:
        return BytePairs(int(name[4:]))
    if not Path(name).is_file():
        raise Mistake(f"--tokenizer {name}: there are bytes, gpt2, bpe:N (N above 256), and the path of a checkpoint")
    from data.lib.checkpoint import read_checkpoint, refused  # torch takes a second to load

    checkpoint = read_checkpoint(name)
    with refused(name):
        tokenizer = tokenizer_from_state(checkpoint["tokenizer"])
    if tokenizer.kinds:
        raise Mistake(f"--tokenizer {name}: its tokens are of captions and pictures, not of a text")
    tokenizer.template = checkpoint.get("chat")
    return tokenizer
