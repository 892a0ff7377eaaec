"""How many tokens does a language model need to learn to set instead of append? The bound of SmolLM2 as it is opened.

python data/weights/prepare.py smollm2-135m-instruct
python data/fairytales/prepare.py --name fairytales-smollm2 --tokenizer data/weights/smollm2-135m-instruct.pt
python tests/experiments/adapt.py --tokens 3000000    # for each of six runs
"""

from pathlib import Path

from common import bound, context_of, evaluations, log_ticks, main, plot, train_model, windows

from data.lib.checkpoint import save_checkpoint
from data.lib.corpus import load_corpus
from data.lib.flags import Attention
from data.lib.train_settings import attention_fields
from model import load_checkpoint

RUNS = {  # the attention, and whether a position predicts the next token, as in the GPT, or its own
    "append": ("causal", True),
    "blocks of 4": ("block:4", True),
    "blocks of 16": ("block:16", True),
    "blocks of 16, no shift": ("block:16", False),
    "canvas": ("shifted", True),
    "canvas, no shift": ("canvas", False),
}
HOW = "--optimizer adamw --lr 1e-4 --weight_decay 0 --batch_size 8 --prompt_len 0"


def opened(gpt, attention, shifted, path):
    """Save a GPT with this attention; return its path."""
    model, _, _ = load_checkpoint(gpt)
    fields = attention_fields(Attention.from_text(attention), model.config.mask_id, model.config)
    model, tokenizer, _ = load_checkpoint(gpt, **fields | ({} if shifted else {"shift_id": None}))
    path.parent.mkdir(exist_ok=True)
    save_checkpoint(path, model, tokenizer)
    return path


def adapt(config, device):
    gpt, corpus, T = config.gpt, "fairytales-smollm2", context_of(config)
    if config.quick:
        gpt, corpus = train_model(config, "out-gpt", "--attention causal"), "shakespeare"
    _, _, _, meta = load_corpus(corpus)
    per_byte = meta["val"]["tokens"] / meta["val"]["bytes"]
    n_iters, x0 = max(8, config.tokens // (8 * T)), windows(corpus, T, 128 * T)
    panel, save = plot("adapt")
    print(f"| run | before | {' | '.join(f'{n_iters * 8 * T * i // 8:,} tokens' for i in range(1, 9))} |")
    print("| --- " * 10 + "|")
    for number, (name, (attention, shifted)) in enumerate(RUNS.items()):
        start = opened(gpt, attention, shifted, Path(f"out-adapt-{number}-start/ckpt.pt"))
        before = bound(load_checkpoint(start, device)[0], x0) * per_byte
        level = "" if attention == "causal" else "--level uniform"
        flags = f"{HOW} {level} --data {corpus} --init_from {start} --max_iters {n_iters} --eval_tokens {128 * T}"
        steps, nats = evaluations(train_model(config, f"out-adapt-{number}", flags), "step")
        nats *= per_byte
        print(f"| {name} | {' | '.join(f'{x:.3f}' for x in (before, *nats))} |", flush=True)
        panel.plot(steps * 8 * T, nats, marker="o", label=name)
    ticks = [tick for tick in (10_000, 30_000, 100_000, 300_000, 1_000_000, 3_000_000) if tick <= config.tokens]
    log_ticks(panel, ticks, "tokens")
    panel.set(ylabel="bound, nats per byte")
    panel.legend()
    save()


if __name__ == "__main__":
    main(adapt, tokens=3_000_000, gpt="data/weights/smollm2-135m-instruct.pt")
