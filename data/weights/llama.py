"""Llama's family (2302.13971, 2505.09388) as GPTs: SmolLM2, TinyLlama, and Qwen3, which normalises queries and keys."""

import re
from dataclasses import dataclass

import torch.nn as nn

from data.weights import hub
from data.weights.parts import Published, PublishedConfig, RMSLayer

FILES = "config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"
NAMED = {f"SmolLM2-{size}{kind}": "HuggingFaceTB" for size in ("135M", "360M", "1.7B") for kind in ("", "-Instruct")}
NAMED |= dict.fromkeys(("TinyLlama-1.1B-Chat-v1.0", "TinyLlama-1.1B-intermediate-step-1431k-3T"), "TinyLlama")
NAMED |= {"Qwen3-0.6B": "Qwen", "Qwen3-0.6B-Base": "Qwen"}
REPOSITORIES = {name.lower(): {f"{owner}/{name}": FILES} for name, owner in NAMED.items()}
SETTINGS = {"vocab_size": "vocab_size", "context": "max_position_embeddings", "n_embd": "hidden_size"}
SETTINGS |= {"n_layer": "num_hidden_layers", "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads"}
SETTINGS |= {"mlp_width": "intermediate_size", "activation": "hidden_act", "norm_eps": "rms_norm_eps"}
SETTINGS |= {"rope_base": "rope_theta"}
REQUIRED = {"attention_bias": False, "mlp_bias": False, "rope_scaling": None, "rope_interleaved": False}
REQUIRED |= {"use_sliding_window": False, "rope_type": "default"}
NAMES = {"embed_tokens": "token_embedding", "norm": "final_norm", "lm_head": "head"}
NAMES |= {"input_layernorm": "attention_norm", "post_attention_layernorm": "mlp_norm"}
NAMES |= {f"self_attn.{their}_proj": f"attention.{our}" for their, our in zip("qkv", ("query", "key", "value"))}
NAMES |= {"self_attn.o_proj": "attention.out", "self_attn.q_norm": "attention.query_norm"}
NAMES |= {"self_attn.k_norm": "attention.key_norm"}
NAMES |= {f"mlp.{name}_proj": f"mlp.{name}" for name in ("gate", "up", "down")}
PREFIX, LAYERS, IGNORED = r"model\.", "layers", r"layers\.\d+\.self_attn\.rotary_emb\."  # angles, in old files
OPEN, CLOSE = "<|im_start|>", "<|im_end|>"  # of a turn
TINY = "{{ '<|user|>\n' + message['content'] + eos_token }}\n"  # in TinyLlama's chat_template
TINY_CHAT = {"opening": "", "turn": "<|{role}|>\n{content}<|endoftext|>\n", "end": "<|endoftext|>"}


@dataclass
class LlamaConfig(PublishedConfig):
    qk_norm: bool = False  # queries and keys are normalised, each head on its own


class LlamaLayer(RMSLayer):
    def __init__(self, config):
        super().__init__(config)
        if config.qk_norm:
            D = self.attention.head_dim
            self.attention.query_norm, self.attention.key_norm = (nn.RMSNorm(D, config.norm_eps) for _ in range(2))


class Network(Published):
    family, Config, Layer = "llama", LlamaConfig, LlamaLayer


def read_chat(folder, opener):
    """A template for data/lib/chat.py, if the folder's is ChatML or TinyLlama's. opener: what the model reads first."""
    path = folder / "tokenizer_config.json"
    theirs = str(hub.read_json(path).get("chat_template")) if path.exists() else ""
    if OPEN not in theirs:
        return {"chat": TINY_CHAT} if TINY in theirs else {}
    system = re.search(rf"{re.escape(OPEN)}system\n[^'{{}}]+{re.escape(CLOSE)}\n", theirs)  # if a user speaks first
    chat = {"opening": system[0] if system else "", "turn": f"{OPEN}{{role}}\n{{content}}{CLOSE}\n", "end": CLOSE}
    if opener == OPEN:  # the shift reads the first, so each turn ends with the one that opens the next
        chat |= {name: chat[name].removeprefix(OPEN) + OPEN for name in ("opening", "turn") if chat[name]}
    return {"chat": chat}


def convert(folder, theirs, settings, tensors):
    text, special, pattern, form = hub.read_tokenizer_json(folder)
    n_rows, taken = settings["vocab_size"], {*text.values(), *special.values()}
    mask_id = next((i for i in reversed(range(n_rows)) if i not in taken), n_rows)  # the last row without a token
    if mask_id == n_rows:
        settings["vocab_size"] = n_rows + 1
        hub.add_row(tensors)
    tokenizer = hub.bpe_tokenizer(folder, text, special | {"<mask>": mask_id}, settings["vocab_size"], pattern, form)
    eos = theirs.get("eos_token_id")
    ends = {*(eos if isinstance(eos, list) else [eos]), tokenizer.first("<|endoftext|>"), tokenizer.first(CLOSE)}
    ends = tuple(sorted(ends - {None}))
    settings |= {"block": 1, "mask_id": mask_id, "end_ids": ends, "head_dim": theirs.get("head_dim") or 0}
    settings["special_ids"] = tuple(i for i in tokenizer.special_ids if i not in ends)
    bos = theirs.get("bos_token_id")
    settings["shift_id"] = ends[0] if bos is None else bos  # a model without one reads <|endoftext|> before a text
    settings |= {"tied": theirs.get("tie_word_embeddings", False), "qk_norm": theirs["model_type"] == "qwen3"}
    opener = next((name for name, i in tokenizer.special.items() if i == settings["shift_id"]), None)
    return tokenizer, read_chat(folder, opener)
