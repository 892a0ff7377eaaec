"""What is each part of the default training run worth? Trains the default, and the default without each part.

OMP_NUM_THREADS=1 python tests/experiments/recipe.py --seeds 3     # two and a quarter hours of one core
"""

import itertools

import numpy as np
from common import bound, context_of, main, plot, train_model, windows

from model import load_checkpoint

RUNS = {
    "the default": "",
    "no convolution": "--conv 0",
    "no Muon": "--optimizer adamw --lr 0.003",
    "a bell that does not widen": "--widen 0",
    "uniform levels": "--level uniform",
    "width 128": "--n_embd 128",
    "width 192": "--n_embd 192",
    "append, for scale": "--attention causal",
}


def recipe(config, device):
    panel, save = plot("recipe")
    tokens, bounds = windows("shakespeare", context_of(config)), np.zeros((len(RUNS), config.seeds))
    print("| run | seed | steps | nats per byte |")
    for seed, (number, flags) in itertools.product(range(config.seeds), enumerate(RUNS.values())):
        shape = f"--data shakespeare --max_minutes 5 --evals 1 --prompt_len 0 --seed {seed}"
        path = train_model(config, f"out-recipe/{number}-{seed}", f"{shape} {flags}")
        model, _, checkpoint = load_checkpoint(path, device)
        nats = bounds[number, seed] = bound(model, tokens, draws=2)
        print(f"| {list(RUNS)[number]} | {seed} | {checkpoint['step']:,} | {nats:.3f} |", flush=True)
    low, mean, high = bounds.min(1), bounds.mean(1), bounds.max(1)
    panel.errorbar(mean, list(RUNS), xerr=(mean - low, high - mean), fmt="o", markersize=4, capsize=4)
    panel.axvline(mean[0], color="gray", linewidth=0.5)
    panel.invert_yaxis()
    panel.set(xlabel="nats per byte, five minutes of one core")
    save()


if __name__ == "__main__":
    main(recipe, seeds=1)
