"""LLaDA's network (2502.09992), which is Llama's with open attention: RMSNorm, a gated MLP, shared keys and
values.
"""

from dataclasses import dataclass

import torch.nn as nn

from data.lib.kernels import Linear
from data.weights.parts import BiasedMLP, Published, PublishedConfig
from model import Attention, Layer, rotary_angles


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
        self.key, self.value = (Linear(config.n_embd, width, bias=False) for _ in range(2))
        self.query_norm = self.key_norm = nn.Identity()


class LladaMLP(BiasedMLP):
    """One hidden layer times another one without an activation (GLU, 2002.05202)."""

    def __init__(self, config):
        super().__init__(config, bias=False)
        self.gate = Linear(config.n_embd, self.up.out_features, bias=False)

    def forward(self, x):
        return self.down(self.activation(self.gate(x)) * self.up(x))


def norm(config):
    return nn.RMSNorm(config.n_embd, config.norm_eps)  # 1910.07467


class LladaLayer(Layer):
    def __init__(self, config):
        super().__init__(config)
        self.attention, self.mlp = LladaAttention(config), LladaMLP(config)
        self.attention_norm, self.mlp_norm = norm(config), norm(config)


class Network(Published):
    family, Config, Layer = "llada", LladaConfig, LladaLayer

    def __init__(self, config):
        super().__init__(config)
        self.final_norm = norm(config)
        self.tie()
        self.apply(self.init_weights)

    def angles(self, positions):
        D = self.config.n_embd // self.config.n_head
        return rotary_angles(positions, D, self.config.rope_base)
