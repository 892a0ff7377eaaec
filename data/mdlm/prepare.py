"""MDLM's or BD3-LM's weights (2406.07524, 2503.09573) as one checkpoint of ours.

    python data/mdlm/prepare.py                             # mdlm-owt, downloaded once
    python data/mdlm/prepare.py bd3lm-owt-block_size4
    python data/mdlm/prepare.py DIR --out mine.pt           # files that are already there, and GPT-2's tokens

The network is a diffusion Transformer (2212.09748) that is told the noise level, but is told 0 whatever it
is, since the holes show it. So what it makes of the level, a shift, a scale and a gate in each layer, is
constant, and is multiplied into norms and matrices here (`our_tensors`): what is left is our network.
"""

import functools
import re
import sys
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.gpt2.prepare import read_tokenizer
from data.lib.corpus import DATA
from data.lib.errors import Mistake, command
from data.weights import hub
from data.weights.mdlm import Network

MODELS = "mdlm-owt", "bd3lm-owt-block_size4", "bd3lm-owt-block_size8", "bd3lm-owt-block_size16"
TOKENS = hub.files("openai-community/gpt2", *hub.BPE_FILES)  # theirs, which their repositories lack
REPOSITORIES = {
    name: hub.files(f"kuleshov-group/{name}", "config.json", "model.safetensors") + TOKENS for name in MODELS
}
LEVELS = 256  # channels in which a level is told: cosines, which are 1 at level 0, and sines


# --- settings ------------------------------------------------------------------------------------

# What the files leave out when it is this.
DEFAULTS = {
    "vocab_size": 50258,
    "model_length": 1024,
    "hidden_dim": 768,
    "n_blocks": 12,
    "n_heads": 12,
    "dropout": 0.1,
    "block_size": 1,  # this and what follows are BD3-LM's alone
    "cross_attn": True,  # False: all see all, whatever block_size is
    "adaln": True,
}
# What our model cannot be, besides these.
REQUIRED = {"time_conditioning": False, "causal": False}


def read_config(path):
    """config.json as a dict, with the defaults of what it leaves out. Mistake if we have no such model."""
    theirs = hub.read_kind(path, ("mdlm", "bd3lm"))
    theirs = hub.with_defaults(theirs, DEFAULTS, REQUIRED, None, path)
    if theirs["hidden_dim"] % (2 * theirs["n_heads"]):
        raise Mistake(f"{path}: hidden_dim is not a multiple of twice n_heads")
    return theirs


def our_config(theirs, tokenizer, tied):
    """Our config of their config."""
    whole = theirs["model_type"] == "mdlm" or not theirs["cross_attn"]
    whole |= theirs["block_size"] >= theirs["model_length"]
    return Network.Config(
        vocab_size=theirs["vocab_size"],
        mask_id=tokenizer.mask_id,
        special_ids=(tokenizer.mask_id,),  # what stands between two texts was learned, and is written
        context=theirs["model_length"],
        n_layer=theirs["n_blocks"],
        n_head=theirs["n_heads"],
        n_embd=theirs["hidden_dim"],
        dropout=theirs["dropout"],
        block=None if whole else theirs["block_size"],
        activation="gelu_tanh",
        tied=tied,
    )


# --- tensors -------------------------------------------------------------------------------------

NAMES = {
    "token_embedding.weight": "vocab_embed.embedding",
    "attention_norm": "norm1",
    "attention.query": "attn_qkv",  # three of ours, one below the other, are one of theirs
    "attention.key": "attn_qkv",
    "attention.value": "attn_qkv",
    "attention.out": "attn_out",
    "mlp_norm": "norm2",
    "mlp.up": "mlp.0",
    "mlp.down": "mlp.2",
    "final_norm": "output_layer.norm_final",
    "head": "output_layer.linear",
}
TABLES = "vocab_embed.embedding", "output_layer.linear.weight"
# Tables of angles, and bounds of the levels in training.
UNUSED = re.compile(r"rotary_emb\.|sampling_eps_(min|max)$")
# The halves of a layer: the norm that a shift and a scale go into, and the matrix that a gate does.
HALVES = ("attention_norm", "attention.out"), ("mlp_norm", "mlp.down")


def their_name(name):
    """What a tensor of our state_dict is called in the files, without the leading `backbone.`."""
    return hub.their_name(name, NAMES, "blocks")


def plain_name(name):
    """A key of a file in the spelling of their_name."""
    return name.removeprefix("backbone.")


def has_bias(name):
    """Whether they have a bias where a tensor of ours is one."""
    return ".mlp." in name or name == "head.bias"


