"""LLaDA's weights (2502.09992) and tokenizer as one checkpoint of ours.

    python data/llada/prepare.py                            # LLaDA-8B-Base, 16 GB, downloaded once
    python data/llada/prepare.py LLaDA-8B-Instruct          # which sample.py --chat talks to
    python data/llada/prepare.py DIR --out mine.pt          # files that are already there

The network is in data/weights/llada.py. This file is only about names: of settings, and of tensors. No tensor
is changed, and none is in memory as a whole file is.
"""

import functools
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.lib.corpus import DATA
from data.lib.errors import Mistake, command
from data.weights import hub
from data.weights.llada import Network

FILES = "config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json"
REPOSITORIES = {
    name: hub.files(f"GSAI-ML/{name}", *FILES) for name in ("LLaDA-8B-Base", "LLaDA-8B-Instruct", "LLaDA-1.5")
}


# --- settings ------------------------------------------------------------------------------------

# What the files leave out when it is this.
DEFAULTS = {
    "d_model": 4096,
    "n_heads": 32,
    "n_kv_heads": 32,
    "n_layers": 32,
    "mlp_hidden_size": 12288,
    "max_sequence_length": 4096,
    "embedding_size": 126464,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "activation_type": "silu",
    "residual_dropout": 0.0,
    "weight_tying": False,
    "mask_token_id": 126336,
    "eos_token_id": 126081,
}
# What our model cannot be, besides these.
REQUIRED = {
    "block_type": "llama",
    "layer_norm_type": "rms",
    "layer_norm_with_affine": True,
    "attention_layer_norm": False,
    "rope": True,
    "alibi": False,
    "include_bias": False,
    "include_qkv_bias": False,
    "bias_for_layer_norm": False,
    "input_emb_norm": False,
    "scale_logits": False,
    "block_group_size": 1,
}


def read_config(path):
    """config.json as a dict, with the defaults of what it leaves out. Mistake if we have no such model."""
    theirs = hub.read_kind(path, ("llada",))
    given = {name: value for name, value in theirs.items() if value is not None}
    given.setdefault("n_kv_heads", 1 if given.get("multi_query_attention") else given.get("n_heads", 32))
    given.setdefault("embedding_size", given.get("vocab_size", DEFAULTS["embedding_size"]))
    theirs = hub.with_defaults(
        given, DEFAULTS, REQUIRED, "activation_type", path, may_be_0=("mask_token_id", "eos_token_id")
    )
    if theirs["d_model"] % (2 * theirs["n_heads"]) or theirs["n_heads"] % theirs["n_kv_heads"]:
        raise Mistake(f"{path}: d_model is not a multiple of twice n_heads, or n_heads none of n_kv_heads")
    return theirs


def our_config(theirs, tokenizer, tied):
    """Our config of their config. What ends a text, or a turn of a conversation, is written."""
    ends = theirs["eos_token_id"], tokenizer.special.get("<|eot_id|>")
    end_ids = tuple(dict.fromkeys(i for i in ends if i in tokenizer.special_ids))
    return Network.Config(
        vocab_size=theirs["embedding_size"],
        mask_id=tokenizer.mask_id,
        special_ids=tuple(i for i in tokenizer.special_ids if i not in end_ids),
        end_ids=end_ids,
        context=theirs["max_sequence_length"],
        n_layer=theirs["n_layers"],
        n_head=theirs["n_heads"],
        n_kv_head=theirs["n_kv_heads"],
        n_embd=theirs["d_model"],
        dropout=theirs["residual_dropout"],
        rope_base=theirs["rope_theta"],
        mlp_width=theirs["mlp_hidden_size"],
        activation=hub.OUR_ACTIVATION[theirs["activation_type"]],
        norm_eps=theirs["rms_norm_eps"],
        tied=tied,
    )


# --- tensors -------------------------------------------------------------------------------------

NAMES = {
    "token_embedding": "wte",
    "attention_norm": "attn_norm",
    "attention.query": "q_proj",
    "attention.key": "k_proj",
    "attention.value": "v_proj",
    "attention.out": "attn_out",
    "mlp_norm": "ff_norm",
    "mlp.gate": "ff_proj",  # which the activation is of
    "mlp.up": "up_proj",
    "mlp.down": "ff_out",
    "final_norm": "ln_f",
    "head": "ff_out",  # of the whole network, not of a layer
}


def plain_name(name):
    return name.removeprefix("model.").removeprefix("transformer.")


SPELLING = hub.only_names(
    plain_name,
    ("wte.weight", "ff_out.weight"),
    re.compile(r"rotary_emb\."),
    lambda name: hub.their_name(name, NAMES, "blocks"),
)


def convert(theirs, tokenizer, path, tensors):
    """Our model with their tensors, and the names of those that it has no use for."""
    may_tie = theirs["weight_tying"]
    return hub.convert(tensors, path, SPELLING, Network, functools.partial(our_config, theirs, tokenizer), may_tie)


# --- conversations -------------------------------------------------------------------------------

# The one template that we know, Llama 3's, as Jinja: it opens a text, and wraps each turn.
TEMPLATE = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
)
TURN = "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>"


def read_chat(folder, tokenizer):
    """(the template of conversations as data/lib/chat.py has it, or None; what is not used)."""
    path = folder / "tokenizer_config.json"
    settings = hub.read_json(path) if path.exists() else {}
    template, opening = settings.get("chat_template"), settings.get("bos_token")
    if template is None:
        return None, []
    opening = opening.get("content") if isinstance(opening, dict) else opening  # with how it is matched
    names = {*re.findall(r"<\|\w+\|>", TURN), "<|endoftext|>"}
    known = "".join(str(template).replace("\\n", "\n").split()).startswith("".join(TEMPLATE.split()))
    if not known or opening not in [*tokenizer.special] or not names <= tokenizer.special.keys():
        return None, ["the chat_template, which is not LLaDA's"]
    return {"opening": opening, "turn": TURN, "end": "<|endoftext|>"}, []


# --- the command ---------------------------------------------------------------------------------


def convert_folder(folder):
    """(model, tokenizer, what is not used, the template of conversations) of the files in a folder."""
    theirs = read_config(folder / "config.json")
    tokenizer = hub.read_tokenizer_json(folder, theirs["embedding_size"], theirs["mask_token_id"])
    chat, unused = read_chat(folder, tokenizer)
    model, skipped = convert(theirs, tokenizer, *hub.read_weights(folder))
    return model, tokenizer, hub.not_used(skipped) + unused, {} if chat is None else {"chat": chat}


def main():
    what = "the files of such a model"
    hub.main(__doc__.splitlines()[0], DATA / "llada", REPOSITORIES, what, convert_folder)


if __name__ == "__main__":
    command(main)
