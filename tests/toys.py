"""Tiny models whose every probability can be written down."""

from itertools import product
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

import data.lib.corpus
from data.lib.tokenizer import ByteTokenizer
from data.text.prepare import prepare
from model import Transformer


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
        self.config = SimpleNamespace(vocab_size=self.V + 1, mask_id=self.V, context=self.T, special_ids=(), block=None)
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
