"""What is the bound at each point from append to set? Trains one network with blocks of 1, 4, 16, 64 and all tokens.

python tests/experiments/dial.py --seeds 3     # two and a half hours on two cores
"""

import numpy as np
from common import BYTES, EARLIER, bound, context_of, evaluations, main, plot, train_model, windows

from data.lib.machine import autocast
from data.lib.prompt import MOST
from model import load_checkpoint
from sample import log_likelihood

MINUTES = {"shakespeare": 5, BYTES: 10}


def attentions(config):
    """The points of the dial. Blocks of 64 don't fit the context of --quick."""
    return ["causal", "block:4", "block:16", *([] if config.quick else ["block:64"]), "canvas"]


def trained_model(config, corpus, attention, seed=0, minutes=None):
    """The path of a model, trained for as many minutes as the others on its corpus."""
    flags = f"{EARLIER} --data {corpus} --attention {attention} --seed {seed} --prompt_len 0"
    flags += f" --max_minutes {minutes or MINUTES[corpus]} --evals 4 --eval_tokens 16384"
    return train_model(config, f"out-dial/{corpus}-{attention.replace(':', '-')}-{seed}", flags)


def dial(config, device):
    # "exact" is the likelihood if the most confident hole of a block is set first, one per step.
    after_minutes, *curves, save = plot("dial", 1 + len(MINUTES))
    print("| corpus | attention | seed | tokens | NELBO | after as many tokens | of some | exact |")
    T, names = context_of(config), attentions(config)
    for corpus, curve in zip(MINUTES, curves):
        tokens, some = windows(corpus, T), windows(corpus, T, T * config.texts)
        seeds = range(config.seeds if corpus == "shakespeare" else 1)
        paths = {name: [trained_model(config, corpus, name, seed) for seed in seeds] for name in names}
        fewest = min(evaluations(path, "step")[0][-1] for name in names for path in paths[name])
        bounds = np.zeros((len(names), len(seeds)))
        for i, name in enumerate(names):
            for seed, path in zip(seeds, paths[name]):
                model, _, _ = load_checkpoint(path, device)
                steps, nats = evaluations(path, "step")
                bounds[i, seed] = bound(model, tokens, draws=1 if name == "causal" else 2)
                seen = steps * 16 * 256 / 1e6  # million tokens
                row = f"{seen[-1]:.2f} M | {bounds[i, seed]:.3f} | {np.interp(fewest, steps, nats):.3f}"
                if seed == 0:
                    with autocast(device):
                        exact = -log_likelihood(model, some.flatten(), MOST, order="confidence") / some.numel()
                    row += f" | {bound(model, some, draws=1 if name == 'causal' else 16):.3f} | {exact:.3f}"
                print(f"| {corpus} | {name} | {seed} | {row} |", flush=True)
                curve.plot(seen, nats, color=f"C{i + 1}", marker=".", label="" if seed else name)
        after_minutes.plot(names, bounds.mean(1), marker="o", label=f"{corpus}, {MINUTES[corpus]} minutes")
        after_minutes.fill_between(names, bounds.min(1), bounds.max(1), alpha=0.2)
        curve.set(title=corpus, xlabel="million tokens seen", ylabel="validation bound, nats per token")
        curve.legend()
    after_minutes.set(title="after the same time", ylabel="validation bound, nats per token")
    after_minutes.legend()
    save()


if __name__ == "__main__":
    main(dial, seeds=1, texts=32)
