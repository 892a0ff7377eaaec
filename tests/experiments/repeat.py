"""Who learns more from little text that is read many times, append or set? Trains both on 100,000 bytes.

python tests/experiments/repeat.py     # an hour on two cores
"""

from common import evaluations, main, plot, train_model

import data.lib.corpus
from data.lib.corpus import SPLITS, load_corpus, write_corpus

LITTLE = 100_000  # bytes of text to train on
KINDS = {"append": "--attention causal --epochs 60", "set": "--epochs 120"}
# Each kind has the best of these settings. The first one is the project's default.
TUNED = [f"--weight_decay {decay} --dropout {rate}" for decay in (0.1, 1.0) for rate in (0.0, 0.2)]


def little_corpus():
    """The name of a corpus with the first bytes of tiny Shakespeare to train on, and its validation split."""
    name = f"shakespeare-{LITTLE}"
    if not (data.lib.corpus.DATA / name / "meta.json").exists():
        *splits, tokenizer, _ = load_corpus("shakespeare")
        texts = (tokenizer.decode(split[:n].tolist()) for split, n in zip(splits, (LITTLE, None)))
        write_corpus(name, zip(SPLITS, texts), tokenizer, "the first bytes of data/shakespeare")
    return name


def repeat(config, device):
    panel, save = plot("repeat")
    shape = f"--data {little_corpus()} --batch_size 32 --prompt_len 0 --evals 40"
    print("| run | best, nats per byte | at epoch | at the end |")
    curves = {kind: [] for kind in KINDS}
    for colour, (kind, flags) in zip(("C0", "C1"), KINDS.items()):
        for number, (tuned, style) in enumerate(zip(TUNED, ("-", "--", "-.", ":"))):
            path = train_model(config, f"out-repeat/{kind}-{number}", f"{shape} {flags} {tuned}")
            steps, nats = evaluations(path, "step")
            epochs, lowest = steps * 32 * 256 / LITTLE, nats.argmin()
            curves[kind].append((epochs, nats))
            row = f"{nats[lowest]:.3f} | {epochs[lowest]:.0f} | {nats[-1]:.3f}"
            print(f"| {kind}, `{tuned}` | {row} |", flush=True)
            panel.plot(epochs, nats, color=colour, linestyle=style, linewidth=1, label=f"{kind}, {tuned}")
            panel.plot(epochs[lowest], nats[lowest], color=colour, marker="o", markersize=4)
    untuned, best = curves["append"][0][1].min(), min(nats.min() for _, nats in curves["append"])
    epochs, nats = min(curves["set"], key=lambda curve: curve[1].min())
    for name, mark in {"append untuned": untuned, "append at its best": best}.items():
        crossing = epochs[nats < mark][:1]
        print(f"set passes {name}, {mark:.3f}, at epoch", *crossing.round())
        panel.axhline(mark, color="gray", linewidth=0.5)
        for epoch in crossing:
            panel.axvline(epoch, color="gray", linestyle=":")
    panel.set(xscale="log", xlabel=f"epochs over {LITTLE:,} bytes", ylabel="nats per byte", ylim=(None, 3.5))
    panel.legend(fontsize="x-small")
    save()


if __name__ == "__main__":
    main(repeat)
