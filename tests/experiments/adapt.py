"""How many tokens does a GPT need to become a diffusion model? SmolLM2's bound while its attention is opened.

python data/weights/prepare.py smollm2-135m-instruct
python data/fairytales/prepare.py --name fairytales-smollm2 --tokenizer data/weights/smollm2-135m-instruct.pt
python tests/experiments/adapt.py --tokens 100000    # for each of six runs; nine short ones choose learning rates
"""

from pathlib import Path

from common import bound, context_of, evaluations, main, plot, train_model, windows

from data.lib.checkpoint import save_checkpoint
from data.lib.corpus import load_corpus
from model import load_checkpoint

RUNS = {  # what changes in the GPT's config (without the shift, a position predicts its own token), and learning rates
    "append": ({}, (3e-5, 1e-4, 3e-4)),
    "blocks of 16": ({"block": 16}, (1e-4, 3e-4, 1e-3)),
    "canvas": ({"block": None}, (1e-4, 3e-4, 1e-3)),
    "blocks of 4": ({"block": 4}, "blocks of 16"),  # takes the rate that was best for this run
    "blocks of 16, no shift": ({"block": 16, "shift_id": None}, "blocks of 16"),
    "canvas, no shift": ({"block": None, "shift_id": None}, "canvas"),
}
BATCH = 4  # windows
HOW = f"--optimizer adamw --weight_decay 0 --warmup 0.1 --batch_size {BATCH} --prompt_len 0"


def open_attention(gpt, fields, path):
    """Save a GPT with these fields of its config changed; return the new checkpoint's path."""
    model, tokenizer, _ = load_checkpoint(gpt, **fields)
    path.parent.mkdir(exist_ok=True)
    save_checkpoint(path, model, tokenizer)
    return path


def adapt(config, device):
    gpt, corpus, T, best = config.gpt, "fairytales-smollm2", context_of(config), {}
    if config.quick:
        gpt, corpus = train_model(config, "out-gpt", "--attention causal"), "shakespeare"
    _, _, _, meta = load_corpus(corpus)
    tokens_per_byte = meta["val"]["tokens"] / meta["val"]["bytes"]
    n_iters, x0 = max(8, config.tokens // (BATCH * T)), windows(corpus, T, 64 * T)
    panel, save = plot("adapt")
    print(f"| run | learning rate | before | {' | '.join(f'{n_iters * BATCH * T * i // 4:,}' for i in range(1, 5))} |")
    print("| --- " * 7 + "|")
    for name, (fields, rates) in RUNS.items():
        out = f"out-adapt-{name.replace(', ', '-').replace(' ', '-')}"
        start = open_attention(gpt, fields, Path(f"{out}-start/ckpt.pt"))
        level = "--level uniform" if fields else ""
        how = f"{HOW} {level} --data {corpus} --init_from {start} --eval_tokens {64 * T}"

        def curve(lr, n_iters, n_evals):
            flags = f"{how} --lr {lr} --max_iters {n_iters} --evals {n_evals}"
            steps, nats = evaluations(train_model(config, f"{out}-{lr}-{n_iters}", flags), "step")
            return steps * BATCH * T, nats * tokens_per_byte

        if isinstance(rates, str):
            best[name] = best[rates]
        else:  # the rate that is best after a sixth of the tokens
            best[name] = min(rates, key=lambda lr: curve(lr, n_iters // 6, 1)[1][-1])
        before = bound(load_checkpoint(start, device)[0], x0) * tokens_per_byte
        tokens, nats = curve(best[name], n_iters, 4)
        print(f"| {name} | {best[name]} | {' | '.join(f'{x:.3f}' for x in (before, *nats))} |", flush=True)
        panel.plot([0, *tokens], [before, *nats], marker="o", label=name)
    panel.set(xlabel="tokens of adaptation", ylabel="bound, nats per byte")
    panel.legend()
    save()


if __name__ == "__main__":
    main(adapt, tokens=100_000, gpt="data/weights/smollm2-135m-instruct.pt")
