"""GPT-2's network, and DiffuGPT's (2410.17891), which is the same one opened: biases and a table of
positions.
"""

from data.weights.parts import BiasedLayer, PositionsConfig, UnplacedAttention, WithPositions, norm


class GPT2Layer(BiasedLayer):
    Attention = UnplacedAttention


class Network(WithPositions):
    family, Config, Layer = "gpt2", PositionsConfig, GPT2Layer

    def __init__(self, config):
        super().__init__(config)
        self.final_norm = norm(config)
        self.tie()
        self.apply(self.init_weights)
