"""In how many passes does SmolLM2 write its own text, when it has learned to draft and is otherwise as it was?

python data/weights/prepare.py smollm2-135m-instruct
python data/fairytales/prepare.py --name fairytales-smollm2 --tokenizer data/weights/smollm2-135m-instruct.pt
python tests/experiments/real_drafts.py --minutes 60    # for each of two runs
"""

import time
from contextlib import ExitStack
from unittest import mock

import torch
from common import context_of, main, train_model, windows
from draft import overlap
from drafter import NoLook, train_here

from data.lib.machine import autocast, device_of
from model import load_checkpoint
from sample import denoise

HOW = "--attention draft:8 --freeze --lr 0.002 --batch_size 4 --evals 2 --eval_tokens 4096"
LENGTHS = 0, 2, 3, 4, 8  # drafts in a pass; 0: append


def continue_texts(model, prompts, n, K, temperature, precision):
    """Continue prompts (N, T), one at a time, by n tokens. Texts (N, T + n), tokens per pass, and seconds."""
    texts, passes, seconds = [], 0, 0.0
    how = {"order": "draft" if K else "left", "temperature": temperature, "draft_len": K or None}
    for row in prompts:
        canvas = torch.cat((row, row.new_full((n,), model.config.mask_id)))[None].to(device_of(model))
        start = time.perf_counter()
        with autocast(device_of(model), precision):
            for canvas in denoise(model, canvas, **how):
                passes += 1
        seconds += time.perf_counter() - start
        texts.append(canvas.cpu())
    return torch.cat(texts), len(prompts) * n / passes, seconds


def real_drafts(config, device):
    gpt, corpus, T, n = config.gpt, "fairytales-smollm2", context_of(config), context_of(config) // 4
    if config.quick:
        gpt, corpus = train_model(config, "out-gpt", "--attention causal"), "shakespeare"
    prompts = windows(corpus, n, config.texts * n)
    print("| drafter | temperature | drafts | tokens per pass | times as fast: float32 | bfloat16 | same texts |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, replaced in (("looks at four tokens", {}), ("looks at none", {"model.Drafter": NoLook})):
        with ExitStack() as stack:
            for target, part in replaced.items():
                stack.enter_context(mock.patch(target, part))
            flags = f"{HOW} --data {corpus} --init_from {gpt} --max_minutes {config.minutes}"
            path = train_model(config, f"out-real-drafts-{name.split()[-1]}", flags, train_here)
            model, _, _ = load_checkpoint(path, device)
        shared = overlap(model, windows(corpus, T, 8 * T).to(device)).tolist()
        print(f"| {name} | shares with the GPT: {', '.join(f'{x:.3f}' for x in shared)} | | | | | |")
        for temperature in (0.0, 1.0):
            rows = {K: [] for K in LENGTHS}
            for precision in ("float32", "bfloat16"):
                for K in LENGTHS:
                    texts, per_pass, seconds = continue_texts(model, prompts, n, K, temperature, precision)
                    rows[K].append((texts, per_pass, seconds))
            for K, measured in rows.items():
                factors = [before[2] / seconds for before, (_, _, seconds) in zip(rows[0], measured)]
                same = measured[0][0].eq(rows[0][0][0]).all(1).sum().item()
                speed = " | ".join(f"{x:.2f}" for x in (measured[0][1], *factors))
                print(f"| {name} | {temperature:g} | {K} | {speed} | {same} of {len(prompts)} |", flush=True)


if __name__ == "__main__":
    main(real_drafts, minutes=60, texts=8, gpt="data/weights/smollm2-135m-instruct.pt")
