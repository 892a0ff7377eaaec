"""A checkpoint is one file that holds a model's config and weights, its tokenizer, and what resuming needs."""

import dataclasses
import os
import zipfile
from contextlib import contextmanager
from importlib import import_module
from typing import get_args, get_origin, get_type_hints

import torch
from torch.overrides import TorchFunctionMode

from data.lib.errors import Mistake
from data.lib.files import replacing
from data.lib.processes import full_on_rank_0, rank

FAMILIES = "bert", "gpt2", "mdlm", "llada", "llama"  # published networks, each a module of data/weights/


class Unfilled(TorchFunctionMode):
    """In this context nothing fills new weights with numbers. On the device meta, that would load torch's compiler."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        is_init = getattr(function, "__module__", None) == "torch.nn.init"
        return kwargs["tensor"] if is_init else function(*args, **kwargs or {})


def save_checkpoint(path, model, tokenizer, **more):
    """Write a checkpoint; `more` is for resuming. Rank 0 writes, but every process has to call it.

    Raises OSError if it can't be written; an existing file then stays as it was.
    """
    checkpoint = {
        "family": model.family,
        "config": dataclasses.asdict(model.config),
        "model": {name: full_on_rank_0(tensor) for name, tensor in model.state_dict().items()},
        "tokenizer": tokenizer.state,
        **more,
    }
    if rank() == 0:
        save(path, checkpoint)


def save(path, content):
    """Like torch.save, but whole or not at all, and with an OSError where torch turns it into a RuntimeError."""
    with replacing(path) as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def read_checkpoint(path):
    """Read the dict that torch.save wrote to a file. Its tensors are mapped from the file, and nothing is executed.

    Raises Mistake if it's damaged, which shows in the CRC that torch writes for every tensor.
    """
    before = os.stat(path)
    try:
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()) or archive.testzip():
                raise ValueError("it is compressed, or a CRC differs")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        weights = [x for x in (*content.values(), *content.get("model", {}).values()) if torch.is_tensor(x)]
        if sum(x.nbytes for x in weights) > 2 * before.st_size:  # tied weights count twice
            raise ValueError("its tensors are larger than the file")
        if os.path.samestat(before, os.stat(path)):
            return content
    except Exception as error:  # torch has many ways to say that a file isn't its own
        if os.path.samestat(before, os.stat(path)):
            reason = f"{type(error).__name__}: {str(error)[:120]}"
            raise Mistake(f"{path}: damaged, or not a checkpoint ({reason})") from None
    return read_checkpoint(path)  # a run has saved meanwhile, and we may have half of each file


def published_network(family):
    """The network of a family. ValueError if there is no such family."""
    if family not in FAMILIES:
        raise ValueError(f"its family {family!r} is unknown")
    return import_module(f"data.weights.{family}").Network


@contextmanager
def refused(path, said="not a checkpoint of setitem"):
    """Context manager that turns any error caused by a stranger's file into a Mistake that names the file."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise Mistake(f"{path}: {said} ({str(error)[:200]})") from None


def has_type(value, kind):
    """Whether a field with this annotation may have the value; a list counts as a tuple, an int as a float."""
    if get_origin(kind) is tuple:
        return isinstance(value, (tuple, list)) and all(has_type(each, get_args(kind)[0]) for each in value)
    return type(value) in (get_args(kind) or (kind,)) or (kind is float and type(value) is int)


def check_config(config, tokenizer, checkpoint):
    """Raise ValueError unless a ModelConfig has the right types, and fits the tokenizer and the weights."""
    for name, kind in get_type_hints(type(config)).items():
        value = getattr(config, name)
        if not has_type(value, kind) or (type(value) in (int, float) and not 0 <= value <= 10**7):
            raise ValueError(f"its {name} is {value!r}"[:200])
    if any(getattr(tokenizer, name) != getattr(config, name) for name in ("vocab_size", "mask_id", "kinds")):
        raise ValueError("its tokenizer belongs to another model")
    special, ends = {config.mask_id, *config.special_ids}, {*config.end_ids}  # what ends a text has to be learned
    if special & ends or not all(0 <= i < config.vocab_size for i in (config.shift_id or 0, *special, *ends)):
        raise ValueError("a token of its end_ids is special, or its end_ids or shift_id is not in the vocabulary")
    layers = {name.split(".")[1] for name in checkpoint["model"] if name.startswith("layers.")}
    heads = config.n_head * (1 if config.learned_positions else 2)  # rotations turn channels in pairs
    if config.n_layer != len(layers) or not heads or config.n_embd % heads or config.block == 0:
        raise ValueError("its weights have another shape")
    n_places = sum(n for n, _, _ in config.kinds) if config.kinds else config.context
    drafts = config.draft_len is not None
    if drafts and not (config.is_gpt and config.draft_len) or config.draft_rank and not drafts:
        raise ValueError("only a GPT drafts, and at least one token")
    if config.conv_right >= max(1, config.conv) or not config.context == n_places > 0:
        raise ValueError("its context or its convolution can't be")
    if not all(x.is_floating_point() and x.layout is torch.strided and x.is_cpu for x in checkpoint["model"].values()):
        raise ValueError("its weights are not plain tensors of floats")
