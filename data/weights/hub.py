"""The files of a published model, in the layout of huggingface.co: downloads, tensors by name, and vocabularies."""

import json
import re
import zipfile

import numpy as np
import torch

from data.lib.checkpoint import read_checkpoint, refused
from data.lib.download import download
from data.lib.errors import Mistake
from data.lib.tokenizer import BPETokenizer, WordPieceTokenizer

HUB = "https://huggingface.co"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}
TABLES = {"token_embedding.weight", "head.weight"}  # a row for each token
# How GPT-2 cuts text into words before it merges the bytes of each (encoder.py of its code, 2019).
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same if every digit is first set apart, and the text between two digits is cut on its own.
DIGITS_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
# What sentencepiece does to a text first: it puts a space in front, and writes spaces as ▁.
SPACES = [{"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}]
SENTENCEPIECE_PATTERN = r" *[^ \n]+| +|\n"  # no token reaches beyond a word and the spaces before it
START_END = {"<s>": "<|startoftext|>", "</s>": "<|endoftext|>"}  # unlike RoBERTa's, they don't open and close lines


def fetch(repositories, folder):
    """Download {repository: names} that aren't in the folder yet, and the shards that an index lists."""
    for repository, names in repositories.items():
        for name in names:
            url = f"{HUB}/{repository}/resolve/main/{name}"
            download(url, folder / name, instead="name the folder of a copy instead", most=2**34)
            if name.endswith(".index.json"):
                shards = sorted({*read_json(folder / name)["weight_map"].values()})
                if wrong := [shard for shard in shards if not re.fullmatch(r"[\w.-]+\.(bin|safetensors)", shard)]:
                    raise Mistake(f"{folder / name}: {wrong[0]} is not the name of a file of weights next to it")
                fetch({repository: shards}, folder)


def read_json(path):
    with refused(path, "truncated, or not a JSON object"):
        return dict(json.loads(path.read_bytes()).items())


def read_weights(folder, prefix, names, layers, ignored):
    """Read a folder's weights: (tensors by our names, names that match `ignored`). prefix: a pattern to strip first."""
    if not (paths := sorted(folder.glob("pytorch_model*.bin")) or sorted(folder.glob("model*.safetensors"))):
        raise Mistake(f"{folder}: there is no pytorch_model.bin in it, and no model.safetensors")
    tensors = {re.sub(f"^({prefix})", "", name): x for path in paths for name, x in read_tensors(path).items()}
    unused = [name for name in tensors if re.match(ignored, name)]
    return {renamed(name, names, layers, "layers"): tensors[name] for name in tensors if name not in unused}, unused


def read_tensors(path):
    """The tensors by name in a file of torch.save or safetensors, memory-mapped."""
    try:
        if path.suffix == ".safetensors":  # 8 bytes with the length of a JSON header, the header, the tensors' bytes
            content = np.memmap(path, np.uint8, "c")  # copy on write, but we never write
            start = 8 + int.from_bytes(content[:8].tobytes(), "little")
            header, content, tensors = json.loads(content[8:start].tobytes()), content[start:], {}
            header.pop("__metadata__", None)
            for name, info in header.items():
                part = torch.from_numpy(content[slice(*info["data_offsets"])])
                tensors[name] = part.view(DTYPES[info["dtype"]]).view(info["shape"])
        elif zipfile.is_zipfile(path):
            tensors = read_checkpoint(path)
        else:  # written before torch 1.6
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        if sum(tensor.nbytes for tensor in tensors.values()) > 2 * path.stat().st_size:  # tied ones may be there twice
            raise ValueError("its tensors overlap")
        return tensors
    except Exception as error:  # torch raises a different one for every way to be broken
        raise Mistake(f"{path}: truncated, or not weights ({type(error).__name__}: {str(error)[:120]})") from None


def renamed(name, names, layers, new_layers):
    """Rename a tensor if the table has its whole name or its module. `layers.2.` becomes `new_layers.2.`."""
    _, number, module, parameter = re.fullmatch(rf"({layers}\.(\d+)\.)?(?:(.*)\.)?(.*)", name).groups()
    prefix = f"{new_layers}.{number}." if number else ""
    return names.get(name) or (f"{prefix}{names[module]}.{parameter}" if module in names else name)


def byte_symbols():
    """How GPT-2's files spell each of the 256 bytes: as itself if it is visible, else as a letter from U+0100 on."""
    others = iter(range(0x100, 0x200))
    return [chr(byte if chr(byte).isprintable() and byte != 0x20 else next(others)) for byte in range(256)]


def bpe_tokenizer(folder, text, special, n_rows, pattern=GPT2_PATTERN, form=None):
    """A BPETokenizer of n_rows ids. text: ids of merged tokens by their bytes as latin-1; special: others by name."""
    taken = {*text.values(), *special.values()} - {-1}
    if not 0 <= n_rows - len(taken) <= 2**12:  # rows are often rounded up for speed
        raise Mistake(f"{folder}: its vocabulary has {len(taken):,} tokens, but the embedding {n_rows:,} rows")
    special = special | {f"<unused {i}>": i for i in range(n_rows) if i not in taken}
    return BPETokenizer([*text], pattern, [*text.values()], special, form)


def split_bpe(ids, merges):
    """Split {name: id} into text tokens, in the order of the merges ("a b" or ["a", "b"]), and special tokens."""
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


def add_row(tensors):
    """Give `<mask>` a row after the last token: the mean of the others, which favours none of them."""
    for name in TABLES & tensors.keys():
        mean = tensors[name].float().mean(0, keepdim=True)
        tensors[name] = torch.cat((tensors[name], mean.type_as(tensors[name])))


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
    """Read a tokenizer.json that tiktoken can follow: what BPETokenizer needs, (text, special, pattern, form).

    text and special: ids by token. A byte that isn't in the vocabulary has the id -1. pattern: cuts a text into words.
    """
    path = folder / "tokenizer.json"
    theirs = read_json(path)
    model, first = theirs["model"], theirs["pre_tokenizer"] or {}
    added = {token["content"]: token["id"] for token in theirs["added_tokens"]}
    if theirs["normalizer"] == {"type": "Sequence", "normalizers": SPACES} and not first and model["type"] == "BPE":
        return read_sentencepiece(path, model["vocab"] | added, model["merges"])
    *splits, letters = first.get("pretokenizers", [first])
    letters = {"use_regex": True} | letters  # as `tokenizers` reads it
    digits = splits == [{"type": "Digits", "individual_digits": True}]
    pattern = DIGITS_PATTERN if digits else splits[0]["pattern"]["Regex"] if splits else GPT2_PATTERN
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    last = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": digits or not splits}
    form = "NFC" if theirs["normalizer"] == {"type": "NFC"} else None
    names = "dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix"
    changes = form is None and theirs["normalizer"], *map(model.get, names)
    known = (digits or splits in ([], [split])) and last.items() <= letters.items() and model["type"] == "BPE"
    if not known or any(changes):
        raise Mistake(f"{path}: it is neither a byte-level BPE with one pattern for words nor TinyLlama's kind")
    absent = {symbol: -1 for symbol in byte_symbols() if symbol not in model["vocab"]}
    text, special = split_bpe(absent | model["vocab"] | added, model["merges"])
    for token in theirs["added_tokens"]:  # these are written like text, such as <think>
        if not token.get("special", True) and token["content"] in special:
            text[token["content"].encode().decode("latin-1")] = special.pop(token["content"])
    return text, special, pattern, form


def read_sentencepiece(path, vocab, merges):
    """Like read_tokenizer_json, but for sentencepiece (1808.06226), which merges characters instead of bytes.

    So the bytes of each character in the vocabulary merge first. Other characters are spelled with their bytes.
    """
    text = {chr(byte): vocab[f"<0x{byte:02X}>"] for byte in range(256)}
    characters = [name for name in vocab if len(name) == 1]
    for name in dict.fromkeys([*characters, *("".join(pair).replace(" ", "") for pair in merges)]):
        token = name.replace("▁", " ").encode().decode("latin-1")
        if not re.fullmatch(SENTENCEPIECE_PATTERN, token):
            raise Mistake(f"{path}: its token {name!r} goes on after a space or the end of a line, and ours can't")
        if len(name) == 1:
            text |= {token[:n]: text.get(token[:n], -1) for n in range(2, len(token))}  # they only help to merge
        text[token] = vocab[name]
    taken = {*text.values()}
    special = {START_END.get(name, name): i for name, i in vocab.items() if i not in taken}
    return text, special, SENTENCEPIECE_PATTERN, "sentencepiece"


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
