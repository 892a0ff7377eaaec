"""The files of a published model, in the layout of huggingface.co: config.json, and tensors by their names."""

import json
import re
import zipfile

import numpy as np
import torch

from data.lib.checkpoint import read_checkpoint
from data.lib.download import download
from data.lib.errors import Mistake

HUB = "https://huggingface.co"
# How GPT-2 cuts text into words before it merges the bytes of each (encoder.py of its code, 2019).
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"I64": torch.int64, "I32": torch.int32, "U8": torch.uint8, "BOOL": torch.bool}


def byte_symbols():
    """How GPT-2's files spell each of the 256 bytes: as itself if it is visible, else as a letter from U+0100 on."""
    others = iter(range(0x100, 0x200))
    return [chr(byte if chr(byte).isprintable() and byte != 0x20 else next(others)) for byte in range(256)]


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
    try:
        return dict(json.loads(path.read_bytes()).items())
    except (AttributeError, RecursionError, ValueError) as error:
        raise Mistake(f"{path}: truncated, or not a JSON object ({str(error)[:200]})") from None


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
