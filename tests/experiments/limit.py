"""How close does the bound come to the true entropy, and what does it cost to set several tokens at once?

Trains on text from a source whose entropy is known (hmm.py), which can also count the errors in what the model writes.

    python tests/experiments/limit.py     # 13 minutes on two cores
"""

import hmm
import numpy as np
from common import evaluations, log_ticks, main, plot, run_script, train_model, windows, write

import data.lib.corpus
from data.lib.machine import autocast
from data.lib.report import standard_error
from model import load_checkpoint
from train import sequence_bounds

FLAGS = "--data hmm --n_embd 192 --context 64 --batch_size 64 --widen 0 --prompt_len 0 --max_minutes 6.5"
FLAGS += " --evals 12 --eval_tokens 262144"  # the whole validation split, so that the log is about the same text
TOKENS_PER_STEP = [1, 2, 4, 8, 16, 32, 64]
FLOOR = 1e-3  # the fraction of probability that scoring gives to all letters alike, so that errors cost finitely much


def limit(config, device):
    if not (data.lib.corpus.DATA / "hmm" / "meta.json").exists():
        run_script(config, "tests/experiments/hmm.py", "--tokens 20000" if config.quick else "")
    path = train_model(config, "out-hmm", FLAGS)
    model, _, _ = load_checkpoint(path, device)
    compare_with_entropy(model, path, device)
    count_errors(model, 4 if config.quick else 512)


def compare_with_entropy(model, path, device):
    panel, save = plot("limit")
    tokens = windows("hmm", 64)
    entropy = hmm.text_nats(tokens).mean()
    with autocast(device):
        nats, n_maskable = sequence_bounds(model, tokens, draws=8)
    bound = (nats.mean(0).sum() / n_maskable.sum()).item()
    print(f"NELBO {bound:.4f} nats per token, standard error {standard_error(nats, n_maskable):.4f}, ", end="")
    print(f"{bound / entropy - 1:.2%} above {entropy:.4f}, the true entropy of the same windows")
    panel.plot(*evaluations(path, "minutes"), marker="o", label="NELBO of the model")
    panel.axhline(entropy, color="gray", linestyle=":", label="true entropy of the windows")
    panel.set(xlabel="minutes of training", ylabel="nats per token")
    panel.legend()
    save()


def count_errors(model, n):
    """Score n texts for each number of tokens per step. Tokens that are set in one step don't know of each other."""
    token_error, sequence_error, save = plot("parallel", 2)
    print("| order | tokens per step | nats per token | impossible |")
    for order in ("random", "confidence"):
        nats, impossible = [], []
        for k in TOKENS_PER_STEP:
            texts, _ = write(model, n, 64, 64 // k, order)
            nats.append(hmm.text_nats(texts, FLOOR).mean())
            impossible.append(1 - np.isfinite(hmm.text_nats(texts)).all(1).mean())
            print(f"| {order} | {k} | {nats[-1]:.3f} | {impossible[-1]:.1%} |", flush=True)
        token_error.plot(TOKENS_PER_STEP, nats, marker="o", label=order)
        sequence_error.plot(TOKENS_PER_STEP, impossible, marker="o", label=order)
    real = hmm.text_nats(windows("hmm", 64, 64 * n), FLOOR).mean()
    print(f"| text of the source | | {real:.3f} | 0.0% |")
    token_error.axhline(real, color="gray", linestyle=":", label="text of the source")
    token_error.set(title="nats per token under the source, with a floor", ylim=(0, None))
    sequence_error.set(title="fraction of impossible sequences", ylim=(0, 1))
    for panel in (token_error, sequence_error):
        log_ticks(panel, TOKENS_PER_STEP, "tokens per step")
    token_error.legend()
    save()


if __name__ == "__main__":
    main(limit)
