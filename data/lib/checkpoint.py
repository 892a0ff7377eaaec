"""A checkpoint is one file: the model's config and weights, its tokenizer, and what resuming needs."""

import dataclasses
import os
import warnings
import zipfile
from contextlib import contextmanager
from importlib import import_module
from typing import get_type_hints

import torch

from data.lib.errors import Mistake
from data.lib.files import replacing
from data.lib.flags import fits as has_type
from data.lib.processes import gathered, rank


def save_checkpoint(path, model, tokenizer, **more):
    """Write one file that holds all it takes to sample; `more` is what resuming needs besides. Of several
    processes the first one writes, and all must call.

    OSError when it cannot be written; the file that was there before then stays.
    """
    checkpoint = {
        "family": model.family,
        "config": dataclasses.asdict(model.config),
        "model": {name: gathered(tensor) for name, tensor in model.state_dict().items()},
        "tokenizer": tokenizer.state,
        **more,
    }
    if rank() == 0:
        checkpoint["sums"] = [byte_sum(tensor) for tensor in tensors(checkpoint)]
        with replacing(path) as file:
            save(checkpoint, file)


def save(content, file):
    """torch.save; OSError when it cannot be written, which torch reports as a RuntimeError."""
    try:
        torch.save(content, file)
    except RuntimeError as error:
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def tensors(content, seen=None):
    """The tensors in a dict of dicts, lists and tensors, in its order; each dict and list once."""
    seen = set() if seen is None else seen
    for value in content.values() if isinstance(content, dict) else content:
        if torch.is_tensor(value):
            yield value
        elif isinstance(value, (dict, list, tuple)) and id(value) not in seen:
            seen.add(id(value))
            yield from tensors(value, seen)


def byte_sum(tensor):
    """The sum of a tensor's bytes as 64-bit numbers, modulo 2**64: it takes as long as to read them."""
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    data = data.clone() if data.storage_offset() % 8 else data
    words, rest = len(data) // 8 * 8, len(data) % 8  # of most tensors nothing is left, and need not be summed
    return data[:words].view(torch.int64).sum().item() + (data[words:].sum().item() if rest else 0)


def read_checkpoint(path):
    """The dict that save_checkpoint wrote, its tensors mapped from the file.

    Nothing in the file is executed (`weights_only`), and no more memory taken than it has. Raises Mistake
    when it cannot be read, or is damaged.
    """
    if not os.path.isfile(path):
        instead = ", it is a folder" if os.path.isdir(path) else ""
        raise Mistake(f"{path}: there is no such checkpoint{instead}")
    before = os.stat(path)
    try:
        check_archive(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong is said below, in one sentence
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        sums, there = checkpoint.pop("sums"), list(tensors(checkpoint))
        check_layout(there, os.path.getsize(path))
        not_finite = check_values(there, sums, checkpoint["model"])
        _ = checkpoint["tokenizer"]
    except Exception as error:  # torch raises a different one for every way to be no checkpoint
        if not os.path.samestat(before, os.stat(path)):  # a run has saved meanwhile: it was half of each
            return read_checkpoint(path)
        raise Mistake(f"{path}: damaged, or not a checkpoint ({type(error).__name__})") from None
    if not_finite:
        raise Mistake(f"{path}: {not_finite[0]} has values that are not finite")
    return checkpoint


def check_archive(path):
    """Raise an error if the file of torch.save is compressed, and may be larger than it looks, or if what in
    it is no tensor does not have the sum that the archive says.
    """
    with zipfile.ZipFile(path) as archive:
        if any(info.compress_type != zipfile.ZIP_STORED for info in archive.infolist()):
            raise ValueError
        archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))


def check_layout(there, n_bytes):
    """Raise an error if one is not as we write them, or if all are more than n_bytes could hold."""
    for tensor in there:
        if tensor.layout is not torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
            raise TypeError
        extent = 1  # by stride, no dimension may step into the one before: no number is there twice
        for stride, n in sorted((s, n) for s, n in zip(tensor.stride(), tensor.shape) if n > 1):
            if stride < extent:
                raise ValueError
            extent = stride * n
    # Several tensors may share memory, which is read for each. Tied weights are there twice.
    if sum(tensor.numel() * tensor.element_size() for tensor in there) > 2 * n_bytes:
        raise ValueError


def check_values(there, sums, weights):
    """The names of the weights that have values that are not finite. ValueError if the sums that a file has
    of its tensors are not theirs.
    """

    def place(tensor):  # one for tied weights
        return tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()

    names, not_finite = {place(tensor): name for name, tensor in weights.items()}, []
    pairs = zip(there, sums, strict=True)
    for key, (tensor, expected) in {place(pair[0]): pair for pair in pairs}.items():
        if byte_sum(tensor) != expected:
            raise ValueError
        if key in names and not is_finite(tensor):  # a small one is still in the cache
            not_finite.append(names[key])
    return not_finite


def is_finite(tensor):
    """Whether all values are; in parts, since torch makes a float32 copy of what it sums as such."""
    return all(part.sum(dtype=torch.float32).isfinite() for part in tensor.flatten().split(2**22))


FAMILIES = "bert", "gpt2", "mdlm", "llada"  # of published networks, each a module of data/weights/


def published_network(family):
    """The class of a family's network. ValueError if there is no such family."""
    if family not in FAMILIES:
        raise ValueError(f"its family {family!r} is unknown")
    return import_module(f"data.weights.{family}").Network


@contextmanager
def refused(path):
    """Context in which what a stranger's checkpoint can cause becomes a Mistake that names the file."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise Mistake(f"{path}: not a checkpoint of setitem ({str(error)[:200]})") from None


def check_config(config, tokenizer, checkpoint):
    """Raise ValueError unless a ModelConfig has values of the right types, and fits its tokenizer and the weights."""
    if any(getattr(tokenizer, name) != getattr(config, name) for name in ("vocab_size", "mask_id", "kinds")):
        raise ValueError("its tokenizer belongs to another model")
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not has_type(kind, value) or (type(value) in (int, float) and not 0 <= value <= 10**7):
            raise ValueError(f"its {name} is no value for that")
    not_text = {config.mask_id, *config.special_ids}
    shift = [] if config.shift_id is None else [config.shift_id]
    if not all(0 <= i < config.vocab_size for i in (*not_text, *config.end_ids, *shift)):
        raise ValueError("mask_id, special_ids, end_ids and shift_id are not of its vocabulary")
    if not_text & {*config.end_ids}:
        raise ValueError("its end_ids are learned, and so no special_ids")
    layers = {name.split(".")[1] for name in checkpoint["model"] if name.startswith("layers.")}
    heads = config.n_head * (1 if config.learned_positions else 2)  # a rotation turns channels in pairs
    fits = heads and config.n_embd % heads == 0 and config.conv_right < max(1, config.conv)
    if config.n_layer != len(layers) or not (fits and config.context) or config.block == 0:
        raise ValueError("it is not of the size that it says")
    if config.kinds and sum(n for n, _, _ in config.kinds) != config.context:
        raise ValueError("its kinds are not of its canvas")


def read_archive(path):
    """The dict that torch.save wrote, memory-mapped. Nothing in it is executed; errors if its checksums don't hold."""
    if (damaged := zipfile.ZipFile(path).testzip()) is not None:
        raise ValueError(f"{damaged} is damaged")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
