"""A corpus is a folder: train.bin and val.bin, token ids, and meta.json beside them.

An id is a uint16, or a uint32 where the tokenizer has more tokens than that can count.

meta.json has the tokenizer and the source; of each split how many tokens and bytes it has, and its
sha256; and how often each token occurs in the training split.

A split is running text; or canvases, whose places say what their tokens are (data/lib/tokenizer.py); or
examples: prompts with their replies. Then meta.json has the chat template, and train.rows and val.rows say
where each example begins and how many of its tokens are prompt, as int64.
"""

import hashlib
import json
import os
import subprocess
import sys
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import tiktoken

from data.lib.chat import Chat
from data.lib.errors import Mistake
from data.lib.files import replacing
from data.lib.tokenizer import BPETokenizer, ByteTokenizer, tokenizer_from_state

DATA = Path(__file__).resolve().parents[1]  # the folder data/
SPLITS = ("train", "val")


def id_type(tokenizer):
    """The numpy type of the ids in a corpus's files."""
    return np.dtype(np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32)


def check_name(name, own=None):
    """Raise Mistake if data/ can have no folder of that name, or with own, the one that a script has itself
    (or ""), if it is another that is the project's.
    """
    if name in ("", ".", "..") or Path(name).name != name:
        raise Mistake(f"--name {name}: a corpus is one folder of data/, so no path but a name is needed")
    if own is not None and name != own and any((DATA / name).glob("*.py")):
        raise Mistake(f"--name {name}: data/{name} is this project's own folder; choose another name")


def write_corpus(name, pieces, tokenizer, source, encode=None):
    """Write data/NAME, as write_tokens does, from pieces of text, (split, text) pairs that are read one at a
    time. encode: text to ids (the tokenizer's encode).
    """
    encode = encode or tokenizer.encode

    def encoded():
        for split, text in pieces:
            ids = np.array(encode(text), dtype=id_type(tokenizer))
            # A newline for which a special token stands is not predicted, so its byte does not count.
            newline = text.endswith("\n") and tokenizer.eos_id in ids
            yield split, ids, len(text.encode("utf-8")) - newline

    return write_tokens(name, encoded(), tokenizer, source)


def write_tokens(name, pieces, tokenizer, source, template=None):
    """Write data/NAME from pieces that are read one at a time: (split, ids, bytes of their text). With a chat
    template each is an example, (split, ids, bytes of the reply, how many of the ids are prompt).

    The files take their names at the end, meta.json last; on an error none does. Returns its dict. Mistake
    if data/ can have no folder of that name.
    """
    check_name(name)
    folder, files = DATA / name, {}
    counts = {split: {"tokens": 0, "bytes": 0} for split in SPLITS}
    digests = {split: hashlib.sha256() for split in SPLITS}
    rows = {split: [] for split in SPLITS}
    occurrences = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    endings = ("bin", "rows") if template else ("bin",)
    with ExitStack() as stack:
        for file in ("meta.json", *(f"{split}.{ending}" for ending in endings for split in SPLITS)):
            files[file] = stack.enter_context(replacing(folder / file))
        for split, ids, n_bytes, *n_prompt in pieces:
            ids = np.asarray(ids, id_type(tokenizer))
            files[f"{split}.bin"].write(ids)
            digests[split].update(ids)
            rows[split] += [(counts[split]["tokens"], *n_prompt)] if template else []
            counts[split]["tokens"] += len(ids)
            counts[split]["bytes"] += n_bytes
            if split == "train":
                np.add.at(occurrences, ids, 1)
        for split in SPLITS:
            if 0 in counts[split].values():
                raise Mistake(f"{source}: too little text, its {split} split is empty")
            counts[split]["sha256"] = digests[split].hexdigest()
            if template:
                index = np.array(rows[split], dtype=np.int64)
                files[f"{split}.rows"].write(index)
                counts[split] |= {"examples": len(index), "rows_sha256": hashlib.sha256(index).hexdigest()}
        meta = {"source": str(source), **counts, "tokenizer": tokenizer.state}
        meta |= {"chat": template} if template else {}
        meta |= {"occurrences": occurrences.tolist()}
        files["meta.json"].write(json.dumps(meta, indent=1).encode())
    tokens = ", ".join(f"{counts[split]['tokens']:,} {split}" for split in SPLITS)
    print(f"{folder}: {tokens} tokens")
    return meta


def split_at(pieces, cut):
    """Turn pieces of text into (split, text) pairs: the first `cut` bytes train, the rest validates.

    A character that straddles the cut goes to validation whole.
    """
    seen = 0
    for text in pieces:
        data = text.encode("utf-8")
        head = data[: max(0, cut - seen)].decode("utf-8", errors="ignore")
        seen += len(data)
        yield "train", head
        yield "val", text[len(head) :]


def read_pieces(path, size=1 << 20):
    """Yield the text of a UTF-8 file about a megabyte at a time, ending with a line where one ends."""
    try:
        with open(path, encoding="utf-8", newline="") as file:
            while text := file.read(size):
                yield text + file.readline(size)
    except UnicodeDecodeError as error:
        raise Mistake(f"{path}: not UTF-8 text ({error.reason})") from None


