"""Layers that several published networks share: biases, other activations, a table of positions, a tied head."""

import functools
from dataclasses import dataclass

import torch.nn as nn
import torch.nn.functional as F

from model import MLP, Attention, Layer, ModelConfig, Transformer

GELU_TANH = functools.partial(F.gelu, approximate="tanh")
ACTIVATIONS = {"gelu": F.gelu, "gelu_python": F.gelu, "relu": F.relu, "silu": F.silu, "swish": F.silu}
ACTIVATIONS |= {"gelu_new": GELU_TANH, "gelu_pytorch_tanh": GELU_TANH, "gelu_tanh": GELU_TANH}


@dataclass
class PublishedConfig(ModelConfig):
    conv: int = 0
    mlp_width: int = 0  # width of the MLP's hidden layer; 0: 4 * n_embd
    activation: str = "gelu"  # one of ACTIVATIONS
    norm_eps: float = 1e-5  # added to the variance
    tied: bool = False  # the head's matrix is the token embedding


@dataclass
class PositionsConfig(PublishedConfig):
    learned_positions = True
    first_position: int = 0  # row of the table for the first token; RoBERTa starts at 2

    @property
    def n_more(self):
        """1 if the last token is read too, at position T, as on a canvas with a shift. Else 0."""
        return int(self.shift_id is not None and self.block is None)

    @property
    def n_positions(self):
        """Rows of the table."""
        return self.first_position + self.context + self.n_more


class BiasedAttention(Attention):
    """Attention with biases, and without norms of queries and keys. With a table of positions nothing rotates."""

    def __init__(self, config):
        super().__init__(config)
        C = config.n_embd
        self.query, self.key, self.value, self.out = (nn.Linear(C, C) for _ in range(4))
        self.query_norm = self.key_norm = nn.Identity()

    def place(self, q, k, layout):
        return (q, k) if layout.angles is None else super().place(q, k, layout)


class BiasedMLP(MLP):
    def __init__(self, config, bias=True):
        super().__init__(config)
        width = config.mlp_width or 4 * config.n_embd
        self.up, self.down = nn.Linear(config.n_embd, width, bias), nn.Linear(width, config.n_embd, bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x):
        return self.down(self.activation(self.up(x)))


class PublishedLayer(Layer):
    Attention, MLP, Norm = BiasedAttention, BiasedMLP, nn.LayerNorm

    def __init__(self, config):
        super().__init__(config)
        self.attention, self.mlp = self.Attention(config), self.MLP(config)
        self.attention_norm, self.mlp_norm = (self.Norm(config.n_embd, config.norm_eps) for _ in range(2))


class Published(Transformer):
    """A network whose head may be the token embedding, and which may add a learned vector for each position."""

    Layer, head_bias = PublishedLayer, False

    def __init__(self, config):
        super().__init__(config)
        self.final_norm = self.Layer.Norm(config.n_embd, config.norm_eps)
        self.head = nn.Linear(config.n_embd, config.vocab_size, self.head_bias)
        if config.learned_positions:
            self.position_embedding = nn.Embedding(config.n_positions, config.n_embd)
        self.tie()
        self.apply(self.init_weights)

    def tie(self):
        if self.config.tied:
            self.head.weight = self.token_embedding.weight

    def load_state_dict(self, *args, **kwargs):
        result = super().load_state_dict(*args, **kwargs)
        self.tie()
        return result

    def embed(self, tokens, positions):
        x = self.token_embedding(tokens)
        if self.config.learned_positions:
            x = x + self.position_embedding(self.config.first_position + positions)
        return self.dropout(x)

    def angles(self, positions):
        return None if self.config.learned_positions else super().angles(positions)
