"""The files of a language model as the hub has them: config.json, weights, and a byte-pair vocabulary.

What is wrong with one is said in a sentence (Mistake) that names it. A source of weights, such as
data/roberta, is a table of names and a page of settings, and this is all else that turns these files into a
checkpoint of ours, and a checkpoint into these files. Weights are mapped, not read, and where nothing but
names differs they stay so, in their dtype: a model may be larger than memory.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data.lib.checkpoint import check_config, read_archive, save, save_checkpoint
from data.lib.download import download
from data.lib.errors import Mistake
from data.lib.files import replacing
from data.lib.flags import argument, flag, parse
from data.lib.tokenizer import BPETokenizer

HUB = "https://huggingface.co"
MOST_LAYERS = 1000  # each takes a thousandth of a second to make
MOST_TEXT = 2**26  # bytes of a text file: as Python's objects it takes several times as much


def main(description, home, repositories, what, convert, export=None):
    """The command of a source of weights: write a checkpoint of files of the hub, or of a folder, to --out or
    else below the folder home; or with --export the files of a checkpoint, if there is an export.

    repositories: the files, as `files` gives them, of each name that it knows; what: of which files a folder
    is. convert(folder) -> (model, tokenizer, list of what is not used, dict of what the checkpoint has
    besides); export(path, folder).
    """
    names, out = list(repositories), f"checkpoint to write (default: data/{home.name}/NAME.pt)"
    source = f"{', '.join(names)}; a folder with {what}" + "; a checkpoint to --export" * (export is not None)
    flags = [("source", str, argument(source, default=names[0])), ("out", str | None, flag(None, out))]
    if export:
        help = "folder to write the checkpoint's model to, in such files"
        flags += [("export", str | None, flag(None, help))]
    config_class = dataclasses.make_dataclass("PrepareConfig", flags)
    config = config_class(**parse(config_class, description))
    if export and config.export:
        if config.out:
            raise Mistake("--export: it writes a folder; --out is for a checkpoint")
        known = config.source in repositories
        return export(home / f"{config.source}.pt" if known else Path(config.source), Path(config.export))
    folder = Path(config.source)
    if config.source in repositories:
        folder = fetch(repositories[config.source], home / config.source)
    elif not folder.is_dir():
        raise Mistake(f"{folder}: no such folder, and not one of {', '.join(repositories)}")
    model, tokenizer, unused, more = convert(folder)
    try:
        check_config(model.config, tokenizer, {"model": model.state_dict()})
    except ValueError as error:
        raise Mistake(f"{folder / 'config.json'}: no model can be made of it ({error})") from None
    out = Path(config.out or home / f"{folder.resolve().name}.pt")
    save_checkpoint(out, model, tokenizer, **more)
    for name in unused:
        print(f"not used: {name}")
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{out}: {parameters:,} parameters, {tokenizer.vocab_size:,} tokens")


# --- files ---------------------------------------------------------------------------------------

BPE_FILES = "vocab.json", "merges.txt"


def files(repository, *names):
    """Files of a repository of the hub, as a list: [(repository, name), ..]."""
    return [(repository, name) for name in names]


def fetch(wanted, folder):
    """Download files of the hub, and the shards that an index among them names, to a folder, but for those
    that are there; the folder.
    """
    for repository, name in wanted:
        if not (folder / name).exists():
            url = f"{HUB}/{repository}/resolve/main/{name}"
            most = MOST_TEXT if name.endswith((".json", ".txt")) else 2**34
            download(url, folder / name, instead="the folder of a copy can be named instead", most=most)
        if name.endswith(".index.json"):
            fetch(files(repository, *sorted({*shards(folder / name).values()})), folder)
    return folder


def read_text(path):
    if not path.exists():
        raise Mistake(f"{path.parent}: no {path.name} in it")
    if (size := path.stat().st_size) > MOST_TEXT:
        raise Mistake(f"{path}: {size:,} bytes, and it should have {MOST_TEXT:,} at most")
    try:
        return path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise Mistake(f"{path}: not UTF-8 text") from None


def read_json(path):
    """The dict in a JSON file."""
    text = read_text(path)
    try:
        content = json.loads(text)
        return {**content}
    except (ValueError, TypeError, RecursionError):
        raise Mistake(f"{path}: truncated, or not what JSON should hold here") from None


def write_model(folder, theirs, tokenizer, tensors):
    """Write config.json, the vocabulary and pytorch_model.bin to a folder, all of them or none."""
    vocab, merges = bpe_files(tokenizer)
    texts = {"config.json": json.dumps(theirs, indent=2), "vocab.json": vocab, "merges.txt": merges}
    names = ["pytorch_model.bin", *texts]
    if there := [name for name in names if (folder / name).exists()]:
        raise Mistake(f"--export {folder}: there is a {there[0]} in it already")
    with ExitStack() as stack:
        weights, *files = [stack.enter_context(replacing(folder / name)) for name in names]
        save(tensors, weights)
        for file, text in zip(files, texts.values()):
            file.write(text.encode("utf-8"))
    print(f"{folder}: {', '.join(names)}")


# --- settings ------------------------------------------------------------------------------------

# Their names of an activation, and ours; the first of several is the one that is exported.
OUR_ACTIVATION = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu", "silu": "silu"}
OUR_ACTIVATION |= {"gelu_python": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "swish": "silu"}


def their_activation(config):
    return next(name for name, ours in OUR_ACTIVATION.items() if ours == config.activation)


def read_kind(path, kinds):
    """config.json as a dict with its model_type, which must be one of kinds."""
    theirs = read_json(path)
    kind = theirs.get("model_type")
    if kind is None:  # the oldest files do not say
        kind = next((kind for kind in kinds if kind in str(theirs.get("architectures")).lower()), None)
    if kind not in kinds:
        raise Mistake(f"{path}: model_type {kind}, and only {' and '.join(kinds)} can be converted")
    return {**theirs, "model_type": kind}


def with_defaults(theirs, defaults, required, activation, path, may_be_0=()):
    """A config.json's settings with the defaults of what it leaves out. Mistake if we have no such model.

    required: what our model cannot be otherwise. activation: the setting that names it, if one does.
    may_be_0: those of the whole numbers that need not be positive.
    """
    for name, value in required.items():
        if theirs.get(name, value) != value:
            raise Mistake(f"{path}: {name} {theirs[name]} cannot be represented, only {value}")
    theirs = {**defaults, **theirs}
    for name, default in defaults.items():
        value = theirs[name]
        if isinstance(default, float):
            fits = type(value) in (int, float) and value >= 0
        elif type(default) is int:
            fits = type(value) is int and value >= (0 if name in may_be_0 else 1)
        else:
            fits = type(value) is type(default)
        if not fits:
            raise Mistake(f"{path}: {name} cannot be {value}; {default} is usual")
    if activation and theirs[activation] not in OUR_ACTIVATION:
        known = ", ".join(OUR_ACTIVATION)
        raise Mistake(f"{path}: {activation} {theirs[activation]} cannot be represented; {known} can")
    return theirs


def check_kind(path, config, again, kind):
    """Raise Mistake if a checkpoint's ModelConfig is not the one that its export would be read as again."""
    for field in dataclasses.fields(config):
        ours, read = (getattr(each, field.name) for each in (config, again))
        if ours != read:
            difference = f"its {field.name} is {ours}, where one would have {read}"
            raise Mistake(f"{path}: it is not a {kind}, and only that can be exported; {difference}")


