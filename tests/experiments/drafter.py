"""What is each part of the drafter worth, and how many drafts should a model train with? Trains a model per variant.

OMP_NUM_THREADS=1 python tests/experiments/drafter.py    # 45 minutes of one core
"""

import sys
from contextlib import redirect_stdout
from unittest import mock

import torch.nn as nn
from common import BYTES, bound, context_of, main, train_model, windows
from draft import overlap, write

import model as network
import train
from data.lib import train_settings
from train import loss_of, loss_with_drafts

LENGTHS = 2, 4, 8, 16  # drafts in a pass when writing


class NoLook(network.Drafter):
    """A drafter that doesn't know the tokens before a draft."""

    def __init__(self, config):
        super().__init__(config)
        nn.init.zeros_(self.before.weight)

    def forward(self, x, before):
        return super().forward(x, 0 * before)  # the gradient is 0, so the weights stay 0


class LookAtOne(network.Drafter):
    LOOK = 1


class Narrow(network.Drafter):
    """A drafter whose hidden layer is as wide as the network."""

    def __init__(self, config):
        super().__init__(config)
        C = config.n_embd
        self.mix = nn.Sequential(nn.LayerNorm(C, bias=False), nn.Linear(C, C, bias=False))
        self.before, self.out = nn.Linear(self.LOOK * C, C, bias=False), nn.Linear(C, C, bias=False)
        nn.init.zeros_(self.out.weight)


def fields_with_adapters(*args, fields=train_settings.attention_fields):
    return {**fields(*args), "draft_rank": 20}


def loss_towards_the_gpt(model, x0, xt, holes, weights, K, first, frozen):
    """The loss of a frozen GPT's drafts, which learn its distribution, but the GPT learns as well."""
    append = loss_of(model, x0, xt, holes, weights)
    drafts = loss_with_drafts(model, x0, xt, holes, weights, K, first, frozen=True)  # append's value, no gradient
    return drafts + (append - append.detach()) / 2


VARIANTS = {  # K in training, what is replaced, and by what
    "the default, K = 4 in training": (4, "model.Drafter", network.Drafter),
    "K = 2": (2, "model.Drafter", network.Drafter),
    "K = 8": (8, "model.Drafter", network.Drafter),
    "K = 16": (16, "model.Drafter", network.Drafter),
    "no look at the tokens before": (4, "model.Drafter", NoLook),
    "a look at one token": (4, "model.Drafter", LookAtOne),
    "a hidden layer as wide as the network": (4, "model.Drafter", Narrow),
    "adapters for the masks": (4, "data.lib.train_settings.attention_fields", fields_with_adapters),
    "trained towards the GPT's distribution": (4, "train.loss_with_drafts", loss_towards_the_gpt),
}


def train_here(config, script, flags):
    """Run train.py in this process, where parts may be replaced."""
    with mock.patch("sys.argv", [script, *flags.split()]), redirect_stdout(sys.stderr):
        train.main()


def measure(config, device, number, K):
    """Train a variant. Return the overlap of each draft with the GPT, tokens per pass, and nats per byte."""
    T, flags = context_of(config), f"--attention draft:{K} --max_iters {config.steps} --evals 1"
    checkpoint = train_model(config, f"out-drafter-{config.steps}-{number}", flags, train_here)
    model, _, _ = network.load_checkpoint(checkpoint, device)
    shared = overlap(model, windows(BYTES, T, 24 * T).to(device)).tolist()
    texts = 2 if config.quick else 32
    passes = [write(model, T, texts, texts, 1.0, n, "float32")[1] for n in LENGTHS]
    return shared, [T / counts.float().mean().item() for counts in passes], bound(model, windows(BYTES, T, 2**17))


def drafter(config, device):
    asked = " | ".join(f"{n} drafts" for n in LENGTHS)
    print(f"| variant | probability that drafts 1, 2, 4, 8, 16 share with the GPT | {asked} | nats per byte |")
    print("| --- " * (3 + len(LENGTHS)) + "|")
    for number, (name, (K, target, part)) in enumerate(VARIANTS.items()):
        with mock.patch(target, part):
            shared, per_pass, append = measure(config, device, number, K)
        shown = ", ".join(f"{shared[i - 1]:.3f}" for i in (1, 2, 4, 8, 16) if i <= K)
        print(f"| {name} | {shown} | {' | '.join(f'{x:.2f}' for x in per_pass)} | {append:.3f} |", flush=True)


if __name__ == "__main__":
    main(drafter, steps=300)
