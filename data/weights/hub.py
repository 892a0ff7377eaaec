"""The files of a published model, in the layout of huggingface.co: config.json, and tensors by their names."""

import json
import re
import warnings
import zipfile
from pathlib import Path

import numpy as np
import torch

from data.lib.checkpoint import read_checkpoint, save
from data.lib.download import download
from data.lib.errors import Mistake
from data.lib.files import replacing

HUB = "https://huggingface.co"
MOST_TEXT = 2**26  # bytes of a text file; parsed, it takes several times as much memory

# How GPT-2 cuts text into words before it merges the bytes of each (encoder.py of its code, 2019).
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def byte_symbols():
    """How GPT-2's files spell each of the 256 bytes: as itself if it is visible, else as a letter from U+0100 on."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(0x100 + hidden.index(byte)) for byte in range(256)]


# --- files ---------------------------------------------------------------------------------------


def fetch(repositories, folder):
    """Download files, given as {repository: names}, and the shards of an index, unless they are in the folder."""
    for repository, names in repositories.items():
        for name in names:
            if not (folder / name).exists():
                url = f"{HUB}/{repository}/resolve/main/{name}"
                download(url, folder / name, instead="name the folder of a copy instead", most=2**34)
            if name.endswith(".index.json"):
                fetch({repository: shards(folder / name)}, folder)


def read_text(path):
    if (size := path.stat().st_size) > MOST_TEXT:
        raise Mistake(f"{path}: {size:,} bytes, but it should have at most {MOST_TEXT:,}")
    return path.read_text(encoding="utf-8")


def read_json(path):
    """The dict in a JSON file."""
    try:
        return dict(json.loads(read_text(path)).items())
    except (AttributeError, RecursionError, ValueError) as error:
        raise Mistake(f"{path}: truncated, or not a JSON object ({str(error)[:200]})") from None


def write_folder(folder, texts, tensors):
    """Write pytorch_model.bin and text files, as a dict by name, to a folder that has no model yet."""
    if (folder / "config.json").exists():
        raise Mistake(f"--export {folder}: there is a model in it already")
    with replacing(folder / "pytorch_model.bin") as file:
        save(tensors, file)
    for name, text in texts.items():
        with replacing(folder / name) as file:
            file.write(text.encode())
    print(f"{folder}: pytorch_model.bin, {', '.join(texts)}")


def our_settings(path, names, required):
    """Read config.json: (the whole dict, the fields of our config). names: their name for each of our fields.

    required: the only value that our network can have for some settings. They may be missing.
    """
    theirs = read_json(path)
    for name, value in required.items():
        if theirs.get(name, value) != value:
            raise Mistake(f"{path}: {name} is {theirs[name]}, but our network needs {value}")
    if missing := [name for name in names.values() if theirs.get(name) is None]:
        raise Mistake(f"{path}: it has no {missing[0]}")
    return theirs, {field: theirs[name] for field, name in names.items()}


# --- tensors -------------------------------------------------------------------------------------


def read_weights(folder, prefix, names, layers, ignored):
    """Read pytorch_model.bin, model.safetensors or the shards of either: (tensors by our names, names of ignored ones).

    prefix: pattern to strip from their names; ignored: pattern of names without it to leave out. names, layers: see
    `renamed`. The tensors are memory-mapped.
    """
    files = [f"{name}{end}" for end in ("", ".index.json") for name in ("pytorch_model.bin", "model.safetensors")]
    path = next((folder / name for name in files if (folder / name).exists()), None)
    if path is None:
        raise Mistake(f"{folder}: there is no pytorch_model.bin in it, and no model.safetensors")
    tensors, unused = {}, []
    for part in [folder / shard for shard in shards(path)] if path.suffix == ".json" else [path]:
        for name, tensor in read_tensors(part).items():
            plain = re.sub(f"^({prefix})", "", name)
            if re.match(ignored, plain):
                unused.append(name)
            else:
                tensors[renamed(plain, names, layers, "layers")] = tensor
    return tensors, unused


def shards(path):
    """Names of the files that an index lists."""
    names = {*read_json(path)["weight_map"].values()}
    if wrong := [name for name in names if Path(name).name != name or not name.endswith((".bin", ".safetensors"))]:
        raise Mistake(f"{path}: {wrong[0]} is not the name of a file of weights next to it")
    return sorted(names)


def read_tensors(path):
    """The tensors by name in a file of torch.save or safetensors, memory-mapped."""
    try:
        if path.suffix == ".safetensors":
            tensors = read_safetensors(path)
        elif zipfile.is_zipfile(path):
            tensors = read_checkpoint(path)
        else:  # written before torch 1.6
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about files that aren't torch's, which raise an error too
                tensors = torch.load(path, map_location="cpu", weights_only=True)
        tensors = {name: tensor.cpu() for name, tensor in tensors.items()}
        if sum(tensor.nbytes for tensor in tensors.values()) > 2 * path.stat().st_size:  # tied ones may be there twice
            raise ValueError("its tensors overlap")
        return tensors
    except Exception as error:  # torch raises a different one for every way to be broken
        reason = f"{type(error).__name__}: {str(error)[:120]}"
        raise Mistake(f"{path}: truncated, or not a file of weights ({reason})") from None


DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8}
DTYPES |= {"U8": torch.uint8, "BOOL": torch.bool}


def read_safetensors(path):
    """The same for safetensors: 8 bytes with the length of a JSON header, the header, and the tensors' bytes."""
    with open(path, "rb") as file:
        n = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(min(n, MOST_TEXT, path.stat().st_size)))
    content = np.memmap(path, np.uint8, "c")[8 + n :]  # copy on write, but we never write
    tensors = {}
    for name, info in header.items():
        if name != "__metadata__":
            begin, end = info["data_offsets"]
            tensors[name] = torch.from_numpy(content[begin:end]).view(DTYPES[info["dtype"]]).view(info["shape"])
    return tensors


