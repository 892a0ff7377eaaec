"""Parts that several published networks share: biases, other activations, a table of positions, a tied head."""

import functools
from dataclasses import dataclass

import torch.nn as nn
import torch.nn.functional as F

from data.lib.kernels import Linear
from model import MLP, Attention, Layer, ModelConfig, Transformer

ACTIVATIONS = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}
ACTIVATIONS["gelu_tanh"] = functools.partial(F.gelu, approximate="tanh")


@dataclass
class PublishedConfig(ModelConfig):
    conv: int = 0
    mlp_width: int = 0  # width of the MLP's hidden layer; 0: 4 * n_embd
    activation: str = "gelu"  # one of ACTIVATIONS
    norm_eps: float = 1e-5  # added to the variance
    tied: bool = False  # the head's matrix is the token embedding


@dataclass
class PositionsConfig(PublishedConfig):
    """The config of a model with a table of positions."""

    learned_positions = True
    first_position: int = 0  # row of the table that the first token takes; RoBERTa starts at 2

    @property
    def n_more(self):
        """1 if the last token is also read, at position T, as on a canvas with a shift. Else 0."""
        return int(self.shift_id is not None and self.block is None)

    @property
    def n_positions(self):
        """Rows of the table."""
        return self.first_position + self.context + self.n_more


class BiasedAttention(Attention):
    """Attention with biases, and without the norms of queries and keys."""

    def __init__(self, config):
        super().__init__(config)
        C = config.n_embd
        self.query, self.key, self.value, self.out = (Linear(C, C) for _ in range(4))
        self.query_norm = self.key_norm = nn.Identity()


class UnplacedAttention(BiasedAttention):
    """The same for a model whose embedding says where a token stands."""

    def place(self, q, k, layout):
        return q, k


class BiasedMLP(MLP):
    def __init__(self, config, bias=True):
        super().__init__(config)
        width = config.mlp_width or 4 * config.n_embd
        self.up, self.down = Linear(config.n_embd, width, bias), Linear(width, config.n_embd, bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x):
        return self.down(self.activation(self.up(x)))


def norm(config):
    return nn.LayerNorm(config.n_embd, config.norm_eps)


class BiasedLayer(Layer):
    Attention = BiasedAttention

    def __init__(self, config):
        super().__init__(config)
        self.attention, self.mlp = self.Attention(config), BiasedMLP(config)
        self.attention_norm, self.mlp_norm = norm(config), norm(config)


class Published(Transformer):
    """A network whose head may be the token embedding."""

    def tie(self):
        if self.config.tied:
            self.head.weight = self.token_embedding.weight

    def load_state_dict(self, *args, **kwargs):
        result = super().load_state_dict(*args, **kwargs)
        self.tie()
        return result


class WithPositions(Published):
    """A network with a table of positions, a row of which is added to each token."""

    def __init__(self, config):
        super().__init__(config)
        self.position_embedding = nn.Embedding(config.n_positions, config.n_embd)

    def embed(self, tokens, positions):
        x = self.token_embedding(tokens) + self.position_embedding(self.config.first_position + positions)
        return self.dropout(x)

    def angles(self, positions):
        return None
