"""GPT-2, and DiffuGPT (2410.17891), which is GPT-2 with its attention opened: biases and a table of positions."""

import torch

from data.lib.errors import Mistake
from data.weights import hub
from data.weights.parts import PositionsConfig, Published

FILES = "config.json", "vocab.json", "merges.txt", "pytorch_model.bin"
OPENED_FILES = *FILES[:3], "model.safetensors"
REPOSITORIES = {name: {f"openai-community/{name}": FILES} for name in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")}
REPOSITORIES["distilgpt2"] = {"distilbert/distilgpt2": FILES}
REPOSITORIES |= {name: {f"diffusionfamily/{name}": OPENED_FILES} for name in ("diffugpt-s", "diffugpt-m")}
START = "<|endoftext|>"  # ends one text and begins the next
SMALL_MASK = 10541  # the token that became the mask of diffugpt-s: twelve dashes
SETTINGS = {"context": "n_positions", "n_layer": "n_layer", "n_head": "n_head", "n_embd": "n_embd"}
SETTINGS |= {"activation": "activation_function", "dropout": "resid_pdrop", "norm_eps": "layer_norm_epsilon"}
REQUIRED = {"scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
NAMES = {"wte": "token_embedding", "wpe": "position_embedding", "ln_f": "final_norm", "lm_head": "head"}
NAMES |= {"ln_1": "attention_norm", "attn.c_attn": "attention.all", "attn.c_proj": "attention.out"}
NAMES |= {"ln_2": "mlp_norm", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"}
PREFIX, LAYERS = r"transformer\.|denoise_model\.", "h"
IGNORED = r"score\.|classifier\.|multiple_choice_head\.|qa_outputs\."  # the heads of other tasks


class Network(Published):
    family, Config = "gpt2", PositionsConfig


def read_tokenizer(folder, n_rows, opened=False):
    """GPT-2's tokens, with `<mask>` as the last of n_rows or, if opened, where DiffuGPT has it."""
    text, special = hub.read_bpe(folder)
    if START not in special:
        raise Mistake(f"{folder}: its vocabulary has no {START}, which GPT-2 reads before a text")
    mask_id = n_rows - 1
    if opened:  # the mask is the row after GPT-2's tokens or, if there is no such row, one of the tokens
        special = {START: special[START]}
        mask_id = len(text) + 1 if n_rows > len(text) + 1 else SMALL_MASK
        text = {token: i for token, i in text.items() if i != mask_id}  # so shorter tokens encode it
    return hub.bpe_tokenizer(folder, text, special | {"<mask>": mask_id}, n_rows)


def convert(folder, theirs, settings, tensors):
    for name in [name for name in tensors if name.endswith((".attn.bias", ".attn.masked_bias"))]:
        del tensors[name]  # the causal mask, which old files contain
    opened = "embed_tokens.weight" in tensors
    if opened:
        tensors["token_embedding.weight"] = tensors.pop("embed_tokens.weight")
        settings["vocab_size"] = len(tensors["token_embedding.weight"])
        settings["context"] -= 1  # the last token is read at a position of its own
    else:
        settings |= {"block": 1, "vocab_size": theirs["vocab_size"] + 1}
        hub.add_row(tensors)
    # The matrices of their layers are (in, out).
    tensors |= {name: tensor.t().contiguous() for name, tensor in tensors.items() if name.startswith("layers.")}
    tokenizer = read_tokenizer(folder, settings["vocab_size"], opened)
    settings |= {"mask_id": tokenizer.mask_id, "special_ids": tokenizer.special_ids, "shift_id": tokenizer.first(START)}
    settings |= {"mlp_width": theirs.get("n_inner") or 0, "tied": theirs.get("tie_word_embeddings", True)}
    return tokenizer, {}


def export(path, model, tokenizer):
    """Like export in bert.py, but for a GPT-2, and without the row of `<mask>`."""
    config, tensors = model.config, model.state_dict()
    if config.block != 1:
        raise Mistake(f"{path}: it was trained with another attention, so it is not a GPT-2 any more")
    theirs = {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "tie_word_embeddings": config.tied}
    theirs |= {"vocab_size": config.vocab_size - 1, "embd_pdrop": config.dropout, "attn_pdrop": config.dropout}
    theirs |= {"bos_token_id": config.shift_id, "eos_token_id": config.shift_id, "n_inner": config.mlp_width or None}
    tensors |= {name: tensors[name][:-1].clone() for name in hub.TABLES}
    if config.tied:
        del tensors["head.weight"]
    for name in [name for name in tensors if ".attention.query." in name]:
        parts = [tensors.pop(name.replace("query", part)) for part in ("query", "key", "value")]
        tensors[name.replace("query", "all")] = torch.cat(parts)
    tensors |= {name: tensor.t().contiguous() for name, tensor in tensors.items() if name.startswith("layers.")}
    return theirs, hub.bpe_texts(tokenizer, ["<mask>"]), tensors, NAMES, "transformer"
