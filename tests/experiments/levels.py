"""Which noise levels should a network train on? Compares BERT's fixed 15% with three ways to draw the level.

python tests/experiments/levels.py --seeds 3     # 17 minutes on two cores
"""

import numpy as np
import torch
from common import bound, context_of, main, plot, train_model, windows, write

from data.lib.machine import autocast
from model import load_checkpoint
from train import loss_of

METHODS = {
    "0.15 (BERT)": "--level 0.15 --weight mean",
    "grid:10, one for a batch": "--level grid:10 --one_level --weight mean",
    "uniform, mean": "--level uniform --weight mean",
    "uniform, elbo": "--level uniform --weight elbo",
}
LEVELS = [round(0.05 * i, 2) for i in range(1, 21)]
PRINTED = (0.15, 0.4, 0.6, 0.8, 1.0)


@torch.no_grad()
def loss_at(model, x0, t, device):
    """Mean loss of a hole of texts x0 (N, T) at noise level t, in nats."""
    holes = (torch.rand(x0.shape, generator=torch.Generator().manual_seed(0)) < t).to(device)
    x0 = x0.to(device)
    with autocast(device):
        return loss_of(model, x0, x0.masked_fill(holes, model.config.mask_id), holes, holes / holes.sum()).sum().item()


def levels(config, device):
    panel, save = plot("levels")
    print("| method | seed | NELBO |", " | ".join(f"t = {t}" for t in PRINTED), "|")
    T = context_of(config)
    tokens = windows("shakespeare", T)
    for number, (name, flags) in enumerate(METHODS.items()):
        losses = []
        for seed in range(config.seeds):
            shape = f"--data shakespeare --max_iters 250 --n_embd 128 --batch_size 16 --evals 1 --seed {seed}"
            path = train_model(config, f"out-levels/{number}-{seed}", f"{shape} {flags}")
            model, tokenizer, _ = load_checkpoint(path, device)
            losses.append([loss_at(model, tokens[::4], t, device) for t in LEVELS])  # a quarter, for each of 20 levels
            nats = " | ".join(f"{losses[-1][LEVELS.index(t)]:.3f}" for t in PRINTED)
            print(f"| {name} | {seed} | {bound(model, tokens, draws=2):.3f} | {nats} |", flush=True)
            if seed == 0:
                text, _ = write(model, 1, T, 128, temperature=0.7)
                print(tokenizer.decode(text[0].tolist()), flush=True)
        losses = np.array(losses)
        panel.plot(LEVELS, losses.mean(0), label=name)
        panel.fill_between(LEVELS, losses.min(0), losses.max(0), alpha=0.2)
    panel.axvline(0.15, color="gray", linestyle=":")
    panel.set(xlabel="noise level t, the fraction of holes", ylabel="validation loss, nats per hole")
    panel.legend()
    save()


if __name__ == "__main__":
    main(levels, seeds=1)