def renamed(name, names, layers, new_layers):
    """Rename a tensor by a table of modules, or of whole names; the prefix `layers.2.` becomes `new_layers.2.`.

    A name that is not in the table stays as it is.
    """
    if name in names:
        return names[name]
    prefix, rest = "", name
    if name.startswith(f"{layers}."):
        number, _, rest = name.removeprefix(f"{layers}.").partition(".")
        prefix = f"{new_layers}.{number}."
    module, _, parameter = rest.rpartition(".")
    return f"{prefix}{names[module]}.{parameter}" if module in names else name


def split_attention(tensors):
    """Replace each `attention.all`, which is query, key and value in one tensor, by the three."""
    for name in [name for name in tensors if ".attention.all." in name]:
        for part, tensor in zip(("query", "key", "value"), tensors.pop(name).chunk(3)):
            tensors[name.replace("all", part)] = tensor.clone(memory_format=torch.contiguous_format)


def join_attention(tensors):
    """The inverse of split_attention."""
    for name in [name for name in tensors if ".attention.query." in name]:
        parts = [tensors.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        tensors[name.replace("query", "all")] = torch.cat(parts)


def tie(tensors):
    """Whether the head's matrix equals the token embedding, or is missing. If so, the head gets the embedding."""
    embedding = tensors["token_embedding.weight"]
    tied = torch.equal(embedding, tensors.get("head.weight", embedding))
    if tied:
        tensors["head.weight"] = embedding
    return tied


def load(network, config, tensors):
    """Our model with these tensors, in their dtypes. RuntimeError if one is missing, left over or of another shape."""
    if config.n_layer > len(tensors):
        raise ValueError(f"{config.n_layer:,} layers, but {len(tensors):,} tensors")
    with torch.device("meta"):  # takes no memory
        model = network(config)
    model.load_state_dict(tensors, assign=True)
    return model.eval()
