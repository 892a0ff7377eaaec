"""Which order writes the best text in how many forward passes? Compares all orders of sample.py.

python tests/experiments/orders.py     # an hour on two cores
"""

from common import BYTES, EARLIER, OWN_PACE, bound, log_ticks, main, pair_entropy, plot, train_model, windows, write

from model import load_checkpoint
from sample import ORDERS

STEPS = (8, 16, 32, 64, 128, 256)
TITLES = "NELBO under the judge, nats per byte", "entropy of pairs of bytes, bits"


def orders(config, device):
    *panels, save = plot("orders", 2)
    model, _, _ = load_checkpoint(train_model(config, "out-earlier", EARLIER), device)
    judge, _, _ = load_checkpoint(train_model(config, "out-judge", f"{EARLIER} --max_minutes 15 --seed 1"), device)
    T = model.config.context

    def quality(texts):
        """Two numbers, because a text that repeats itself looks likely to any judge (2604.02718)."""
        return bound(judge, texts, draws=16), pair_entropy(texts)

    real = quality(windows(BYTES, T, config.texts * T))
    print("| text of the corpus | | {:.3f} | {:.2f} |".format(*real))
    for marker, order in zip("osD^vPX*", (*ORDERS, "remask")):
        points = []
        flag_name, choices = OWN_PACE.get(order, ("steps", STEPS))
        for choice in choices:
            texts, passes = write(model, config.texts, T, order=order, **{flag_name: choice})
            points.append((passes, *quality(texts)))
            print(f"| {order} {flag_name} {choice} |", "{} | {:.3f} | {:.2f} |".format(*points[-1]), flush=True)
        passes, *values = zip(*sorted(points))
        for panel, value in zip(panels, values):
            panel.plot(passes, value, marker=marker, markersize=5, label=order)
    for panel, title, value in zip(panels, TITLES, real):
        panel.axhline(value, color="gray", linestyle=":", label="text of the corpus")
        panel.set_title(title)
        log_ticks(panel, STEPS, "forward passes")
    panels[0].legend(fontsize="small")
    save()


if __name__ == "__main__":
    main(orders, texts=32)
