"""How much does it help to start from a pretrained BERT? Trains MiniLM by two recipes, and once from random weights.

python data/weights/prepare.py FOLDER --out data/weights/minilm.pt    # a folder with all-MiniLM-L6-v2's files
python data/weights/prepare.py smollm2-135m-instruct                  # the judge
python data/fairytales/prepare.py --name fairytales-minilm --tokenizer data/weights/minilm.pt
python tests/experiments/pretrained.py --minutes 60                   # three runs; --runs 2 leaves out the third

The second corpus trains on WikiText-2's validation split and validates on its test split:

python data/text/prepare.py wiki.valid.tokens --val wiki.test.tokens --name wiki --tokenizer data/weights/minilm.pt
python tests/experiments/pretrained.py --minutes 60 --corpus wiki
"""

import math
from pathlib import Path

import torch
from common import bound, context_of, evaluations, main, pair_entropy, plot, train_model, windows, write

from data.lib.checkpoint import save_checkpoint
from data.lib.corpus import load_corpus
from data.lib.machine import autocast, device_of
from data.lib.session import nats_per_byte
from model import load_checkpoint
from sample import log_likelihood

# Barry (2025): the defaults of transformers' Trainer, but for --minutes instead of thirty epochs.
POST = "--method roberta-diffusion --optimizer adamw --lr 5e-5 --beta2 0.999 --warmup 0 --weight_decay 0"
OURS = "--lr 0.002"
TINY = {"out-bert": "--method bert", "out-judge": "--attention causal"}  # for --quick


def save_untrained(checkpoint, path):
    """Save a checkpoint's network with random weights."""
    model, tokenizer, _ = load_checkpoint(checkpoint)
    path.parent.mkdir(exist_ok=True)
    torch.manual_seed(0)
    for name, p in model.named_parameters():
        if p.ndim > 1:
            torch.nn.init.normal_(p, std=0.02)
        else:
            torch.nn.init.constant_(p, float(name.endswith("weight")))  # norms start at 1, biases at 0
    save_checkpoint(path, model, tokenizer)


def judge_texts(texts, judge):
    """Mean nats per byte of texts under the judge, (model, tokenizer); the entropy of their pairs of bytes, in bits."""
    with autocast(device_of(judge[0])):
        nats = [nats_per_byte(*judge, text, log_likelihood) for text in texts]
    return sum(nats) / len(nats), pair_entropy(torch.tensor([list("\n".join(texts).encode())]))


def write_texts(model, tokenizer, n, T):
    """Write n texts of T tokens in random order, one token per step."""
    return [tokenizer.decode(ids) for ids in write(model, n, T, T, temperature=0.7)[0].tolist()]


def pretrained(config, device):
    bert, judge, corpus, T = config.bert, config.judge, config.corpus, context_of(config)
    if config.quick:
        bert, judge = (train_model(config, name, f"--data shakespeare {flags}") for name, flags in TINY.items())
        corpus = "shakespeare"
    judge, samples = load_checkpoint(judge, device)[:2], []
    save_untrained(bert, untrained := Path("out-untrained/ckpt.pt"))
    starts = {"the post's recipe": (bert, POST), "ours": (bert, OURS), "ours, from scratch": (untrained, OURS)}
    panel, save = plot(f"pretrained-{corpus.partition('-')[0]}")
    _, _, tokenizer, meta = load_corpus(corpus)
    x0, bytes_per_token = windows(corpus, T), meta["val"]["bytes"] / meta["val"]["tokens"]
    real = [tokenizer.decode(ids) for ids in x0[:: max(1, len(x0) // config.texts), : T // 2].tolist()]
    print("| run | bound, bits per byte | nats per byte under the judge | bits per pair of bytes |")
    print("| --- | --- | --- | --- |")
    nats, pairs = judge_texts(real[: config.texts], judge)
    print(f"| real text | | {nats:.3f} | {pairs:.2f} |")
    for number, (name, (start, flags)) in enumerate([*starts.items()][: config.runs]):
        flags = f"{flags} --data {corpus} --init_from {start} --batch_size 16"
        flags += f" --max_minutes {config.minutes} --eval_tokens 16384"
        path = train_model(config, f"out-{corpus}-{config.minutes}min-{number}", flags)
        model, _, _ = load_checkpoint(path, device)
        bits = bound(model, x0) / bytes_per_token / math.log(2)
        texts = write_texts(model, tokenizer, config.texts, T // 2)
        nats, pairs = judge_texts(texts, judge)
        print(f"| {name} | {bits:.3f} | {nats:.3f} | {pairs:.2f} |", flush=True)
        name += ", after a prompt of 16 tokens" * (flags.startswith(POST))  # how its recipe evaluates
        minutes, curve = evaluations(path, "minutes")
        panel.plot(minutes, curve, marker="o", label=name)
        curve = ", ".join(f"{nats:.3f} after {x:.1f}" for x, nats in zip(minutes, curve))
        samples.append(f"\n{name}. Nats per token after minutes of training: {curve}. Its first texts:")
        samples += texts[:3]
    panel.set(xlabel="minutes of training", ylabel="bound, nats per token")
    panel.figure.legend(loc="outside lower center")
    save()
    print(*samples, sep="\n\n")


if __name__ == "__main__":
    names = {"bert": "data/weights/minilm.pt", "judge": "data/weights/smollm2-135m-instruct.pt"}
    main(pretrained, minutes=60, runs=3, texts=20, corpus="fairytales-minilm", **names)