def load_corpus(name, context=1):
    """The corpus data/NAME as (train, val, tokenizer, meta); train and val are memory-mapped, or Examples,
    whose `tokens` in meta are those of windows of context.

    The default corpus is made when it is missing. Mistake if a split has fewer tokens than context, or an
    example more.
    """
    folder = DATA / name
    if name == "python" and not (folder / "meta.json").exists():
        print("data/python is not there yet: making it from this Python's standard library", flush=True)
        if subprocess.run([sys.executable, folder / "prepare.py"]).returncode:
            sys.exit(2)  # it has said why
    if not (folder / "meta.json").exists():
        ready = sorted(path.parent.name for path in DATA.glob("*/meta.json"))
        sentence = f"--data {name}: there is no such corpus; ready are: {', '.join(ready) or 'none'}"
        own = (folder / "prepare.py").exists()
        command = f"data/{name}/prepare.py" if own else "data/text/prepare.py FILE --name NAME"
        raise Mistake(f"{sentence}; `python {command}` makes {'this' if own else 'a new'} one")
    try:
        meta = json.loads((folder / "meta.json").read_text())
        tokenizer = tokenizer_from_state(meta["tokenizer"])
        train, val = (np.memmap(folder / f"{split}.bin", id_type(tokenizer), "r") for split in SPLITS)
        intact = [len(train), len(val)] == [meta[split]["tokens"] for split in SPLITS]
        occurrences = meta["occurrences"]
        numbers = [*occurrences, *(meta[split]["bytes"] for split in SPLITS)]
        intact &= len(occurrences) == tokenizer.vocab_size
        intact &= all(type(number) is int and 0 <= number < 2**62 for number in numbers)
        intact &= min(meta[split]["bytes"] for split in SPLITS) > 0
        intact &= all(type(meta[split]["sha256"]) is str for split in SPLITS)
        intact &= not (tokenizer.kinds and "chat" in meta)
        intact &= not any(len(split) % max(1, tokenizer.canvas_len) for split in (train, val))
        if "chat" in meta:
            indices = [read_rows(folder / f"{split}.rows", meta[split]) for split in SPLITS]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, FileNotFoundError):
        intact = False
    if not intact:
        raise Mistake(f"{folder}: not a whole corpus; prepare it again")
    check_tokens(folder, meta, tokenizer)
    if tokenizer.kinds:
        train, val = (canvases(split, tokenizer.canvas_len) for split in (train, val))
    if "chat" in meta:
        end_id = Chat(meta["chat"], tokenizer).end_id
        train, val = (Examples(*both, end_id, context) for both in zip((train, val), indices))
        if (longest := max(train.lengths.max(), val.lengths.max())) > context:
            longest = f"an example of {longest} tokens; --context {longest} is the least that will do"
            raise Mistake(f"--data {name}: --context {context} is too small for {longest}")
        for split, examples in zip(SPLITS, (train, val)):
            meta[split]["tokens"] = len(examples)
    for split, tokens in zip(SPLITS, (train, val)):
        if len(tokens) < context:
            shortage = f"{len(tokens)} tokens, fewer than one --context of {context}"
            raise Mistake(f"--data {name}: its {split} split has {shortage}; a smaller one will do")
    return train, val, tokenizer, meta


def read_rows(path, counts):
    """The index of a split's examples, (N, 2) int64 in memory. ValueError if it is none for such counts."""
    content = path.read_bytes()
    rows = np.frombuffer(content, np.int64).reshape(counts["examples"], 2)
    ends = np.append(rows[1:, 0], counts["tokens"])
    fits = rows[0, 0] == 0 and (rows[:, 0] < ends).all() and (rows[:, 1] >= 0).all()
    # A prompt ends before its example does; no difference overflows, since they rise from 0 on.
    if not fits or (rows[:, 1] >= ends - rows[:, 0]).any():
        raise ValueError
    if hashlib.sha256(content).hexdigest() != counts["rows_sha256"]:
        raise ValueError
    return rows


class Examples:
    """A split of prompts with their replies, each a window of T tokens; what ends a text fills the rest."""

    def __init__(self, tokens, rows, end_id, T):
        self.tokens, self.end_id, self.T = tokens, end_id, T
        self.starts, self.prompts = rows.T  # (N,) each
        self.lengths = np.diff(self.starts, append=len(tokens))  # (N,)

    def __len__(self):
        """Tokens of all windows."""
        return len(self.starts) * self.T


