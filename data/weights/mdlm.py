"""MDLM's and BD3-LM's network (2406.07524, 2503.09573): rotary positions, biases, a head with a bias."""

from data.lib.kernels import Linear
from data.weights.parts import BiasedLayer, Published, PublishedConfig, norm


class Network(Published):
    family, Config, Layer = "mdlm", PublishedConfig, BiasedLayer

    def __init__(self, config):
        super().__init__(config)
        self.final_norm, self.head = norm(config), Linear(config.n_embd, config.vocab_size)
        self.tie()
        self.apply(self.init_weights)
