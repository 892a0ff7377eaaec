"""BERT's and RoBERTa's network (1810.04805, 1907.11692): norms after each sum, a table of positions, a deeper
head.
"""

from dataclasses import dataclass

import torch.nn as nn

from data.lib.kernels import Linear
from data.weights.parts import (
    ACTIVATIONS,
    BiasedLayer,
    PositionsConfig,
    UnplacedAttention,
    WithPositions,
    norm,
)


@dataclass
class BertConfig(PositionsConfig):
    token_types: int = 2  # rows of a table, the first of which is added to every token
    head_activation: str = "gelu"  # of the layer before the head's matrix

    def __post_init__(self):
        super().__post_init__()
        if self.token_types < 1:
            raise ValueError("token_types must be at least 1")


class BertLayer(BiasedLayer):
    Attention = UnplacedAttention

    def forward(self, x, layout):
        attention = self.dropout(self.attention(x, layout))
        x = self.attention_norm(x[:, layout.first :] + attention)
        return self.mlp_norm(x + self.dropout(self.mlp(x)))


class Network(WithPositions):
    family, Config, Layer = "bert", BertConfig, BertLayer

    def __init__(self, config):
        super().__init__(config)
        self.type_embedding = nn.Embedding(config.token_types, config.n_embd)
        self.embedding_norm, self.final_norm = norm(config), nn.Identity()
        self.transform, self.transform_norm = Linear(config.n_embd, config.n_embd), norm(config)
        self.head_activation = ACTIVATIONS[config.head_activation]
        self.head = Linear(config.n_embd, config.vocab_size)
        self.tie()
        self.apply(self.init_weights)

    def embed(self, tokens, positions):
        x = self.token_embedding(tokens) + self.position_embedding(self.config.first_position + positions)
        return self.dropout(self.embedding_norm(x + self.type_embedding.weight[0]))

    def unembed(self, x, positions):
        x = self.transform_norm(self.head_activation(self.transform(x)))
        return super().unembed(x, positions)