# --- weights -------------------------------------------------------------------------------------


def read_weights(folder):
    """(path, tensors by their names, mapped) of pytorch_model.bin, or else of model.safetensors, or of the
    shards that an index of either names.
    """
    names = "pytorch_model.bin", "model.safetensors"
    names += tuple(f"{name}.index.json" for name in names)
    path = next((folder / name for name in names if (folder / name).exists()), None)
    if path is None:
        raise Mistake(f"{folder}: no pytorch_model.bin in it, and no model.safetensors")
    if path.suffix != ".json":
        return path, read_tensors(path)
    tensors, shard_of = {}, shards(path)
    for shard in sorted({*shard_of.values()}):
        if not (folder / shard).exists():
            raise Mistake(f"{folder}: no {shard} in it, which {path.name} names")
        tensors |= {n: t for n, t in read_tensors(folder / shard).items() if shard_of.get(n) == shard}
    if missing := sorted(shard_of.keys() - tensors.keys()):
        raise Mistake(f"{folder / shard_of[missing[0]]}: it has no {missing[0]}, but {path.name} says so")
    return path, tensors


def shards(path):
    """Which file beside the index `path` has each tensor: dict of names."""
    shard_of = read_json(path).get("weight_map")
    if not isinstance(shard_of, dict) or not all(isinstance(shard, str) for shard in shard_of.values()):
        raise Mistake(f"{path}: it has no weight_map of names")
    for shard in shard_of.values():
        if Path(shard).name != shard or not shard.endswith((".bin", ".safetensors")):
            raise Mistake(f"{path}: {shard} is no name of a file of weights")
    return shard_of


