"""How fast do RoBERTa and GPT-2 write, theirs and ours? Repeats the post's comparison.

This project began with nathan.rs/posts/roberta-diffusion. The models have the published shapes and random weights, and
write 240 tokens after 16, RoBERTa in 10 steps and GPT-2 with a cache.

    python tests/experiments/post.py     # 3 minutes on two cores; needs transformers
"""

import sys
from pathlib import Path

import torch
from common import main, plot

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "stress"))

from bench import WRITTEN, best_seconds, gpt2_writers, roberta_writers


@torch.no_grad()
def post(config, device):
    panel, save = plot("post")
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 16} if config.quick else {"n_layer": 12, "n_head": 12, "n_embd": 768}
    ours, loop = roberta_writers(shape, device, steps=1 if config.quick else 10)
    append, *generate = gpt2_writers(shape, device)
    ours, loop, append, *generate = best_seconds(ours, loop, append, *generate, repeats=1 if config.quick else 3)
    names = "RoBERTa, the post's loop", "RoBERTa, ours", "GPT-2, transformers", "GPT-2, ours"
    seconds = dict(zip(names, (loop, ours, min(generate), append)))
    for name, value in seconds.items():
        print(f"| {name} | {value:.2f} s | {WRITTEN / value:,.0f} tokens/s |")
    panel.barh(list(seconds), list(seconds.values()))
    panel.invert_yaxis()
    panel.set(xlabel=f"seconds for {WRITTEN} tokens, batch 1")
    save()


if __name__ == "__main__":
    main(post)
