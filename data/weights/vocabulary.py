"""Vocabularies in the hub's layout: vocab.json and merges.txt, tokenizer.json, or vocab.txt."""

import json
import re

from data.lib.errors import Mistake
from data.lib.tokenizer import WordPieceTokenizer, tokenizer_from_state
from data.weights.hub import GPT2_PATTERN, byte_symbols, read_json, read_text

MOST_UNUSED = 2**12  # rows of the embedding without a token; it is often rounded up for speed


def bpe_tokenizer(folder, text, special, n_rows, pattern=GPT2_PATTERN):
    """A BPETokenizer of n_rows ids. text: ids of what merges make, by latin-1 bytes; special: the others, by name."""
    taken = {*text.values(), *special.values()}
    if not 0 <= n_rows - len(taken) <= MOST_UNUSED:
        raise Mistake(f"{folder}: its vocabulary has {len(taken):,} tokens, but the embedding {n_rows:,} rows")
    unused = {f"<unused {i}>": i for i in range(n_rows) if i not in taken}
    state = {"kind": "bpe", "tokens": [*text], "pattern": pattern, "ids": [*text.values()], "special": special | unused}
    return tokenizer_from_state(state)


def split_bpe(path, ids, merges):
    """Split a vocabulary's ids by name into those of text, in the order of the merges, and those of special tokens."""
    byte_of = {symbol: chr(byte) for byte, symbol in enumerate(byte_symbols())}
    names = dict.fromkeys([*byte_of, *merges])  # in order, each once
    if missing := [name for name in names if name not in ids]:
        raise Mistake(f"{path}: the vocabulary has no {missing[0]!r}, which a merge makes ({len(missing)} in all)")
    text = {"".join(byte_of[symbol] for symbol in name): int(ids[name]) for name in names}
    return text, {name: int(i) for name, i in ids.items() if name not in names}


def read_bpe(folder):
    """Ids of text and of special tokens, from vocab.json and merges.txt."""
    ids, added = read_json(folder / "vocab.json"), folder / "added_tokens.json"
    if added.exists():
        ids |= read_json(added)
    lines = read_text(folder / "merges.txt").split("\n")
    merges = [line.replace(" ", "", 1) for line in lines if line and not line.startswith("#version")]
    text, special = split_bpe(folder, ids, merges)
    unmade = [name for name in special if not re.fullmatch(r"<.+>|\[.+\]|madeupword\d+", name)]
    if unmade:
        count = f"{len(unmade)} tokens of vocab.json are made by no merge in merges.txt"
        raise Mistake(f"{folder}: {count}, such as {unmade[0]!r}; one of the files may be truncated")
    return text, special


def bpe_texts(tokenizer, without=()):
    """The inverse of read_bpe: vocab.json and merges.txt as a dict. without: names of special tokens to leave out.

    A tokenizer doesn't hold its merges, so we merge each token's bytes again.
    """
    symbols = byte_symbols()
    tokens = ["".join(symbols[ord(c)] for c in token) for token in tokenizer.state["tokens"]]
    rank, lines = {token: i for i, token in enumerate(tokens)}, ["#version: 0.2"]
    for token in tokens[256:]:
        parts = list(token)
        while len(parts) > 2:
            pairs = [a + b for a, b in zip(parts, parts[1:])]
            best = min(range(len(pairs)), key=lambda i: rank.get(pairs[i], len(rank)))
            parts[best : best + 2] = [pairs[best]]
        lines.append(" ".join(parts))
    special = {name: i for name, i in tokenizer.special.items() if not name.startswith("<unused ")}
    ids = {name: i for name, i in (dict(zip(tokens, tokenizer.ids)) | special).items() if name not in without}
    vocab = json.dumps(dict(sorted(ids.items(), key=lambda item: item[1])), ensure_ascii=False)
    return {"vocab.json": vocab, "merges.txt": "\n".join([*lines, ""])}


def read_tokenizer_json(folder):
    """Ids of text and of special tokens, and the pattern that cuts words, from tokenizer.json.

    Mistake unless it is byte-level BPE that leaves the text as it is, which is all that tiktoken can do.
    """
    path = folder / "tokenizer.json"
    theirs = read_json(path)
    model, steps = theirs["model"], theirs["pre_tokenizer"].get("pretokenizers", [theirs["pre_tokenizer"]])
    *splits, last = steps
    changes = [theirs.get("normalizer"), last.get("add_prefix_space")]
    names = "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"
    plain = not any([*changes, *map(model.get, names)]) and (model["type"], last["type"]) == ("BPE", "ByteLevel")
    pattern = GPT2_PATTERN
    if splits:
        (split,), plain = splits, plain and last.get("use_regex") is False
        plain = plain and (split["type"], split["behavior"]) == ("Split", "Isolated") and not split.get("invert")
        pattern = split["pattern"]["Regex"]
    if not plain or not isinstance(pattern, str):
        raise Mistake(f"{path}: it is not a byte-level BPE that leaves the text as it is; we know no other")
    merges = [merge.replace(" ", "", 1) if isinstance(merge, str) else "".join(merge) for merge in model["merges"]]
    added = {token["content"]: token["id"] for token in theirs["added_tokens"]}
    return *split_bpe(path, model["vocab"] | added, merges), pattern


def read_wordpiece(folder, n_rows):
    """The tokenizer of vocab.txt, cased or not as tokenizer_config.json says or as its words are."""
    tokens, path = read_text(folder / "vocab.txt").rstrip("\n").split("\n"), folder / "tokenizer_config.json"
    if not 0 <= n_rows - len(tokens) < 128:
        raise Mistake(f"{folder}: vocab.txt has {len(tokens):,} tokens, but the embedding {n_rows:,} rows")
    tokens += [f"[unused{i}]" for i in range(len(tokens), n_rows)]
    settings = read_json(path) if path.exists() else {}
    words = [token for token in tokens if not WordPieceTokenizer.special_pattern.fullmatch(token)]
    lowercase = settings.get("do_lower_case", all(word == word.lower() for word in words))
    accents = settings.get("strip_accents")
    accents = lowercase if accents is None else accents
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
