"""Is any way to set tokens faster than append at the same quality? Writes with the models of dial.py in many ways.

python tests/experiments/speed.py     # 20 minutes on two cores, after dial.py and 15 minutes for a judge
"""

import time
from collections import namedtuple

from common import BYTES, OWN_PACE, bound, context_of, main, pair_entropy, plot, windows, write
from dial import attentions, trained_model

from model import load_checkpoint
from sample import ORDERS

POORER = 1.0  # a text may have this many bits per pair of bytes less than the corpus, and is still drawn
# speeds: in tokens per second, for one text and for several at once; nats: per byte; bits: per pair of bytes
Point = namedtuple("Point", "attention curve way passes speeds nats bits")


def ways_to_write(attention, T):
    """The ways to write with a model: (curve, name of the point, flags of denoise)."""
    if attention == "causal":  # lower temperatures make likelier and poorer text
        return [("", f"temperature {x}", {"temperature": x}) for x in (0.6, 0.7, 0.8, 0.9, 1.0, 1.1, 1.2)]
    n_blocks = T // int(attention.partition(":")[2] or T)
    ways = [("threshold", f"tau {x}", {"order": "threshold", "tau": x}) for x in (0.4, 0.6, 0.8, 0.9)]
    ways += [("entropy-bound", f"gamma {x}", {"order": "entropy-bound", "gamma": x}) for x in (0.1, 1.0, 10.0)]
    orders = [(name, {"order": name}) for name in (*ORDERS, "remask") if name not in OWN_PACE]
    for name, flags in [("random, temperature 0.8", {"temperature": 0.8}), *orders]:
        ways += [(name, f"{n} steps", {**flags, "steps": n}) for n in (8, 16, 32, 64, 128) if n_blocks <= n <= T]
    return ways


def speed(config, device):
    # A judge says how likely a text is: a causal model of another seed, trained for longer.
    judge, _, _ = load_checkpoint(trained_model(config, BYTES, "causal", 9, 15), device)
    T, sizes, points = context_of(config), (1, config.texts), []
    real = windows(BYTES, T, config.texts * T)
    real = bound(judge, real), pair_entropy(real)
    print(f"| attention | way | passes | nats per byte | bits per pair | tokens/s at batch 1 | at {config.texts} |")
    print("| text of the corpus | | | {:.3f} | {:.2f} | | |".format(*real))
    for attention in attentions(config):
        model, _, _ = load_checkpoint(trained_model(config, BYTES, attention), device)
        for curve, way, flags in ways_to_write(attention, T):
            speeds = []
            for n in sizes:
                seconds = []
                for _ in range(3 if n == 1 and not config.quick else 1):
                    start = time.perf_counter()
                    texts, passes = write(model, n, T, **flags)
                    seconds.append(time.perf_counter() - start)
                speeds.append(n * T / min(seconds))
            points.append(Point(attention, curve, way, passes, speeds, bound(judge, texts), pair_entropy(texts)))
            row = "{3} | {5:.3f} | {6:.2f} | {4[0]:,.0f} | {4[1]:,.0f}".format(*points[-1])
            print(f"| {attention} | {curve} {way} | {row} |", flush=True)
    draw_speed(points, real, sizes)


def draw_speed(points, real, sizes):
    """Draw nats per byte against speed, for one text and for several at once.

    A way whose text is too poor in pairs of bytes is left out, because it is likely for that reason alone.
    """
    *panels, save = plot("speed", len(sizes))
    rich = [p for p in points if p.bits > real[1] - POORER]
    for i, (panel, n) in enumerate(zip(panels, sizes)):
        for number, attention in enumerate(dict.fromkeys(p.attention for p in points)):
            chosen = sorted((p.speeds[i], p.nats) for p in rich if p.attention == attention)
            best = [(x, y) for j, (x, y) in enumerate(chosen) if y < min((z for _, z in chosen[j + 1 :]), default=99)]
            panel.plot(*zip(*chosen), "o", color=f"C{number}", markersize=4, alpha=0.4)
            name = "append" if attention == "causal" else attention
            panel.plot(*zip(*best), "o-", color=f"C{number}", markersize=6, label=name)
        panel.axhline(real[0], color="gray", linestyle=":", label="text of the corpus")
        panel.set(title=f"{n} at once" if n > 1 else "one text", xlabel="tokens per second", xscale="log")
    panels[0].set(ylabel="nats per byte under the judge")
    panels[0].figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    save()


if __name__ == "__main__":
    main(speed, texts=32)
