"""A checkpoint is one file: the model's config and weights, its tokenizer, and what resuming needs."""

import dataclasses
import os
import warnings
import zipfile

import torch

from data.run.errors import Mistake
from data.run.files import replacing
from data.run.processes import gathered, rank


def save_checkpoint(path, model, tokenizer, **more):
    """Write one file that holds all it takes to sample; `more` is what resuming needs besides. Of several
    processes the first one writes, and all must call.

    OSError when it cannot be written; the file that was there before then stays.
    """
    checkpoint = {
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


def tensors(content):
    """The tensors in a dict of dicts, lists and tensors, in its order."""
    for value in content.values() if isinstance(content, dict) else content:
        if torch.is_tensor(value):
            yield value
        elif isinstance(value, (dict, list, tuple)):
            yield from tensors(value)


def byte_sum(tensor):
    """The sum of a tensor's bytes as 64-bit numbers, modulo 2**64: it takes as long as to read them."""
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    words = len(data) // 8 * 8
    if data.storage_offset() % 8:
        data = data.clone()
    return data[:words].view(torch.int64).sum().item() + data[words:].sum().item()


def read_checkpoint(path):
    """The dict that save_checkpoint wrote, its tensors mapped from the file.

    Nothing in the file is executed (`weights_only`). Raises Mistake when it cannot be read, or is damaged.
    """
    if not os.path.isfile(path):
        instead = ", it is a folder" if os.path.isdir(path) else ""
        raise Mistake(f"{path}: there is no such checkpoint{instead}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong is said below, in one sentence
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        if not {"config", "model", "tokenizer"} <= set(checkpoint):
            raise KeyError
        with zipfile.ZipFile(path) as archive:  # which compares the sum of all that is no tensor
            archive.read(next(name for name in archive.namelist() if name.endswith("/data.pkl")))
        sums = checkpoint.pop("sums", None)  # an earlier version wrote none
        if sums is not None and sums != [byte_sum(tensor) for tensor in tensors(checkpoint)]:
            raise ValueError
        upgrade(checkpoint)
    except Exception as error:  # torch raises a different one for every way to be no checkpoint
        raise Mistake(f"{path}: damaged, or not a checkpoint ({type(error).__name__})") from None
    return checkpoint


def upgrade(checkpoint):
    """What earlier versions wrote as this one writes it, in place."""
    config, weights = checkpoint["config"], checkpoint["model"]
    config.pop("pad_id", None)
    if config.pop("causal", False):  # a block is one token then, which is read where it stands
        config["block_len"] = 1
    checkpoint.get("train", {}).pop("causal", None)
    for name in ("norm.weight", "norm.bias"):  # of the embeddings or ahead of the head
        if name in weights:
            first = "final_" if config["norm"] == "pre" else "embedding_"
            weights[first + name] = weights.pop(name)
