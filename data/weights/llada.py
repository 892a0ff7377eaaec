"""LLaDA (2502.09992), which is Llama with open attention: RMSNorm, a gated MLP, shared keys and values."""

from data.weights import hub
from data.weights.parts import Published, RMSLayer

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
PREFIX, LAYERS, IGNORED = r"(model\.)?transformer\.", "blocks", r"rotary_emb\."
# The chat template, which is Llama 3's, in the form of data/lib/chat.py.
CHAT = {"opening": "<|startoftext|>", "end": "<|endoftext|>"}
CHAT["turn"] = "<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>"


class Network(Published):
    family, Layer = "llada", RMSLayer


def convert(folder, theirs, settings, tensors):
    text, special, pattern, form = hub.read_tokenizer_json(folder)
    special = {name: i for name, i in special.items() if i != settings["mask_id"]} | {"<mask>": settings["mask_id"]}
    special = {name.replace("[CLS]", "<|CLS|>"): i for name, i in special.items()}  # here it doesn't open lines
    tokenizer = hub.bpe_tokenizer(folder, text, special, settings["vocab_size"], pattern, form)
    ends = [special[name] for name in ("<|endoftext|>", "<|eot_id|>") if name in special]  # it learned to write them
    settings |= {"special_ids": tuple(i for i in tokenizer.special_ids if i not in ends), "end_ids": tuple(ends)}
    settings["tied"] = theirs.get("weight_tying", False)
    chats = all(f"<|{name}|>" in special for name in ("startoftext", "start_header_id", "end_header_id", "eot_id"))
    return tokenizer, {"chat": CHAT} if chats else {}