def read_tensors(path):
    """The tensors in a file of torch.save or safetensors by their names, mapped from it."""
    try:
        if path.suffix == ".safetensors":
            return read_safetensors(path)
        tensors = read_archive(path)
        if not all(isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in tensors.items()):
            raise TypeError("it holds more than tensors with names")
        return tensors
    except Exception as error:  # torch raises a different one for every way to be broken
        reason = f"{type(error).__name__}: {str(error)[:120]}"
        raise Mistake(f"{path}: truncated, or no file of weights alone ({reason})") from None


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}
DTYPES |= {"U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """The tensors in a file of safetensors by their names, mapped from it: 8 bytes with the length of a
    header; the header, JSON, with the dtype, shape and place of each; and then their bytes. ValueError and
    such if they are not what the header says.
    """
    with open(path, "rb") as file:
        n = int.from_bytes(file.read(8), "little")
        if n > min(MOST_TEXT, path.stat().st_size - 8):
            raise ValueError(f"a header of {n:,} bytes")
        header = json.loads(file.read(n))
    content = np.memmap(path, np.uint8, "c")[8 + n :]  # a copy is made of what is written to, and nothing is
    tensors = {}
    for name, info in header.items():
        if name == "__metadata__":
            continue
        dtype, shape, (begin, end) = DTYPES[info["dtype"]], info["shape"], info["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
            raise ValueError(f"{name} has a negative size")
        tensors[name] = torch.from_numpy(content[begin:end]).view(dtype).view(shape)
    if sum(tensor.nbytes for tensor in tensors.values()) > len(content):
        raise ValueError("its tensors overlap")
    return tensors


def their_name(name, names, layer):
    """What a tensor of our state_dict is called in the files, where the third layer is `layer.2`. names:
    theirs of each of our modules, or of a single tensor.
    """
    if name in names:
        return names[name]
    prefix = ""
    if name.startswith("layers."):
        _, number, name = name.split(".", 2)
        prefix = f"{layer}.{number}."
    module, _, parameter = name.rpartition(".")
    return f"{prefix}{names[module]}.{parameter}"


def by_plain_name(tensors, plain_name, path):
    """The tensors by their plain names, the one spelling out of those that are around; Mistake if two that
    differ share one.
    """
    found = {}
    for name, tensor in tensors.items():
        plain = plain_name(name)
        if plain in found and not torch.equal(found[plain], tensor):
            raise Mistake(f"{path}: {name} is there twice, with different values")
        found[plain] = tensor
    return found


def tie(found, embedding, head, may_tie):
    """Whether the head's matrix is the embedding, by these names of theirs; a file may then leave it out, and
    it is put there.
    """
    if not may_tie or embedding not in found:
        return False
    tied = head not in found or torch.equal(found[embedding], found[head])
    if tied:
        found[head] = found[embedding]
    return tied


class Spelling(NamedTuple):
    """How a source of weights calls its tensors, and cuts them."""

    plain_name: Callable  # a key of a file in the one spelling of what follows
    tables: tuple  # the embedding's name, and that of the head's matrix
    unused: re.Pattern  # of the plain names of what may be left over
    their_tensors: Callable  # tensors by our names -> by theirs, of the shapes that they have in a file
    our_tensors: Callable  # (tensors by their names, our names) -> by ours


def only_names(plain_name, tables, unused, their_name):
    """The Spelling of a source whose tensors are ours but for their names, their_name(ours)."""

    def their_tensors(ours):
        return {their_name(name): tensor for name, tensor in ours.items()}

    def our_tensors(found, names):
        return {name: found[their_name(name)] for name in names}

    return Spelling(plain_name, tables, unused, their_tensors, our_tensors)


def convert(tensors, path, spelling, network, our_config, may_tie):
    """A model of the class `network` with the tensors of a file, and the names of those that it has no use
    for.

    our_config(tied) -> its config; may_tie: whether the embedding may be the head's matrix.
    """
    found = by_plain_name(tensors, spelling.plain_name, path)
    tied = tie(found, *spelling.tables, may_tie)
    model = empty_model(network, functools.partial(our_config, tied), path)
    expected = spelling.their_tensors(model.state_dict())
    check_tensors(found, expected, path)
    skipped = left_over(tensors, spelling.plain_name, expected, spelling.unused, path)
    return fill(model, spelling.our_tensors(found, model.state_dict())), skipped


def empty_model(network, our_config, path):
    """The model of our_config(), without memory for its weights."""
    try:
        config = our_config()
        if config.n_layer > MOST_LAYERS:
            raise ValueError(f"{config.n_layer:,} layers, {MOST_LAYERS:,} at most")
        with torch.device("meta"):
            return network(config)
    except (TypeError, ValueError, RuntimeError) as error:
        raise Mistake(f"{path.parent / 'config.json'}: no model can be made of it ({str(error)[:200]})") from None


def check_tensors(found, expected, path):
    """Raise Mistake if a tensor that is expected is not found, or is of another shape, or no weight."""
    for name, tensor in expected.items():
        if name not in found:
            raise Mistake(f"{path}: it has no {name}")
        if found[name].shape != tensor.shape:
            shapes = f"{tuple(found[name].shape)}, but config.json makes it {tuple(tensor.shape)}"
            raise Mistake(f"{path}: {name} is {shapes}")
        if not found[name].is_floating_point():
            raise Mistake(f"{path}: {name} is of {found[name].dtype}, and no weight is")


def left_over(tensors, plain_name, expected, unused, path):
    """The names of the tensors for which our model has no use; Mistake if they are not known as such (by the
    pattern unused, of plain names), since then it is another model.
    """
    names = [name for name in tensors if plain_name(name) not in expected]
    unknown = sorted(name for name in names if not unused.match(plain_name(name)))
    if unknown:
        raise Mistake(f"{path}: {', '.join(unknown[:3])} ({len(unknown)} in all) fit nowhere in this model")
    return names


def not_used(skipped, theirs=None, dropout=None, *others):
    """What a conversion leaves out: tensors, and settings of dropout that differ from the one it takes."""
    unused = [", ".join(skipped)] if skipped else []
    differ = [name for name in others if theirs[name] != theirs[dropout]]
    return unused + ([f"{', '.join(differ)}; dropout is {theirs[dropout]} everywhere"] if differ else [])


def fill(model, tensors):
    """The empty model with these weights, tensors by our names, in eval mode."""
    model.load_state_dict(tensors, assign=True)
    return model.eval()


# --- byte-pair vocabularies ----------------------------------------------------------------------


def byte_symbols():
    """The letter that GPT-2's files write for each of the 256 bytes: itself where it can be seen, and
    otherwise one from U+0100 on.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(0x100 + hidden.index(byte)) for byte in range(256)]


