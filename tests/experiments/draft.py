"""How much faster is drafting than appending? It writes the same text, so this is the factor at equal quality.

python tests/experiments/draft.py     # 15 minutes of two cores for the models, and ten to measure
"""

import time

import torch
from common import BYTES, bound, context_of, main, plot, train_model, windows

from data.lib.machine import autocast, device_of
from model import load_checkpoint
from sample import denoise

LENGTHS = {1: (2, 3, 4, 5, 6, 8, 12, 16), 8: (1, 2, 3, 4), 32: (1, 2, 3)}  # by how many texts are written at once


def write(model, T, n_texts, n, temperature, K, precision):
    """Write texts of T tokens, n at once: (n_texts, T), passes for each (n_texts,), and seconds."""
    texts, passes, seconds, mask_id = [], [], 0.0, model.config.mask_id
    for seeds in torch.arange(n_texts).split(n):
        drafts, canvas = torch.zeros(n, T, dtype=torch.bool), torch.full((n, T), mask_id, device=device_of(model))
        how = {"order": "draft" if K else "left", "temperature": temperature, "draft_len": K or None}
        start, n_certain = time.perf_counter(), []
        with autocast(device_of(model), precision):
            for canvas in denoise(model, canvas, seeds=seeds.tolist(), drafts=drafts, **how):
                n_certain.append(((canvas.cpu() != mask_id) & ~drafts).sum(1))
        seconds += time.perf_counter() - start
        texts.append(canvas.cpu())
        passes.append(1 + (torch.stack(n_certain).diff(dim=0) > 0).sum(0))  # a finished row waits for the others
    return torch.cat(texts), torch.cat(passes), seconds


def measure(model, T, n, temperature, lengths, precision, repeats):
    """For each length: texts, tokens per pass, and seconds at the best of several attempts, which take turns."""
    runs = [[write(model, T, max(n, 8), n, temperature, K, precision) for K in lengths] for _ in range(repeats)]
    return [
        (texts, T * len(texts) / passes.sum().item(), min(attempt[i][2] for attempt in runs))
        for i, (texts, passes, _) in enumerate(runs[0])
    ]


@torch.no_grad()
def overlap(model, x0):
    """How much of its probability each of K drafts shares with the GPT's, on average over texts (N, T): (K,).

    It is 1 - TV(p, q), with which rejection sampling would accept a draft (2211.17192); the same noise does less often.
    """
    K, T, rows = model.config.draft_len, x0.shape[1], []
    where = torch.ones_like(x0, dtype=torch.bool).nonzero(as_tuple=True)
    for first in range(K):
        p, q = (logits.softmax(-1) for logits in model(x0, where=where, clean=x0, drafts_from=first))
        shared = torch.minimum(p, q).sum(-1).view(x0.shape)
        rows.append(shared[:, first : first + (T - first) // K * K].unflatten(1, (-1, K)).flatten(0, 1))
    return torch.cat(rows).mean(0)


def draft(config, device):
    *panels, save = plot("draft", 2)
    T, repeats = context_of(config), 1 if config.quick else 2
    model, _, checkpoint = load_checkpoint(train_model(config, "out-draft", "--attention draft:4"), device)
    steps = checkpoint["step"]
    path = train_model(config, "out-append", f"--attention causal --max_iters {steps}")
    gpt, _, _ = load_checkpoint(path, device)
    append, alone = (bound(x, windows(BYTES, T)) for x in (model, gpt))
    print(f"after {steps:,} steps: append half {append:.3f} nats per byte, a GPT {alone:.3f}")
    shared = overlap(model, windows(BYTES, T, 24 * T).to(device)).tolist()
    print(f"probability that each draft shares with the GPT: {', '.join(f'{x:.3f}' for x in shared)}")
    flags = f"--init_from {path} --attention draft:4 --freeze --max_iters 500 --evals 1"
    frozen, _, _ = load_checkpoint(train_model(config, "out-frozen", flags), device)
    slow, fast = (measure(frozen, T, 1, x, (4,), "float32", 1)[0][1] for x in (1.0, 0.7))
    print(f"a frozen GPT with 4 drafts: {slow:.2f} tokens per pass at temperature 1, {fast:.2f} at 0.7\n")
    print("| temperature | texts at once | drafts | tokens per pass | times as fast: float32 | bfloat16 | same texts |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for temperature in (1.0, 0.7):
        for n, lengths in LENGTHS.items():
            rows = {K: [] for K in lengths}
            for precision in ("float32", "bfloat16"):
                (base, _, seconds), *drafted = measure(model, T, n, temperature, (0, *lengths), precision, repeats)
                for K, (texts, per_pass, fast) in zip(lengths, drafted):
                    rows[K].append((per_pass, seconds / fast, texts.eq(base).all(1).sum().item()))
            for K, (full, half) in rows.items():
                same = f"{full[2]} and {half[2]} of {len(base)}"
                print(f"| {temperature} | {n} | {K} | {full[0]:.2f} | {full[1]:.2f} | {half[1]:.2f} | {same} |")
            per_pass, factor, _ = zip(*(row[0] for row in rows.values()))
            name = f"temperature {temperature:g}, {n} at once"
            panels[1].plot(lengths, factor, marker="o", label=name)
            if n == 1:
                panels[0].plot(lengths, per_pass, marker="o", label=f"temperature {temperature:g}")
    for panel, title in zip(panels, ("tokens per pass", "times as fast as append, float32")):
        panel.set(title=title, xlabel="tokens drafted in each pass")
        panel.set_ylim(bottom=0)
        panel.axhline(1, color="gray", linestyle=":")
        panel.legend(fontsize="small")
    save()


if __name__ == "__main__":
    main(draft)
