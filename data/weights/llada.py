"""LLaDA (2502.09992), which is Llama with open attention: RMSNorm, a gated MLP, shared keys and values."""

import re
from dataclasses import dataclass

import torch.nn as nn

from data.weights import hub, vocabulary
from data.weights.parts import BiasedMLP, Published, PublishedConfig, PublishedLayer
from model import Attention, rotary_angles


@dataclass
class LladaConfig(PublishedConfig):
    n_kv_head: int = 0  # heads of keys and values, each shared by several heads of queries (2305.13245); 0: n_head
    rope_base: float = 10000.0
    activation: str = "silu"

    def __post_init__(self):
        super().__post_init__()
        if self.n_head % (self.n_kv_head or self.n_head) or self.rope_base <= 0:
            raise ValueError("n_kv_head must divide n_head, and rope_base must be positive")


class LladaAttention(Attention):
    def __init__(self, config):
        super().__init__(config)
        width = self.head_dim * (config.n_kv_head or config.n_head)
        self.key, self.value = (nn.Linear(config.n_embd, width, bias=False) for _ in range(2))
        self.query_norm = self.key_norm = nn.Identity()


class LladaMLP(BiasedMLP):
    """An MLP whose hidden layer is multiplied by another one (GLU, 2002.05202), without biases."""

    def __init__(self, config):
        super().__init__(config, bias=False)
        self.gate = nn.Linear(config.n_embd, self.up.out_features, bias=False)

    def forward(self, x):
        return self.down(self.activation(self.gate(x)) * self.up(x))


class LladaLayer(PublishedLayer):
    Attention, MLP, Norm = LladaAttention, LladaMLP, nn.RMSNorm  # 1910.07467


class Network(Published):
    family, Config, Layer = "llada", LladaConfig, LladaLayer

    def angles(self, positions):
        return rotary_angles(positions, self.config.n_embd // self.config.n_head, self.config.rope_base)


# --- conversion ----------------------------------------------------------------------------------

KINDS = ("llada",)
FILES = "config.json", "tokenizer.json", "model.safetensors.index.json"
REPOSITORIES = {f"llada-{name}".lower(): {f"GSAI-ML/LLaDA-{name}": FILES} for name in ("8B-Base", "8B-Instruct", "1.5")}
SETTINGS = {"vocab_size": "embedding_size", "context": "max_sequence_length", "n_embd": "d_model"}
SETTINGS |= {"n_layer": "n_layers", "n_head": "n_heads", "n_kv_head": "n_kv_heads", "mlp_width": "mlp_hidden_size"}
SETTINGS |= {"activation": "activation_type", "dropout": "residual_dropout", "norm_eps": "rms_norm_eps"}
SETTINGS |= {"rope_base": "rope_theta", "mask_id": "mask_token_id"}
REQUIRED = {"block_type": "llama", "layer_norm_type": "rms", "rope": True, "alibi": False}
REQUIRED |= {"input_emb_norm": False, "scale_logits": False}
NAMES = {"wte": "token_embedding", "attn_norm": "attention_norm", "attn_out": "attention.out"}
NAMES |= {"q_proj": "attention.query", "k_proj": "attention.key", "v_proj": "attention.value"}
NAMES |= {"ff_norm": "mlp_norm", "ff_proj": "mlp.gate", "up_proj": "mlp.up", "ff_out": "mlp.down"}
NAMES |= {"ln_f": "final_norm", "ff_out.weight": "head.weight"}  # ff_out is the head if it is not in a layer
IGNORED = r"rotary_emb\."
# The chat template, which is Llama 3's, in the form of data/lib/chat.py.
CHAT = {"opening": "<|startoftext|>", "end": "<|endoftext|>"}
CHAT["turn"] = "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>"


def read_tokenizer(folder, mask_id, n_rows):
    text, special, pattern = vocabulary.read_tokenizer_json(folder)
    special = {
        name.replace("[CLS]", "<|CLS|>"): i for name, i in special.items() if i != mask_id
    }  # it doesn't open lines
    return vocabulary.bpe_tokenizer(folder, text, special | {"<mask>": mask_id}, n_rows, pattern)


def convert(folder):
    """The model, its tokenizer, the names of tensors left out, and more for the checkpoint."""
    theirs, settings = hub.our_settings(folder / "config.json", SETTINGS, REQUIRED)
    tensors, unused = hub.read_weights(folder, r"(model\.)?transformer\.", NAMES, "blocks", IGNORED)
    tokenizer = read_tokenizer(folder, settings["mask_id"], settings["vocab_size"])
    ends = [tokenizer.special.get(name) for name in ("<|endoftext|>", "<|eot_id|>")]  # it learned to write them
    settings["special_ids"] = tuple(i for i in tokenizer.special_ids if i not in ends)
    settings["end_ids"] = tuple(i for i in ends if i is not None)
    config = LladaConfig(**settings, tied=theirs.get("weight_tying", False) and hub.tie(tensors))
    chats = {*re.findall(r"<\|\w+\|>", " ".join(CHAT.values()))} <= tokenizer.special.keys()
    return hub.load(Network, config, tensors), tokenizer, unused, {"chat": CHAT} if chats else {}
