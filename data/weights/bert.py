"""BERT and RoBERTa (1810.04805, 1907.11692): norms after each sum, a table of positions, a deeper head."""

from dataclasses import dataclass

import torch
import torch.nn as nn

from data.lib.errors import Mistake
from data.weights import hub
from data.weights.parts import ACTIVATIONS, PositionsConfig, Published, PublishedLayer

FILES = "config.json", "vocab.json", "merges.txt", "pytorch_model.bin"
REPOSITORIES = {name: {f"FacebookAI/{name}": FILES} for name in ("roberta-base", "roberta-large")}
REPOSITORIES["distilroberta-base"] = {"distilbert/distilroberta-base": FILES}
SETTINGS = {"vocab_size": "vocab_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads"}
SETTINGS |= {"n_embd": "hidden_size", "mlp_width": "intermediate_size", "token_types": "type_vocab_size"}
SETTINGS |= {"activation": "hidden_act", "dropout": "hidden_dropout_prob", "norm_eps": "layer_norm_eps"}
REQUIRED = {"position_embedding_type": "absolute", "is_decoder": False}
BODY = {"embeddings.word_embeddings": "token_embedding", "embeddings.position_embeddings": "position_embedding"}
BODY |= {"embeddings.token_type_embeddings": "type_embedding", "embeddings.LayerNorm": "embedding_norm"}
BODY |= {f"attention.self.{name}": f"attention.{name}" for name in ("query", "key", "value")}
BODY |= {"attention.output.dense": "attention.out", "attention.output.LayerNorm": "attention_norm"}
BODY |= {"intermediate.dense": "mlp.up", "output.dense": "mlp.down", "output.LayerNorm": "mlp_norm"}
ROBERTA_HEAD = {"lm_head.dense": "transform", "lm_head.layer_norm": "transform_norm", "lm_head.decoder": "head"}
ROBERTA_HEAD |= {"lm_head.bias": "copy_of_bias"}  # if the file has both, the decoder's own bias is used
BERT_HEAD = {"cls.predictions.transform.dense": "transform", "cls.predictions.decoder": "head"}
BERT_HEAD |= {"cls.predictions.transform.LayerNorm": "transform_norm", "cls.predictions.bias": "copy_of_bias"}
PREFIX, LAYERS, NAMES = r"roberta\.|bert\.", "encoder.layer", BODY | ROBERTA_HEAD | BERT_HEAD
IGNORED = r"pooler\.|cls\.(?!predictions\.)|classifier\.|qa_outputs\.|embeddings\.position_ids"  # other heads


@dataclass
class BertConfig(PositionsConfig):
    token_types: int = 2  # rows of a table whose first row is added to every token
    head_activation: str = "gelu"


class BertLayer(PublishedLayer):
    def forward(self, x, layout):
        x = self.attention_norm(x[:, layout.first :] + self.dropout(self.attention(x, layout)))
        return self.mlp_norm(x + self.dropout(self.mlp(x)))


class Network(Published):
    family, Config, Layer, head_bias = "bert", BertConfig, BertLayer, True

    def __init__(self, config):
        super().__init__(config)
        self.type_embedding = nn.Embedding(config.token_types, config.n_embd)
        self.embedding_norm, self.transform_norm = (nn.LayerNorm(config.n_embd, config.norm_eps) for _ in range(2))
        self.transform, self.final_norm = nn.Linear(config.n_embd, config.n_embd), nn.Identity()
        self.head_activation = ACTIVATIONS[config.head_activation]

    def embed(self, tokens, positions):
        x = self.token_embedding(tokens) + self.position_embedding(self.config.first_position + positions)
        return self.dropout(self.embedding_norm(x + self.type_embedding.weight[0]))

    def unembed(self, x, positions):
        return super().unembed(self.transform_norm(self.head_activation(self.transform(x))), positions)


def add_head(tensors):
    """Add a head to a sentence encoder. It hands the last layer's vectors on to the tied embedding almost unchanged."""
    embedding = tensors["token_embedding.weight"]
    V, C = embedding.shape
    head = {"transform.weight": torch.eye(C) / 16}  # GELU is nearly linear there, and the norm undoes the scale
    head |= {"transform.bias": torch.zeros(C), "transform_norm.weight": torch.ones(C)}
    head |= {"transform_norm.bias": torch.zeros(C), "head.bias": torch.zeros(V)}
    tensors |= {name: tensor.type_as(embedding) for name, tensor in head.items()}
    print("these weights have no head that predicts tokens, so fine-tuning has to teach it; it starts as the embedding")


def convert(folder, theirs, settings, tensors):
    for name in [*tensors]:  # TensorFlow's names for a norm's weight and bias are gamma and beta
        tensors[name.replace(".gamma", ".weight").replace(".beta", ".bias")] = tensors.pop(name)
    if not any(name.startswith(("transform", "head.", "copy_of_bias")) for name in tensors):
        add_head(tensors)
    tensors.setdefault("head.bias", tensors.pop("copy_of_bias", None))
    if theirs["model_type"] == "roberta":
        tokenizer = hub.bpe_tokenizer(folder, *hub.read_bpe(folder), theirs["vocab_size"])
        settings["first_position"] = theirs["pad_token_id"] + 1
    else:
        tokenizer = hub.read_wordpiece(folder, theirs["vocab_size"])
        settings["head_activation"] = settings["activation"]
    settings |= {"mask_id": tokenizer.mask_id, "special_ids": tokenizer.special_ids}
    settings["context"] = theirs["max_position_embeddings"] - settings.get("first_position", 0)
    settings["tied"] = theirs.get("tie_word_embeddings", True)
    return tokenizer, {}


def export(path, model, tokenizer):
    """Return config.json, other text files by name, tensors by our names, the names of both, and the body's prefix."""
    config = model.config
    if config.block is not None or config.shift_id is not None:
        raise Mistake(f"{path}: it was trained with another attention, so it is not a RoBERTa or BERT any more")
    if tokenizer.state["kind"] == "bpe":
        kind, head, texts, pad_id = "roberta", ROBERTA_HEAD, hub.bpe_texts(tokenizer), config.first_position - 1
    else:
        kind, head, texts, pad_id = "bert", BERT_HEAD, hub.wordpiece_texts(tokenizer), tokenizer.first("[PAD]")
    theirs = {"model_type": kind, "architectures": [f"{kind.capitalize()}ForMaskedLM"]}
    theirs |= {"tie_word_embeddings": config.tied, "attention_probs_dropout_prob": config.dropout}
    theirs |= {"max_position_embeddings": config.first_position + config.context, "pad_token_id": pad_id}
    theirs |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    return theirs, texts, model.state_dict() | {"copy_of_bias": model.head.bias.data}, BODY | head, kind
