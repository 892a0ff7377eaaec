"""What is each part of the drafter worth, and the number of drafts in training? Each variant learns for a few minutes.

OMP_NUM_THREADS=1 python tests/experiments/drafter.py --steps 500    # an hour of one core
"""

import sys
from contextlib import ExitStack, redirect_stdout
from unittest import mock

import torch
import torch.nn as nn
import torch.nn.functional as F
from common import bound, context_of, main, train_model, windows
from draft import overlap, write

import model as network
import train
from data.lib import train_settings

LENGTHS = 2, 4, 8, 16  # drafts in a pass when writing


class NoLook(network.Drafter):
    """A drafter that doesn't know the tokens before a draft."""

    def __init__(self, config):
        super().__init__(config)
        self.before = Nothing(self.LOOK * config.n_embd, 4 * config.n_embd, bias=False)
        nn.init.zeros_(self.before.weight)


class Nothing(nn.Linear):
    def forward(self, x):
        return 0 * super().forward(x)  # so its weights have gradients, and stay 0


class LookAtOne(network.Drafter):
    LOOK = 1


class Narrow(network.Drafter):
    """A drafter whose hidden layer is as wide as the network."""

    def __init__(self, config):
        super().__init__(config)
        C = config.n_embd
        self.mix, self.before = nn.Linear(C, C, bias=False), nn.Linear(self.LOOK * C, C, bias=False)
        self.out = nn.Linear(C, C, bias=False)
        nn.init.zeros_(self.out.weight)


def fields_with_adapters(*args, fields=train_settings.attention_fields):
    return {**fields(*args), "draft_rank": 20}


def loss_towards_the_gpt(model, x0, xt, holes, weights, K, first):
    """`train.loss_with_drafts`, but a draft learns the GPT's distribution instead of the true token."""
    T = x0.shape[1]
    n_drafted = (T - first) // K * K
    is_drafted = (holes[1] >= first) & (holes[1] < first + n_drafted)  # (N,)
    allowed = torch.arange(model.config.vocab_size) != model.config.mask_id
    append, draft = (x[:, allowed] for x in model(xt, where=holes, clean=x0, drafts_from=first))
    nats = F.cross_entropy(append, x0[holes], reduction="none")
    target = append.detach().float().softmax(-1)
    loss = torch.zeros_like(weights)  # (B, T)
    more = F.cross_entropy(draft.float(), target, reduction="none") * is_drafted * (T / n_drafted)
    loss[holes] = weights[holes] * (nats + more) / 2
    return loss.sum(1)


VARIANTS = {  # name: K in training, and what is replaced
    "the default, K = 4 in training": (4, {}),
    "K = 2": (2, {}),
    "K = 8": (8, {}),
    "K = 16": (16, {}),
    "no look at the tokens before": (4, {"model.Drafter": NoLook}),
    "a look at one token": (4, {"model.Drafter": LookAtOne}),
    "a hidden layer as wide as the network": (4, {"model.Drafter": Narrow}),
    "adapters for the masks": (4, {"data.lib.train_settings.attention_fields": fields_with_adapters}),
    "trained towards the GPT's distribution": (4, {"train.loss_with_drafts": loss_towards_the_gpt}),
}


def train_here(config, script, flags):
    """Train in this process, where parts may be replaced."""
    with mock.patch("sys.argv", [script, *flags.split()]), redirect_stdout(sys.stderr):
        train.main()


def measure(config, device, number, K):
    """Train a variant. The probability that each draft shares with the GPT, tokens per pass, and nats per byte."""
    T, flags = context_of(config), f"--attention draft:{K} --max_iters {config.steps} --evals 1"
    checkpoint = train_model(config, f"out-drafter-{number}", flags, train_here)
    model, _, _ = network.load_checkpoint(checkpoint, device)
    shared = overlap(model, windows("python", T, 24 * T).to(device)).tolist()
    texts = 2 if config.quick else 32
    passes = [write(model, T, texts, texts, 1.0, n, "float32")[1] for n in LENGTHS]
    return shared, [T / counts.float().mean().item() for counts in passes], bound(model, windows("python", T, 2**17))


def drafter(config, device):
    asked = " | ".join(f"{n} drafts" for n in LENGTHS)
    print(f"| variant | probability that drafts 1, 2, 4, 8, 16 share with the GPT | {asked} | nats per byte |")
    print("| --- " * (3 + len(LENGTHS)) + "|")
    for number, (name, (K, replaced)) in enumerate(VARIANTS.items()):
        with ExitStack() as stack:
            for target, part in replaced.items():
                stack.enter_context(mock.patch(target, part))
            shared, per_pass, append = measure(config, device, number, K)
        shown = ", ".join(f"{shared[i - 1]:.3f}" for i in (1, 2, 4, 8, 16) if i <= K)
        print(f"| {name} | {shown} | {' | '.join(f'{x:.2f}' for x in per_pass)} | {append:.3f} |", flush=True)


if __name__ == "__main__":
    main(drafter, steps=500)
