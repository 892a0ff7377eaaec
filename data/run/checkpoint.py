"""A checkpoint is one file: the model's config and weights, its tokenizer, and what resuming needs."""

import dataclasses
import os
import warnings

import torch

from data.run.errors import Mistake
from data.run.files import replacing


def save_checkpoint(path, model, tokenizer, **more):
    """Write one file that holds all it takes to sample; `more` is what resuming needs besides.

    OSError when it cannot be written; the file that was there before then stays.
    """
    checkpoint = {
        "config": dataclasses.asdict(model.config),
        "model": model.state_dict(),
        "tokenizer": tokenizer.state,
        **more,
    }
    with replacing(path) as file:
        save(checkpoint, file)


def save(content, file):
    """torch.save; OSError when it cannot be written, which torch reports as a RuntimeError."""
    try:
        torch.save(content, file)
    except RuntimeError as error:
        raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def read_checkpoint(path):
    """The dict that save_checkpoint wrote, its tensors mapped from the file and so read when used.

    Nothing in the file is executed (`weights_only`). Raises Mistake when it cannot be read.
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
        upgrade(checkpoint)
    except Exception as error:  # torch raises a different one for every way to be no checkpoint
        raise Mistake(f"{path}: truncated, or not a checkpoint ({type(error).__name__})") from None
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
