"""Layers that several published networks share: biases, other activations, a table of positions, a tied head."""

from dataclasses import dataclass

import torch.nn as nn

from model import MLP, Attention, Layer, ModelConfig, Transformer, rotary_angles

ACTIVATIONS = {"gelu": nn.GELU(), "gelu_python": nn.GELU(), "relu": nn.ReLU(), "silu": nn.SiLU(), "swish": nn.SiLU()}
ACTIVATIONS |= dict.fromkeys(("gelu_new", "gelu_pytorch_tanh", "gelu_tanh"), nn.GELU("tanh"))


@dataclass
class PublishedConfig(ModelConfig):
    conv: int = 0
    n_kv_head: int = 0  # heads of keys and values, each shared by several heads of queries (2305.13245); 0: n_head
    head_dim: int = 0  # width of a head; 0: n_embd / n_head
    mlp_width: int = 0  # width of the MLP's hidden layer; 0: 4 * n_embd
    activation: str = "gelu"  # one of ACTIVATIONS
    norm_eps: float = 1e-5  # added to the variance
    rope_base: float = 10000.0
    tied: bool = False  # the head's matrix is the token embedding

    def __post_init__(self):
        super().__post_init__()
        if self.n_head % (self.n_kv_head or self.n_head) or self.rope_base <= 0 or self.head_dim % 2:
            raise ValueError("n_kv_head must divide n_head, rope_base must be positive, and head_dim even")


@dataclass
class PositionsConfig(PublishedConfig):
    learned_positions = True
    first_position: int = 0  # row of the table for the first token; RoBERTa starts at 2

    @property
    def n_more(self):
        return int(self.shift_id is not None and self.block is None)  # 1: the last token is read too, at T


class PublishedAttention(Attention):
    def __init__(self, config, bias):
        super().__init__(config)
        self.head_dim, C = config.head_dim or self.head_dim, config.n_embd
        width, shared = (self.head_dim * n for n in (config.n_head, config.n_kv_head or config.n_head))
        self.query, self.out = nn.Linear(C, width, bias), nn.Linear(width, C, bias)
        self.key, self.value = (nn.Linear(C, shared, bias) for _ in range(2))
        self.query_norm = self.key_norm = nn.Identity()

    def rotate(self, q, k, layout):
        return (q, k) if layout.angles is None else super().rotate(q, k, layout)


class PublishedMLP(MLP):
    def __init__(self, config, bias):
        super().__init__(config)
        width = config.mlp_width or 4 * config.n_embd
        self.up, self.down = nn.Linear(config.n_embd, width, bias), nn.Linear(width, config.n_embd, bias)
        self.activation = ACTIVATIONS[config.activation]

    def forward(self, x):
        return self.down(self.activation(self.up(x)))


class GatedMLP(PublishedMLP):
    def __init__(self, config, bias):
        super().__init__(config, bias)
        self.gate = nn.Linear(config.n_embd, self.up.out_features, bias)

    def forward(self, x):
        return self.down(self.activation(self.gate(x)) * self.up(x))  # GLU, 2002.05202


class PublishedLayer(Layer):
    MLP, Norm, bias = PublishedMLP, nn.LayerNorm, True

    def __init__(self, config):
        super().__init__(config)
        self.attention, self.mlp = PublishedAttention(config, self.bias), self.MLP(config, self.bias)
        self.attention_norm, self.mlp_norm = (self.Norm(config.n_embd, config.norm_eps) for _ in range(2))


class RMSLayer(PublishedLayer):
    MLP, Norm, bias = GatedMLP, nn.RMSNorm, False  # 1910.07467


class Published(Transformer):
    Config, Layer, head_bias = PublishedConfig, PublishedLayer, False

    def __init__(self, config):
        super().__init__(config)
        self.final_norm = self.Layer.Norm(config.n_embd, config.norm_eps)
        self.head = nn.Linear(config.n_embd, config.vocab_size, self.head_bias)
        if config.learned_positions:
            n_rows = config.first_position + config.context + config.n_more
            self.position_embedding = nn.Embedding(n_rows, config.n_embd)
        self.tie()
        self.register_load_state_dict_post_hook(Published.tie)  # load_state_dict(assign=True) unties them

    def tie(self, _=None):
        if self.config.tied:
            self.head.weight = self.token_embedding.weight

    def embed(self, tokens, positions):
        x = self.token_embedding(tokens)
        if self.config.learned_positions:
            x = x + self.position_embedding(self.config.first_position + positions)
        return self.dropout(x)

    def angles(self, positions):
        D = self.config.head_dim or self.config.n_embd // self.config.n_head
        return None if self.config.learned_positions else rotary_angles(positions, D, self.config.rope_base)
