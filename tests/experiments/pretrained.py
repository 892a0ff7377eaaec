"""What is a pretrained BERT worth as a start? MiniLM becomes a generator by two recipes, and again from random weights.

MINILM=data/weights/minilm.pt
python data/weights/prepare.py FOLDER --out $MINILM    # all-MiniLM-L6-v2; and smollm2-135m-instruct, the judge
python data/fairytales/prepare.py --name fairytales-minilm --tokenizer $MINILM
python data/text/prepare.py wiki.valid.tokens --val wiki.test.tokens --name wikitext2-minilm --tokenizer $MINILM
python tests/experiments/pretrained.py --minutes 60    # for each of three runs on each of two corpora
"""

from pathlib import Path

import torch
from common import bound, context_of, evaluations, main, pair_entropy, plot, train_model, windows, write

from data.lib.checkpoint import save_checkpoint
from data.lib.corpus import load_corpus
from data.lib.machine import autocast, device_of
from data.lib.session import nats_per_byte
from model import load_checkpoint
from sample import log_likelihood

CORPORA = "fairytales-minilm", "wikitext2-minilm"
# Barry's recipe in 2025: transformers' Trainer by default. An hour instead of thirty epochs.
POST = "--method roberta-diffusion --optimizer adamw --lr 5e-5 --beta2 0.999 --warmup 0 --weight_decay 0"
OURS = "--lr 0.002"


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


def judged(texts, judge):
    """Nats per byte of texts under a judge, (model, tokenizer), and the entropy of their pairs of bytes, in bits."""
    with autocast(device_of(judge[0])):
        nats = [nats_per_byte(*judge, text, log_likelihood) for text in texts]
    pairs = pair_entropy(torch.tensor([list("\n".join(texts).encode())]))
    return sum(nats) / len(nats), pairs


def pretrained(config, device):
    bert, judge, corpora = config.bert, config.judge, CORPORA
    if config.quick:
        bert, judge = (train_model(config, name, f"--data shakespeare {flags}") for name, flags in TINY.items())
        corpora = ("shakespeare",)
    judge, T = load_checkpoint(judge, device)[:2], context_of(config)
    save_untrained(bert, untrained := Path("out-untrained/ckpt.pt"))
    starts = {"the post's recipe": (bert, POST), "ours": (bert, OURS), "ours, from scratch": (untrained, OURS)}
    *panels, save = plot("pretrained", len(corpora))
    print("| corpus | run | nats per token | bits per byte | nats per byte under the judge | bits per pair of bytes |")
    print("| --- | --- | --- | --- | --- | --- |")
    samples = []
    for panel, corpus in zip(panels, corpora):
        _, _, tokenizer, meta = load_corpus(corpus)
        x0, bytes_per_token = windows(corpus, T), meta["val"]["bytes"] / meta["val"]["tokens"]
        real = [tokenizer.decode(ids) for ids in x0[:: max(1, len(x0) // config.texts), :128].tolist()]
        print("| {} | real text | | | {:.3f} | {:.2f} |".format(corpus, *judged(real[: config.texts], judge)))
        for name, (start, flags) in starts.items():
            flags += f" --data {corpus} --init_from {start} --batch_size 16 --max_minutes {config.minutes} --evals 16"
            path = train_model(config, f"out-pretrained-{corpus}-{len(samples)}", flags)
            model, _, _ = load_checkpoint(path, device)
            nats = bound(model, x0)
            ids, _ = write(model, config.texts, min(T, 128), 128, temperature=0.7)
            texts = [tokenizer.decode(row) for row in ids.tolist()]
            bits = nats / bytes_per_token / 0.6931
            quality = "{:.3f} | {:.2f}".format(*judged(texts, judge))
            print(f"| {corpus} | {name} | {nats:.3f} | {bits:.3f} | {quality} |", flush=True)
            samples.append((corpus, name, texts[:3]))
            panel.plot(*evaluations(path, "minutes"), marker="o", label=name)
        panel.set(title=corpus, xlabel="minutes", ylabel="bound, nats per token")
        panel.legend()
    save()
    for corpus, name, texts in samples:
        print(f"\n{corpus}, {name}:", *texts, sep="\n\n")


TINY = {"out-bert": "--method bert", "out-judge": "--attention causal"}

if __name__ == "__main__":
    main(pretrained, minutes=60, texts=20, bert="data/weights/minilm.pt", judge="data/weights/smollm2-135m-instruct.pt")