def canvas_len(name):
    """Tokens of a canvas of the corpus data/NAME; 0 if it is of other tokens, or no corpus."""
    with suppress(OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        state = json.loads((DATA / name / "meta.json").read_text())["tokenizer"]
        return tokenizer_from_state(state).canvas_len if state["kind"] == "picture" else 0
    return 0


def canvases(tokens, T):
    """A split whose examples are canvases of T tokens, one after the other, that have no prompts."""
    starts = np.arange(0, len(tokens), T)
    return Examples(tokens, np.stack((starts, np.zeros_like(starts)), 1), None, T)


def n_windows(split, T):
    """How many windows of T tokens a split has: one for each example, or of a text one from each token on."""
    return len(split.starts) if isinstance(split, Examples) else len(split) - T + 1


def windows_at(split, places, T):
    """Windows by their numbers, places (B, 1): tokens (B, T), and how many of each are its prompt, (B, 1), 0
    of running text; int64.
    """
    i = np.arange(T)
    if not isinstance(split, Examples):
        return split[places + i].astype(np.int64), np.zeros_like(places)
    tokens = split.tokens[np.minimum(split.starts[places] + i, len(split.tokens) - 1)]
    x0 = np.where(i < split.lengths[places], tokens, split.end_id)
    return x0.astype(np.int64), split.prompts[places]


def random_windows(split, B, T, generator):
    """B windows of T tokens at random places: (B, T) int64; and how many tokens of each are a prompt of its
    own, (B, 1).
    """
    import torch  # takes a second to load, which preparing a corpus need not wait for

    places = torch.randint(n_windows(split, T), (B, 1), generator=generator)
    return tuple(map(torch.from_numpy, windows_at(split, places.numpy(), T)))


def spaced_windows(split, T, n_tokens):
    """About n_tokens of a split, as windows of T tokens that are spaced evenly and don't overlap: (N, T)
    int64; and how many tokens of each are a prompt of its own, (N, 1).
    """
    count = max(1, min(n_tokens, len(split)) // T)
    places = np.linspace(0, n_windows(split, T) - 1, count).astype(np.int64)[:, None]
    return windows_at(split, places, T)


def check_tokens(folder, meta, tokenizer):
    """Raise Mistake unless all tokens are the tokenizer's, and have the sums that meta.json says: one pass,
    which a note beside them then spares as long as the files are the same.
    """
    files, note = [folder / f"{split}.bin" for split in SPLITS], folder / "checked.json"
    kind = id_type(tokenizer)
    stats = [(s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in map(os.stat, files)]
    kept = [meta[split]["sha256"] for split in SPLITS]
    # Whoever copies a folder gets files of another time, at which he cannot have forged the note.
    found = [tokenizer.vocab_size, *kept, *map(list, stats), *map(list, tokenizer.kinds)]
    with suppress(OSError, ValueError):
        if json.loads(note.read_text()) == found:
            return
    for path, sha256 in zip(files, kept):
        digest, buffer = hashlib.sha256(), bytearray(2**20)
        with open(path, "rb") as file:
            while size := file.readinto(buffer):
                digest.update(memoryview(buffer)[:size])
                ids = np.frombuffer(buffer, kind, size // kind.itemsize)
                if ids.max(initial=0) >= tokenizer.vocab_size or (ids == tokenizer.mask_id).any():
                    raise Mistake(f"{path}: it has tokens that are not its tokenizer's; prepare it again")
        if sha256 != digest.hexdigest():
            raise Mistake(f"{path}: its sha256 is not that of meta.json; prepare it again")
        start, places = 0, np.memmap(path, kind, "r").reshape(-1, max(1, tokenizer.canvas_len))
        for n, first, end in tokenizer.kinds:
            here, start = places[:, start : start + n], start + n
            if here.min() < first or here.max() >= end:
                raise Mistake(f"{path}: it has tokens that may not stand where they are; prepare it again")
    with suppress(OSError):  # a folder that cannot be written to is read again
        note.write_text(json.dumps(found))


def tokenizer_by_name(name):
    """`bytes`; `gpt2`, whose merges tiktoken downloads once and keeps; or that of a checkpoint's path."""
    return tokenizer_and_template(name)[0]


def tokenizer_and_template(name):
    """The tokenizer of that name, and the chat template of its checkpoint, or None."""
    if name == "bytes":
        return ByteTokenizer(), None
    if name.endswith(".pt") or os.path.isfile(name):
        from data.lib.checkpoint import read_checkpoint  # torch takes a second to load; only this needs it

        checkpoint = read_checkpoint(name)
        try:
            tokenizer, template = tokenizer_from_state(checkpoint["tokenizer"]), checkpoint.get("chat")
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise Mistake(f"{name}: it has no tokenizer of ours ({str(error)[:200]})") from None
        if tokenizer.kinds:
            raise Mistake(f"--tokenizer {name}: its tokens are of captions and pictures, not of a text")
        return tokenizer, template
    if name != "gpt2":
        raise Mistake(f"--tokenizer {name}: there are bytes, gpt2, and the path of a checkpoint")
    try:
        encoding = tiktoken.get_encoding("gpt2")
    except OSError as error:  # what requests raises is an OSError
        raise Mistake(f"--tokenizer gpt2: tiktoken cannot download its merges ({error})") from None
    merges = [encoding.decode_single_token_bytes(i) for i in range(encoding.eot_token)]
    return BPETokenizer([token.decode("latin-1") for token in merges], encoding._pat_str), None