# How GPT-2 cuts text into words before it merges the bytes of each (encoder.py of its code, 2019).
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def padding_ids(n, vocab_size):
    """The ids after n tokens that a vocab_size has which was rounded up, for speed, to a multiple of 8."""
    return range(n, vocab_size) if vocab_size % 8 == 0 and vocab_size - n < 128 else range(0)


def read_bpe(folder, vocab_size):
    """The tokenizer of vocab.json and merges.txt."""
    vocab_path, merges_path = folder / "vocab.json", folder / "merges.txt"
    ids, added = read_json(vocab_path), folder / "added_tokens.json"
    if added.exists():
        ids |= read_json(added)
    lines = read_text(merges_path).split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    if not all(type(i) is int for i in ids.values()) or {*ids.values()} != {*range(len(ids))}:
        raise Mistake(f"{vocab_path}: its ids are not the numbers from 0 to {len(ids) - 1}")
    symbols = byte_symbols()
    tokens = list(dict.fromkeys([*symbols, *(merge.replace(" ", "") for merge in merges)]))
    missing = [token for token in tokens if token not in ids]
    if missing or any(merge.count(" ") != 1 for merge in merges) or not {*"".join(tokens)} <= {*symbols}:
        raise Mistake(
            f"{folder}: vocab.json and merges.txt do not belong together"
            + (f"; the first has no {missing[0]!r}, {len(missing)} such in all" if missing else "")
        )
    byte_of = {symbol: chr(byte) for byte, symbol in enumerate(symbols)}
    text = set(tokens)
    special = {name: i for name, i in ids.items() if name not in text}
    unmade = [name for name in special if not re.fullmatch(r"<.+>|\[.+\]|madeupword\d+", name)]
    if unmade:
        count = f"no merge makes its {unmade[0]!r}, {len(unmade)} such in all"
        raise Mistake(f"{folder}: vocab.json and merges.txt do not belong together; {count}")
    special |= {f"<unused {i}>": i for i in padding_ids(len(ids), vocab_size)}
    latin = ["".join(map(byte_of.get, token)) for token in tokens]
    return BPETokenizer(latin, GPT2_PATTERN, [ids[token] for token in tokens], special)


