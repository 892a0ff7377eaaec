"""Vocabularies in the hub's layout: vocab.json and merges.txt, tokenizer.json, or vocab.txt."""

import json
import re

from data.lib.errors import Mistake
from data.lib.tokenizer import BPETokenizer, WordPieceTokenizer
from data.weights.hub import GPT2_PATTERN, byte_symbols, read_json


def bpe_tokenizer(folder, text, special, n_rows, pattern=GPT2_PATTERN):
    """A BPETokenizer of n_rows ids. text: ids of merged tokens by their bytes as latin-1; special: others by name."""
    taken = {*text.values(), *special.values()}
    if not 0 <= n_rows - len(taken) <= 2**12:  # rows are often rounded up for speed
        raise Mistake(f"{folder}: its vocabulary has {len(taken):,} tokens, but the embedding {n_rows:,} rows")
    special = special | {f"<unused {i}>": i for i in range(n_rows) if i not in taken}
    return BPETokenizer([*text], pattern, [*text.values()], special)


def split_bpe(ids, merges):
    """Split a dict of ids by name into text tokens, in the order of the merges ("a b" or ["a", "b"]), and special
    tokens.
    """
    byte_of = {symbol: chr(byte) for byte, symbol in enumerate(byte_symbols())}
    names = dict.fromkeys([*byte_of, *("".join(pair).replace(" ", "") for pair in merges)])  # in order, each once
    text = {"".join(byte_of[symbol] for symbol in name): int(ids[name]) for name in names}
    return text, {name: int(i) for name, i in ids.items() if name not in names}


def read_bpe(folder):
    """Ids of text and of special tokens, from vocab.json and merges.txt."""
    _, *merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()  # the first names a version
    text, special = split_bpe(read_json(folder / "vocab.json"), merges)
    if unmade := [name for name in special if not re.fullmatch(r"<.+>|\[.+\]|madeupword\d+", name)]:
        raise Mistake(f"{folder}: no line of merges.txt makes {unmade[0]!r} of vocab.json; one may be truncated")
    return text, special


def bpe_texts(tokenizer, without=()):
    """The inverse of read_bpe: vocab.json and merges.txt as a dict. without: names of special tokens to leave out."""
    symbols = byte_symbols()
    tokens = ["".join(symbols[ord(c)] for c in token) for token in tokenizer.state["tokens"]]
    rank, lines = {token: i for i, token in enumerate(tokens)}, ["#version: 0.2"]
    for token in tokens[256:]:
        parts = list(token)  # the tokenizer doesn't hold its merges, so we merge each token again
        while len(parts) > 2:
            pairs = [a + b for a, b in zip(parts, parts[1:])]
            best = min(range(len(pairs)), key=lambda i: rank.get(pairs[i], len(rank)))
            parts[best : best + 2] = [pairs[best]]
        lines.append(" ".join(parts))
    ids = dict(zip(tokens, tokenizer.ids)) | tokenizer.special
    ids = {name: i for name, i in ids.items() if name not in without and not name.startswith("<unused ")}
    return {"vocab.json": json.dumps(ids), "merges.txt": "\n".join([*lines, ""])}


def read_tokenizer_json(folder):
    """Read a tokenizer.json that tiktoken can follow: (ids of text, ids of special tokens, pattern that cuts words)."""
    path = folder / "tokenizer.json"
    theirs = read_json(path)
    model, first = theirs["model"], theirs["pre_tokenizer"]
    *splits, letters = first.get("pretokenizers", [first])
    pattern = splits[0]["pattern"]["Regex"] if splits else GPT2_PATTERN
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    last = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": not splits}
    names = "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"
    changes = theirs["normalizer"], *map(model.get, names)
    if splits not in ([], [split]) or not last.items() <= letters.items() or any(changes) or model["type"] != "BPE":
        raise Mistake(f"{path}: it is not a byte-level BPE that leaves the text as it is; we know no other")
    added = {token["content"]: token["id"] for token in theirs["added_tokens"]}
    return *split_bpe(model["vocab"] | added, model["merges"]), pattern


def read_wordpiece(folder, n_rows):
    """The tokenizer of vocab.txt. tokenizer_config.json says whether it is cased; if it doesn't, the words do."""
    path = folder / "tokenizer_config.json"
    tokens = (folder / "vocab.txt").read_text(encoding="utf-8").rstrip("\n").split("\n")
    tokens += [f"[unused{i}]" for i in range(len(tokens), min(n_rows, len(tokens) + 128))]
    settings = read_json(path) if path.exists() else {}
    lowercase = settings.get("do_lower_case", all(token == token.lower() for token in tokens if token[:1] != "["))
    accents = lowercase if settings.get("strip_accents") is None else settings["strip_accents"]
    tokenizer = WordPieceTokenizer(tokens, lowercase, accents, settings.get("tokenize_chinese_chars", True))
    if tokenizer.mask_id is None or tokenizer.unknown is None:
        raise Mistake(f"{folder}: vocab.txt has no [MASK] or no [UNK]")
    return tokenizer


def wordpiece_texts(tokenizer):
    """The inverse of read_wordpiece: vocab.txt and tokenizer_config.json as a dict."""
    state = tokenizer.state
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": state["lowercase"]}
    settings |= {"strip_accents": state["strip_accents"], "tokenize_chinese_chars": state["split_chinese"]}
    return {"vocab.txt": "\n".join([*state["tokens"], ""]), "tokenizer_config.json": json.dumps(settings, indent=2)}