def their_tensors(ours, n_level):
    """Tensors of the names and shapes of theirs, of those of our state_dict. n_level: how many numbers they
    make of a level; 0: they are not told it.
    """
    parts = defaultdict(list)
    for name, tensor in ours.items():
        if not name.endswith(".bias") or has_bias(name):
            parts[their_name(name)].append(tensor)
    theirs, C = {name: torch.cat(tensors) for name, tensors in parts.items()}, len(ours["final_norm.weight"])
    told = {"sigma_map.mlp.0": (n_level, LEVELS), "sigma_map.mlp.2": (n_level, n_level)}
    layers = {name.split(".")[1] for name in ours if name.startswith("layers.")}
    told |= {f"blocks.{i}.adaLN_modulation": (6 * C, n_level) for i in layers}
    told |= {"output_layer.adaLN_modulation": (2 * C, n_level)}
    for name, shape in told.items() if n_level else ():
        theirs[f"{name}.weight"] = torch.empty(shape, device="meta")
        theirs[f"{name}.bias"] = torch.empty(shape[0], device="meta")
    return theirs


def our_tensors(found, names, n_level):
    """Tensors by our names of those found by theirs: scales and shifts go into the norms, gates into the
    matrices ahead of them, and a bias that they lack is 0.
    """
    zeros = torch.zeros(len(found["output_layer.norm_final.weight"]))

    def linear(name, x):
        return F.linear(x, found[f"{name}.weight"].float(), found[f"{name}.bias"].float())

    def modulated(place):
        """Shift and scale of the last norm, or shift, scale and gate of each half of a layer, (C,) each."""
        if not n_level:
            return [zeros, zeros, zeros + 1] * 2 if place else [zeros, zeros]
        at_0 = torch.arange(LEVELS) < LEVELS // 2  # of level 0 the cosines are 1, and the sines 0
        level = F.silu(linear("sigma_map.mlp.2", F.silu(linear("sigma_map.mlp.0", at_0.float()))))
        return linear(f"{place or 'output_layer.'}adaLN_modulation", level).chunk(6 if place else 2)

    def folded(name, factor, bias):
        """A weight (C, ..) times the factor (C,), in the dtype of the file, and the bias, of our name."""
        weight = found[their_name(f"{name}.weight")]
        factor = factor.view(-1, *[1] * (weight.ndim - 1))
        return {f"{name}.weight": (factor * weight).type_as(weight), f"{name}.bias": bias.type_as(weight)}

    shift, scale = modulated("")
    ours = folded("final_norm", 1 + scale, shift)
    for place in sorted({name[: name.index(".", 7) + 1] for name in names if name.startswith("layers.")}):
        theirs = place.replace("layers.", "blocks.")
        vectors = modulated(theirs)
        for (norm, matrix), (shift, scale, gate) in zip(HALVES, (vectors[:3], vectors[3:])):
            ours |= folded(place + norm, 1 + scale, shift)
            ours |= folded(place + matrix, gate, gate * found.get(their_name(f"{place}{matrix}.bias"), zeros))
        for part, matrix in zip(("query", "key", "value"), found[f"{theirs}attn_qkv.weight"].chunk(3)):
            ours[f"{place}attention.{part}.weight"] = matrix.clone()
            ours[f"{place}attention.{part}.bias"] = zeros.type_as(matrix)
    return {name: ours[name] if name in ours else found[their_name(name)] for name in names}


def convert(theirs, tokenizer, path, tensors):
    """Our model with their tensors, and the names of those that it has no use for."""
    told = [tensor for name, tensor in tensors.items() if plain_name(name) == "sigma_map.mlp.0.bias"]
    n_level = max([1, *(tensor.numel() for tensor in told)]) if theirs["adaln"] else 0
    spelling = hub.Spelling(
        plain_name,
        TABLES,
        UNUSED,
        functools.partial(their_tensors, n_level=n_level),
        functools.partial(our_tensors, n_level=n_level),
    )
    return hub.convert(tensors, path, spelling, Network, functools.partial(our_config, theirs, tokenizer), False)


# --- the command ---------------------------------------------------------------------------------


def convert_folder(folder):
    """(model, tokenizer, what is not used, nothing besides) of the files in a folder."""
    theirs = read_config(folder / "config.json")
    tokenizer = read_tokenizer(folder, {"vocab_size": theirs["vocab_size"] - 1})
    model, skipped = convert(theirs, tokenizer, *hub.read_weights(folder))
    return model, tokenizer, hub.not_used(skipped), {}


def main():
    what = "such files and GPT-2's vocab.json and merges.txt"
    hub.main(__doc__.splitlines()[0], DATA / "mdlm", REPOSITORIES, what, convert_folder)


if __name__ == "__main__":
    command(main)