def read_tokenizer_json(folder, n_rows, mask_id):
    """The tokenizer of a tokenizer.json with byte-level BPE, as `tokenizers` writes it. Its added tokens are
    special ones of ours, mask_id is `<mask>`, and ids up to n_rows, of a table's rows, that no token has are
    unused. Mistake where it cuts or changes text in a way that tiktoken has no counterpart to.
    """
    path = folder / "tokenizer.json"
    theirs = read_json(path)
    try:
        model, added = theirs["model"], {token["content"]: token["id"] for token in theirs["added_tokens"]}
        ids = {name: i for name, i in model["vocab"].items() if name not in added}
        merges = ["".join(m) if isinstance(m, list) else m.replace(" ", "", 1) for m in model["merges"]]
        settings = [model.get(name) for name in ("dropout", "unk_token", "continuing_subword_prefix")]
        pattern = words_of(theirs["pre_tokenizer"])
        whole = not (any(settings) or theirs.get("normalizer") or model.get("end_of_word_suffix"))
        names = [*ids, *added, "" if pattern is None else pattern]
    except (ValueError, LookupError, TypeError, AttributeError):
        names = [None]
    if not all(isinstance(name, str) for name in names):
        raise Mistake(f"{path}: it is not what a tokenizer.json of byte-level BPE is")
    if model.get("type") != "BPE" or pattern is None or not whole:
        raise Mistake(f"{path}: only byte-level BPE that changes no text can be represented")
    symbols = byte_symbols()
    tokens = list(dict.fromkeys([*symbols, *merges]))
    byte_of = {symbol: chr(byte) for byte, symbol in enumerate(symbols)}
    if missing := [token for token in tokens if token not in ids or not {*token} <= byte_of.keys()]:
        raise Mistake(f"{path}: its vocabulary has no {missing[0]!r} of bytes, {len(missing)} such in all")
    text = set(tokens)
    special = {name: i for name, i in ids.items() if name not in text} | added
    special = {MEANT.get(name, name): i for name, i in special.items() if i != mask_id} | {"<mask>": mask_id}
    taken = [*(ids[token] for token in tokens), *special.values()]
    if any(type(i) is not int or not 0 <= i < n_rows for i in taken) or len({*taken}) < len(taken):
        raise Mistake(f"{path}: its ids are not different numbers below {n_rows:,}")
    if n_rows - len(taken) > MOST_UNUSED:
        raise Mistake(f"{path}: {len(taken):,} tokens are too few for {n_rows:,} rows")
    special |= {f"<unused {i}>": i for i in sorted({*range(n_rows)} - {*taken})}
    latin = ["".join(map(byte_of.get, token)) for token in tokens]
    try:
        return BPETokenizer(latin, pattern, [ids[token] for token in tokens], special)
    except ValueError as error:
        raise Mistake(f"{path}: {pattern[:80]!r} cuts no text into words ({str(error)[:80]})") from None


