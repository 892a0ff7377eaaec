"""MDLM and BD3-LM (2406.07524, 2503.09573): rotary positions, biases, a head with a bias.

Their network (2212.09748) has an input for the noise level, which is always 0, because the holes show the level. So the
shift, scale and gate that each layer computes from it are constants, which we fold into the norms and matrices.
"""

import torch
import torch.nn.functional as F

from data.weights import gpt2
from data.weights.parts import Published

TOKENS = {"openai-community/gpt2": ("vocab.json", "merges.txt")}
MODELS = "mdlm-owt", *(f"bd3lm-owt-block_size{K}" for K in (4, 8, 16))
REPOSITORIES = {name: {f"kuleshov-group/{name}": ("config.json", "model.safetensors")} | TOKENS for name in MODELS}
SETTINGS = {"vocab_size": "vocab_size", "context": "model_length", "n_layer": "n_blocks", "n_head": "n_heads"}
SETTINGS |= {"n_embd": "hidden_dim", "dropout": "dropout"}
REQUIRED = {"time_conditioning": False, "causal": False}
NAMES = {"vocab_embed.embedding": "token_embedding.weight", "attn_qkv": "attention.all", "attn_out": "attention.out"}
NAMES |= {"norm1": "attention_norm", "norm2": "mlp_norm", "mlp.0": "mlp.up", "mlp.2": "mlp.down"}
NAMES |= {"output_layer.norm_final": "final_norm", "output_layer.linear": "head"}
PREFIX, LAYERS, IGNORED = r"backbone\.", "blocks", r"rotary_emb\.|sampling_eps_(min|max)$"  # angles; noise levels


class Network(Published):
    family, head_bias = "mdlm", True


def fold_level(tensors, n_layer):
    """Fold what the network computes from level 0 into its norms and matrices."""

    def linear(name, x):
        return F.linear(x, tensors.pop(f"{name}.weight").float(), tensors.pop(f"{name}.bias").float())

    def fold(module, factor, shift=0):
        weight, bias = (tensors[f"{module}.{parameter}"] for parameter in ("weight", "bias"))
        tensors[f"{module}.weight"] = ((factor if weight.ndim == 1 else factor[:, None]) * weight).type_as(weight)
        tensors[f"{module}.bias"] = (factor * bias + shift).type_as(weight)

    level = (torch.arange(256) < 128).float()  # cosines and sines of level 0
    level = F.silu(linear("sigma_map.mlp.2", F.silu(linear("sigma_map.mlp.0", level))))
    shift, scale = linear("output_layer.adaLN_modulation", level).chunk(2)
    fold("final_norm", 1 + scale, shift)
    for i in range(n_layer):
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = linear(f"blocks.{i}.adaLN_modulation", level).chunk(6)
        fold(f"layers.{i}.attention_norm", 1 + scale, shift)
        fold(f"layers.{i}.attention.out", gate)
        fold(f"layers.{i}.mlp_norm", 1 + mlp_scale, mlp_shift)
        fold(f"layers.{i}.mlp.down", mlp_gate)


def convert(folder, theirs, settings, tensors):
    tokenizer = gpt2.read_tokenizer(folder, theirs["vocab_size"])
    for name, tensor in [*tensors.items()]:  # our norms and attention have biases, theirs don't
        if "norm." in name or ".attention." in name:
            tensors.setdefault(name.replace("weight", "bias"), tensor.new_zeros(len(tensor)))
    if theirs.get("adaln", True):
        fold_level(tensors, theirs["n_blocks"])
    K = theirs["block_size"] if theirs["model_type"] == "bd3lm" and theirs.get("cross_attn", True) else None
    settings |= {"block": None if K == theirs["model_length"] else K, "activation": "gelu_tanh"}
    settings |= {"mask_id": tokenizer.mask_id, "special_ids": (tokenizer.mask_id,)}  # it learned to write <|endoftext|>
    return tokenizer, {}
