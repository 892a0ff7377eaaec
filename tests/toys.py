"""Tiny models whose every probability can be written down."""

from itertools import permutations, product
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import data.lib.corpus
from data.lib.flags import Level
from data.lib.tokenizer import ByteTokenizer
from data.text.prepare import prepare
from data.weights import bert, gpt2, llada, llama, mdlm
from model import ModelConfig, Transformer
from train import corrupt, hole_weights, uniform_rates

level = Level.from_text
NETWORKS = {
    "setitem without convolution": {"conv": 0},
    "setitem, 5 taps": {"conv": 5},
    "setitem, 4 taps": {"conv": 4},
    "bert": {"network": bert.Network},
    "gpt2": {"network": gpt2.Network},
    "mdlm": {"network": mdlm.Network},
    "llada": {"network": llada.Network, "n_kv_head": 1},
    "llama": {"network": llama.Network, "head_dim": 6, "qk_norm": True},
}
MASK = 5  # of models with V = 5
SHAPES = {  # the networks, each with and without a shift
    f"{name}{', shifted' * (shift_id is not None)}": {"shift_id": shift_id, **network}
    for shift_id in (None, MASK)
    for name, network in NETWORKS.items()
}
ATTENTIONS = [{}, {"shift_id": 8}, {"block": 4}, {"block": 1, "shift_id": 8}]  # of models with V = 8
KS = 1, 2, 3, 4, 8, None  # of T = 8; 3 does not divide it
CAUSAL = {"block": 1, "shift_id": MASK}
every_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def tiny_model(V=3, T=3, seed=0, network=Transformer, **config):
    """A random network over V tokens and `<mask>`, with weights large enough to have opinions."""
    torch.manual_seed(seed)
    small = {"n_layer": 2, "n_head": 2, "n_embd": 16} | ({"conv": 3} if network is Transformer else {})
    model = network(network.Config(vocab_size=V + 1, mask_id=V, context=T, **{**small, **config}))
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model.eval()


def make_book(folder, n_lines=600):
    """Write a text, folder/book.txt, and its corpus in folder/data."""
    (folder / "book.txt").write_text("".join(f"line {i} of the book\n" for i in range(n_lines)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data.lib.corpus, "DATA", folder / "data")
        prepare(folder / "book.txt", "book", ByteTokenizer())


class Conditionals(nn.Module):
    """The perfect denoiser of a known joint: p(x_i | the tokens that are not masked), exactly.

    joint: (V,) * T tensor of probabilities.
    """

    def __init__(self, joint):
        super().__init__()
        self.joint = joint / joint.sum()
        self.T, self.V = joint.ndim, joint.shape[0]
        self.config = SimpleNamespace(
            vocab_size=self.V + 1, mask_id=self.V, context=self.T, special_ids=(), block=None, is_gpt=False
        )
        self.anchor = nn.Parameter(torch.zeros(1))  # says which device the model is on
        self.calls = 0

    def row_logits(self, row):
        seen = [slice(None) if token == self.V else slice(token, token + 1) for token in row]
        table = torch.zeros_like(self.joint)
        table[tuple(seen)] = self.joint[tuple(seen)]
        logits = torch.full((self.T, self.V + 1), -torch.inf)
        for i in range(self.T):
            marginal = table.sum([j for j in range(self.T) if j != i])
            logits[i, : self.V] = (marginal / marginal.sum()).log()
        return logits

    def forward(self, idx, where=None, clean=None, cache=None):
        self.calls += 1
        rows, inverse = idx.cpu().unique(dim=0, return_inverse=True)
        logits = torch.stack([self.row_logits(row.tolist()) for row in rows])[inverse].to(idx.device)
        return logits if where is None else logits[where]


def all_texts(V, T):
    """Every text of T tokens, (V**T, T)."""
    return torch.tensor(list(product(range(V), repeat=T)))


def chi_square_p(counts, probabilities):
    """p-value of observed counts under the probabilities (1-D tensors; empty classes are left out)."""
    keep = probabilities > 0
    assert counts[~keep].sum() == 0
    expected = probabilities[keep].double() * counts.sum()
    statistic = ((counts[keep] - expected) ** 2 / expected).sum()
    return torch.special.gammaincc((keep.sum() - 1).double() / 2, statistic / 2).item()


def corrupted(x0, maskable, t, u, mask_id, weight="elbo", rates=uniform_rates):
    """The corrupted text, its holes and their weights, (B, T) each, at levels t (B, 1)."""
    rate, slope = rates(t.expand(x0.shape), x0)
    xt, holes = corrupt(x0, rate, maskable, u, mask_id)
    return xt, holes, hole_weights(weight, rate, slope, holes, maskable)


def nats_of_mask(model, x0, holes):
    """-log p of each text's tokens at the holes (T,), together, given the rest: (N,)."""
    xt = x0.masked_fill(holes, model.config.mask_id)
    nats = F.cross_entropy(model(xt).flatten(0, 1), x0.flatten(), reduction="none").view(x0.shape)
    return (nats * holes).sum(-1)


def mean_nats_over_all_orders(model, x0):
    """Nats per token of each text, by the chain rule, averaged over every order of generation: (N,)."""
    T = x0.shape[1]
    orders = list(permutations(range(T)))
    total = torch.zeros(len(x0))
    for order in orders:
        holes = torch.ones(T, dtype=torch.bool)
        for i in order:
            alone = torch.zeros(T, dtype=torch.bool)
            alone[i] = True
            xt = x0.masked_fill(holes, model.config.mask_id)
            nats = F.cross_entropy(model(xt).flatten(0, 1), x0.flatten(), reduction="none").view(x0.shape)
            total += (nats * alone).sum(-1)
            holes[i] = False
    return total / len(orders) / T


class SurerWithMoreToSee(nn.Module):
    """Gives token 0 the larger probability the fewer masks there are, as any good denoiser does."""

    config = ModelConfig(vocab_size=4, mask_id=3)

    def __init__(self):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))  # says which device the model is on

    def forward(self, idx, where, clean=None, cache=None):
        masked = (idx == 3).float().mean(1, keepdim=True)  # (B, 1)
        right = (1 - masked * 2 / 3)[..., None].expand(*idx.shape, 1)
        wrong = (1 - right) / 2
        return torch.cat((right, wrong, wrong, torch.zeros_like(right)), -1).log()[where]


def dial(K, T=8, **shape):
    return tiny_model(V=5, T=T, block=K, **shape)


def texts(B=3, T=8, seed=0):
    """Clean and corrupted tokens, and the holes, (B, T) each."""
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.randint(0, 5, (B, T), generator=generator)
    holes = torch.rand(B, T, generator=generator) < 0.5
    return x0, x0.masked_fill(holes, MASK), holes