MOST_UNUSED = 2**12  # rows of a table without a token, which round its size up
# Names that mean something in our other vocabularies, what opens a line and what closes it.
MEANT = {name: f"<|{name.strip('<[]>')}|>" for name in ("<s>", "</s>", "<eos>", "[CLS]", "[SEP]", "<cls>")}


def words_of(pre_tokenizer):
    """The regular expression that cuts text into words, of a tokenizer.json's setting; None if it is not that
    of byte-level BPE: a split by an expression, or GPT-2's own, and then bytes as letters.
    """
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    *splits, letters = steps
    if letters["type"] != "ByteLevel" or letters.get("add_prefix_space") or len(splits) > 1:
        return None
    if not splits:
        return GPT2_PATTERN if letters.get("use_regex", True) else None
    (split,) = splits
    isolated = split["type"] == "Split" and split["behavior"] == "Isolated" and not split.get("invert")
    return split["pattern"]["Regex"] if isolated and letters.get("use_regex", True) is False else None


def check_vocab_size(folder, tokenizer, vocab_size):
    if tokenizer.vocab_size != vocab_size:
        count = f"{tokenizer.vocab_size} tokens in the vocabulary, {vocab_size} in config.json"
        raise Mistake(f"{folder}: {count}")


def bpe_files(tokenizer):
    """The inverse of read_bpe: the texts of vocab.json and merges.txt.

    The merges are found by merging each token's bytes again.
    """
    symbols = byte_symbols()
    tokens = ["".join(symbols[ord(c)] for c in token) for token in tokenizer.state["tokens"]]
    rank = {token: i for i, token in enumerate(tokens)}
    lines = ["#version: 0.2"]
    for token in tokens[256:]:
        parts = list(token)
        while len(parts) > 2:
            pairs = [parts[i] + parts[i + 1] for i in range(len(parts) - 1)]
            best = min(range(len(pairs)), key=lambda i: rank.get(pairs[i], len(rank)))
            parts[best : best + 2] = [pairs[best]]
        lines.append(" ".join(parts))
    special = {name: i for name, i in tokenizer.special.items() if not name.startswith("<unused ")}
    ids = dict(zip(tokens, tokenizer.ids)) | special
    ids = dict(sorted(ids.items(), key=lambda item: item[1]))
    return json.dumps(ids, ensure_ascii=False), "\n".join(lines) + "\n"
