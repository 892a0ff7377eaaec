"""How many passes does SmolLM2 need to write its own text, once it has learned to draft and is otherwise frozen?

python data/weights/prepare.py smollm2-135m-instruct
python data/fairytales/prepare.py --name fairytales-smollm2 --tokenizer data/weights/smollm2-135m-instruct.pt
python tests/experiments/real_drafts.py --minutes 40    # minutes per run; there are two
"""

import itertools
import time
from unittest import mock

import torch
from common import context_of, main, train_model, windows
from draft import overlap
from drafter import NoLook, train_here

from data.lib.kernels import pack
from data.lib.machine import autocast, device_of
from model import Drafter, load_checkpoint
from sample import denoise

TRAINING = "--attention draft:4 --freeze --batch_size 2 --evals 2 --eval_tokens 4096"
LENGTHS, PRECISIONS = (0, 2, 3, 4), ("float32", "bfloat16")  # drafts in a pass; 0: append


def continue_texts(model, prompts, n, temperature, K, precision):
    """Continue prompts (N, T), one at a time, by n tokens. Return texts (N, T + n), tokens per pass, and seconds."""
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
    prompts, notes = windows(corpus, n, config.texts * n), []
    print("| drafter | temperature | drafts | tokens per pass | times as fast: float32 | bfloat16 | same in float32 |")
    print("| --- " * 7 + "|")
    for name, drafter in (("looks at four tokens", Drafter), ("looks at none", NoLook)):
        with mock.patch("model.Drafter", drafter):
            flags = f"{TRAINING} --data {corpus} --init_from {gpt} --max_minutes {config.minutes}"
            path = train_model(config, f"out-real-{drafter.__name__}-{config.minutes}", flags, train_here)
            model, _, checkpoint = load_checkpoint(path, device)
        shared = overlap(model, windows(corpus, T, 8 * T).to(device)).tolist()
        shared = ", ".join(f"{x:.3f}" for x in shared)
        notes.append(f"{name}: after {checkpoint['step']:,} steps the drafts share this much with the GPT: {shared}")
        runs = {}
        for precision in PRECISIONS:  # float32 first, because packed matrices are bfloat16
            pack(model, getattr(torch, precision))
            continue_texts(model, prompts[:1], n, 0.0, 4, precision)  # to warm up
            for temperature, K in itertools.product((0.0, 1.0), LENGTHS):
                runs[temperature, K, precision] = continue_texts(model, prompts, n, temperature, K, precision)
        for temperature, K in itertools.product((0.0, 1.0), LENGTHS):
            base, drafted = ([runs[temperature, k, precision] for precision in PRECISIONS] for k in (0, K))
            (appended, _, _), (texts, per_pass, _) = base[0], drafted[0]
            speed = " | ".join(f"{before / after:.2f}" for (*_, before), (*_, after) in zip(base, drafted))
            same = texts.eq(appended).all(1).sum().item()
            row = f"{temperature:g} | {K} | {per_pass:.2f} | {speed} | {same} of {len(prompts)}"
            print(f"| {name} | {row} |", flush=True)
    print("", *notes, sep="\n")


if __name__ == "__main__":
    main(real_drafts, minutes=40, texts=6, gpt="data/weights/smollm2-135m-instruct.pt")
