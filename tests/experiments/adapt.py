"""How many tokens does a GPT need to become a diffusion model? SmolLM2's bound while its attention is opened.

python data/weights/prepare.py smollm2-135m-instruct
python data/fairytales/prepare.py --name fairytales-smollm2 --tokenizer data/weights/smollm2-135m-instruct.pt
python tests/experiments/adapt.py --tokens 3000000    # tokens per run; there are six runs
"""

from pathlib import Path

from common import bound, context_of, evaluations, log_ticks, main, plot, train_model, windows

from data.lib.checkpoint import save_checkpoint
from data.lib.corpus import load_corpus
from model import load_checkpoint

RUNS = {  # what changes in the GPT's config; without the shift, a position predicts its own token
    "append": {},
    "blocks of 4": {"block": 4},
    "blocks of 16": {"block": 16},
    "blocks of 16, no shift": {"block": 16, "shift_id": None},
    "canvas": {"block": None},
    "canvas, no shift": {"block": None, "shift_id": None},
}
HOW = "--optimizer adamw --lr 1e-4 --weight_decay 0 --batch_size 8 --prompt_len 0"


def open_attention(gpt, fields, path):
    """Save a GPT with these fields of its config changed; return the new checkpoint's path."""
    model, tokenizer, _ = load_checkpoint(gpt, **fields)
    path.parent.mkdir(exist_ok=True)
    save_checkpoint(path, model, tokenizer)
    return path


def adapt(config, device):
    gpt, corpus, T = config.gpt, "fairytales-smollm2", context_of(config)
    if config.quick:
        gpt, corpus = train_model(config, "out-gpt", "--attention causal"), "shakespeare"
    _, _, _, meta = load_corpus(corpus)
    tokens_per_byte = meta["val"]["tokens"] / meta["val"]["bytes"]
    n_iters, x0 = max(8, config.tokens // (8 * T)), windows(corpus, T, 128 * T)
    panel, save = plot("adapt")
    print(f"| run | before | {' | '.join(f'{n_iters * 8 * T * i // 8:,} tokens' for i in range(1, 9))} |")
    print("| --- " * 10 + "|")
    for number, (name, fields) in enumerate(RUNS.items()):
        start = open_attention(gpt, fields, Path(f"out-adapt-{number}-start/ckpt.pt"))
        before = bound(load_checkpoint(start, device)[0], x0) * tokens_per_byte
        level = "--level uniform" if fields else ""
        flags = f"{HOW} {level} --data {corpus} --init_from {start} --max_iters {n_iters} --eval_tokens {128 * T}"
        steps, nats = evaluations(train_model(config, f"out-adapt-{config.tokens}-{number}", flags), "step")
        nats *= tokens_per_byte
        print(f"| {name} | {' | '.join(f'{x:.3f}' for x in (before, *nats))} |", flush=True)
        panel.plot(steps * 8 * T, nats, marker="o", label=name)
    log_ticks(panel, [n_iters * T * i for i in (1, 2, 4, 8)], "tokens")
    panel.set(ylabel="bound, nats per byte")
    panel.legend()
    save()


if __name__ == "__main__":
    main(adapt, tokens=3_000_000, gpt="data/weights/smollm2-135m-instruct.pt")
