"""Does a model of captions and pictures know which word belongs to which picture? It names digits and draws them.

python tests/experiments/digits.py --texts 100     # 20 minutes of two cores for the models, and 35 of one
"""

import itertools

import numpy as np
import torch
import torch.nn.functional as F
from common import main, plot, run_script, train_model

from data.digits.prepare import WORDS
from data.lib.corpus import load_corpus, windows_at
from data.lib.machine import autocast
from model import load_checkpoint
from sample import denoise

FLAGS = "--data digits --context 72 --batch_size 32 --dropout 0.1"


def caption_nats(model, captions, canvases, given):
    """Negative log-likelihood of canvases (N, T) with each of 10 captions (10, L) in turn, in nats: (N, 10).

    It is exact: tokens are set from the left, as for `--score --order left`. given: of the captions alone, given the
    pictures.
    """
    first, columns = captions.shape[1], []
    for caption in captions:
        text = canvases.clone()
        text[:, :first] = caption
        canvas = torch.full_like(text, model.config.mask_id)
        if given:
            canvas[:, first:] = text[:, first:]
        log_p = torch.zeros(canvas.shape)
        for _ in denoise(model, canvas, text.shape[1], "left", text=text, log_p=log_p):
            pass
        columns.append(-log_p.sum(1))
    return torch.stack(columns, 1)


def sheet(pictures, digits, width):
    """Twelve pictures (N, pixels) of each digit (N,) as one image, with two white pixels between them."""
    rows = torch.stack([pictures[digits == i][:12] for i in range(10)])  # (10, 12, pixels)
    pixels = F.pad(rows.unflatten(2, (-1, width)) - 257, (0, 2, 0, 2))
    return pixels.transpose(1, 2).flatten(2).flatten(0, 1)


def digits(config, device):
    if config.quick:
        run_script(config, "data/digits/prepare.py", "")
    _, val, tokenizer, _ = load_corpus("digits")
    T, first = tokenizer.canvas_len, tokenizer.caption
    real, _ = map(torch.from_numpy, windows_at(val, np.arange(len(val.starts))[:, None], T))
    captions = torch.tensor([tokenizer.canvas(word, []) for word in WORDS])  # (10, first)
    meant = (real[:, None, :first] == captions).all(2).int().argmax(1)  # (N,)
    paths = [train_model(config, f"out-digits-{seed}", f"{FLAGS} --seed {seed}") for seed in (0, 1)]
    models = [load_checkpoint(path, device)[0] for path in paths]
    words = torch.arange(10).repeat_interleave(config.texts)
    canvas = torch.full((len(words), T), tokenizer.mask_id)
    canvas[:, :first] = captions[words]
    for temperature in (1.0, 0.7):
        with autocast(device):
            *_, drawn = denoise(models[0], canvas, temperature=temperature)
            named = (caption_nats(models[1], captions, drawn, given=True).argmin(1) == words).float()
        each = ", ".join(f"{word} {p:.0%}" for word, p in zip(WORDS, named.view(10, -1).mean(1).tolist()))
        print(f"drawn at {temperature} and named as meant: {named.mean():.1%}; {each}", flush=True)
    *panels, save = plot("digits", 2)
    sheets = ("real and held out", real, meant), ("drawn from the word", drawn, words)
    for panel, (title, pictures, labels) in zip(panels, sheets):
        panel.imshow(sheet(pictures[:, first:], labels, tokenizer.width).numpy(), cmap="gray_r", interpolation="none")
        panel.set(title=title, xticks=[], yticks=[])
    save()
    real, meant = (real[:2], meant[:2]) if config.quick else (real, meant)
    for given, seed in itertools.product((True, False), (0, 1)):
        with autocast(device):
            right = caption_nats(models[seed], captions, real, given).argmin(1) == meant
        way = "captions given the pictures" if given else "whole canvases"
        print(f"{right.float().mean():.1%} of {len(right)} named rightly by seed {seed}, by {way}", flush=True)


if __name__ == "__main__":
    main(digits, texts=32)
