"""How much faster is drafting than appending? It writes the same text, so this is the factor at equal quality.

OMP_NUM_THREADS=1 python tests/experiments/draft.py     # half an hour of one core for the models, and ten minutes
"""

import time

import torch
from common import bound, main, plot, train_model, windows

from data.lib.machine import autocast, device_of
from model import load_checkpoint
from sample import denoise

LENGTHS, BATCHES = (1, 2, 3, 4, 6, 8, 12, 16), (1, 8, 32)


def speed(model, n, temperature, draft_len, precision, repeats=3):
    """Texts (n, T), tokens per forward pass and row, and tokens per second at the best of several attempts."""
    canvas, best = torch.full((n, model.config.context), model.config.mask_id), 0.0
    order = "draft" if draft_len else "left"
    for _ in range(repeats):
        start, passes = time.perf_counter(), 0
        with autocast(device_of(model), precision):
            for texts in denoise(model, canvas, None, order, temperature, draft_len=draft_len):
                passes += 1
        best = max(best, canvas.numel() / (time.perf_counter() - start))
    return texts, canvas.shape[1] / passes, best


def draft(config, device):
    *panels, save = plot("draft", 2)
    flags = "--attention draft:8 --max_iters 1900"  # what ten minutes of two cores read
    model, _, _ = load_checkpoint(train_model(config, "out-draft", flags), device)
    gpt, _, _ = load_checkpoint(train_model(config, "out-append", "--attention causal --max_iters 1900"), device)
    tokens = windows("python", model.config.context)
    print(f"append half {bound(model, tokens):.3f} nats per byte; a GPT after as many steps {bound(gpt, tokens):.3f}")
    lengths, batches = (LENGTHS[:2], (1, 2)) if config.quick else (LENGTHS, BATCHES)
    for temperature in (1.0, 0.7):
        for n in batches:
            base, _, append = speed(model, n, temperature, None, "float32")
            rows = []
            for K in lengths:
                texts, per_pass, per_second = speed(model, n, temperature, K, "float32")
                same = sum(a.equal(b) for a, b in zip(texts, base))
                rows.append((K, per_pass, per_second / append))
                print(f"| {temperature} | {n} | {K} | {per_pass:.2f} | {per_second / append:.2f} | {same} of {n} |")
            K, per_pass, factor = zip(*rows)
            panels[0].plot(K, per_pass, marker="o", label=f"temperature {temperature}, {n} at once")
            panels[1].plot(K, factor, marker="o", label=f"temperature {temperature}, {n} at once")
    for panel, title in zip(panels, ("tokens per pass (of the slowest text)", "times as fast as append")):
        panel.set(title=title, xlabel="tokens drafted in each pass")
        panel.set_ylim(bottom=0)
        panel.axhline(1, color="gray", linestyle=":")
    panels[0].legend(fontsize="small")
    save()


if __name__ == "__main__":
    main(draft)
