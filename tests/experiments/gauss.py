"""Is Gaussian noise on vectors as good as masks? Compares the two, and append, after the same minutes of training.

This is the noise that text diffusion began with (2205.14217). A token has a vector e. At level t the network sees

    z = alpha e + sigma noise,    alpha = cos(pi t / 2), sigma = sin(pi t / 2)

and predicts the token with cross-entropy. It is told the level and, half of the time, its own first guess (2208.04202).
To write, start from noise, move all vectors a little towards the expected ones at each step, and round them to tokens
at the end. No token is set earlier, so there are no orders. Layers, levels and optimizers are train.py's. With a slant,
levels depend on the position, which is AR-Diffusion's noise (2305.09515).

    OMP_NUM_THREADS=1 python tests/experiments/gauss.py --minutes 6     # 35 minutes of one core
"""

import sys

import torch
import torch.nn as nn
import torch.nn.functional as F
from common import BYTES, bound, context_of, evaluations, main, pair_entropy, plot, train_model, windows, write

from data.lib.corpus import load_corpus, random_windows
from data.lib.flags import Level, Span
from data.lib.kernels import cross_entropy
from data.lib.machine import autocast, device_of
from data.lib.noise import slanted_rate
from data.lib.train_settings import model_config
from data.lib.training import Run
from model import ModelConfig, Transformer, load_checkpoint
from sample import draw
from train import TrainConfig, draw_levels, update, which_maskable, widened

WIDTH = 16  # D, the width of a token's vector, as in Plaid (2305.18619)
LENGTH = 2.0  # of all vectors; a byte is then learned mostly around t = 1/2, where a bell has most of its levels
LEAST = 0.02  # lower levels count as 0; the signal is a thousand times the noise there
STEPS = 10_000  # of the bound; about 0.001 nats above its limit
BATCH = 64  # texts per pass of the bound

# --- the noise -----------------------------------------------------------------------------------


def levels_at(t, noisy, slant=0.0):
    """The level of each token at the text's level t (B, 1): (B, T). It is 0 where noisy (B, T) is False, in a prompt.

    Levels are train.py's rates: the probability that a token is masked there is the level of its noise here.
    """
    levels = slanted_rate(t, slant, noisy.shape[1], noisy.shape[1])
    return levels.masked_fill(~noisy | (levels < LEAST), 0.0)


def scales(levels):
    """alpha and sigma (B, T, 1) at levels (B, T). Their squares sum to 1 (cosine schedule, 2102.09672)."""
    angle = levels[..., None] * torch.pi / 2
    return angle.cos(), angle.sin()


def snr(levels):
    """Signal-to-noise ratio alpha^2 / sigma^2 (B, T): infinite at level 0, 0 at level 1."""
    alpha, sigma = scales(levels)
    return (alpha / sigma).square().squeeze(-1)


def corrupt(vectors, levels, generator=None):
    """Add noise to vectors (B, T, D) at levels (B, T): z (B, T, D)."""
    alpha, sigma = scales(levels)
    return alpha * vectors + sigma * torch.randn(vectors.shape, generator=generator).to(vectors.device)


# --- the network ---------------------------------------------------------------------------------


class Gauss(Transformer):
    """A Transformer that reads noisy vectors, their levels, and a guess at the clean vectors."""

    def __init__(self, config):
        super().__init__(config)
        # All vectors have one length. Cross-entropy would let them grow until no noise can hide them (2211.15089).
        self.token_embedding = nn.Embedding(config.vocab_size, WIDTH)
        self.read_in = nn.Linear(3 * WIDTH, config.n_embd, bias=False)

    def vectors(self):
        """The vector of each token, (V, D)."""
        return LENGTH * F.normalize(self.token_embedding.weight, dim=1)

    def logits_of(self, z, levels, guess):
        """Logits (B, T, V) of z (B, T, D) at levels (B, T). guess (B, T, D): the vectors expected so far, or zeros."""
        alpha, sigma = scales(levels)
        waves = torch.cos(torch.pi * levels[..., None] * torch.arange(WIDTH, device=z.device))
        x = self.read_in(torch.cat((z, guess, waves), 2))  # (B, T, C)
        layout, positions = self.plan(z.shape[1], torch.arange(0, device=z.device), 1)
        for layer in self.layers:
            x = layer(x, layout)
        # Add what z itself says about its token, log N(z; alpha e, sigma^2) up to a constant, so that the network only
        # has to say what the other tokens say about it (2305.18619).
        with torch.autocast(z.device.type, enabled=False):
            own = alpha / sigma.square().clamp(min=1e-4) * z @ self.vectors().T
        return self.unembed(x, positions).float() + own

    @torch.no_grad()
    def guess(self, z, levels, before):
        """The expected vectors (B, T, D), given those expected before."""
        return self.logits_of(z, levels, before).softmax(2) @ self.vectors()

    def forward(self, levels, where=None, clean=None):
        """Logits (N, V) at `where` of tokens `clean` (B, T), seen at levels (B, T), as train.py's loss_of asks."""
        z = corrupt(self.vectors()[clean], levels)
        guess = torch.zeros_like(z)
        if torch.rand(()) < 0.5:
            guess = self.guess(z.detach(), levels, guess)
        return self.logits_of(z, levels, guess)[where]


# --- the bound -----------------------------------------------------------------------------------
#
# A text is written in N steps. Each costs the divergence between its distribution and the one that knows the token
# (2107.00630, eq. 13). A vector that moves from level t to s costs the first term. One that is rounded, at s = 0, costs
# the second:
#
#     1/2 (SNR(s) - SNR(t)) |e - e_hat(z_t)|^2                 -log p(x | z_t)
#
# At level 1 nothing of the text is left, so starting from noise costs nothing. As N grows, the sum falls to half the
# integral of the squared error over the signal-to-noise ratio. For the best e_hat that is the entropy of the text (Guo,
# Shamai and Verdu 2005). e_hat may depend on z_t in any way. Here it takes two passes, and the first makes the guess.


def step_nats(model, x0, levels, following, generator=None):
    """The cost of moving each token of x0 from its level to the following one, for one draw of noise: nats (B, T)."""
    vectors = model.vectors()
    e = vectors[x0]
    z = corrupt(e, levels, generator)
    logits = model.logits_of(z, levels, model.guess(z, levels, torch.zeros_like(z)))  # (B, T, V)
    error = (e - logits.softmax(2) @ vectors).square().sum(2)
    moved = 0.5 * (snr(following) - snr(levels)) * error
    rounded = cross_entropy(logits.flatten(0, 1), x0.flatten()).view(x0.shape)
    return torch.where(following > 0, moved, rounded).masked_fill(levels == 0, 0.0)


@torch.no_grad()
def sequence_bounds(model, tokens, prompt_len=0, steps=STEPS, slant=0.0, draws=1, seed=0):
    """Estimate the bound of texts (N, T) int64 by one step of each per draw: nats (draws, N), noisy tokens (N,)."""
    generator, device = torch.Generator().manual_seed(seed), device_of(model)
    noisy = which_maskable(tokens, prompt_len, model.config.special_ids)  # (N, T)
    was_training, nats = model.training, []
    model.eval()
    for rows in list(torch.arange(len(tokens)).split(BATCH)) * draws:
        t = draw_levels(Level("grid", steps), len(rows), 1, generator)  # (B, 1)
        batch = tokens[rows], *(levels_at(level, noisy[rows], slant) for level in (t, t - 1 / steps))
        costs = step_nats(model, *(tensor.to(device) for tensor in batch), generator)  # (B, T)
        nats.append(steps * costs.cpu().double().sum(1))
    model.train(was_training)
    return torch.cat(nats).view(draws, -1), noisy.sum(1)


def nelbo(model, tokens, **settings):
    """The bound of texts (N, T) in nats per token; settings as above."""
    nats, n_noisy = sequence_bounds(model, tokens, **settings)
    return (nats.mean(0).sum() / n_noisy.sum()).item()


# --- writing -------------------------------------------------------------------------------------


def move(z, expected, levels, following, generator):
    """Move z (B, T, D) from levels to the following ones, both (B, T): a draw from q(z_s | z_t, e) for the expected e
    (2107.00630, appendix A).
    """
    (alpha, sigma), (alpha_s, sigma_s) = scales(levels), scales(following)
    kept = (snr(levels) / snr(following))[..., None]  # (B, T, 1), the fraction of the signal that z_t brings
    mean = alpha_s * (1 - kept) * expected + alpha * sigma_s**2 / (alpha_s * sigma**2) * z
    noise = torch.randn(z.shape, generator=generator).to(z.device)
    return mean + sigma_s * (1 - kept).sqrt() * noise


@torch.no_grad()
def denoise(model, canvas, steps=128, slant=0.0, seed=0):
    """Fill the holes of canvas (B, T) int64 in this many forward passes: (B, T)."""
    generator, device, B = torch.Generator().manual_seed(seed), device_of(model), len(canvas)
    holes, canvas, vectors = canvas == model.config.mask_id, canvas.to(device), model.vectors()

    def levels_after(n):
        return levels_at(torch.full((B, 1), 1 - n / steps), holes, slant).to(device)

    z = corrupt(vectors[canvas], levels_after(0), generator)  # noise at the holes, no noise elsewhere
    expected = torch.zeros_like(z)
    for n in range(steps):
        levels, following = levels_after(n), levels_after(n + 1)
        logits = model.logits_of(z, levels, expected)
        expected = logits.softmax(2) @ vectors
        z = torch.where((following < levels)[..., None], move(z, expected, levels, following, generator), z)
        arrived = (following == 0) & (levels > 0)  # without a slant that is all holes, in the last step
        u = 1 - torch.rand(arrived.sum().item(), dtype=torch.float64, generator=generator)
        canvas[arrived] = draw(logits[arrived], u).to(device)
        z[arrived] = vectors[canvas[arrived]]
    return canvas.cpu()


# --- the experiment ------------------------------------------------------------------------------


def train_gauss(config, device, slant):
    """Train on Python's library as train.py does: the model, its steps, and the bound after some of the minutes."""
    T = context_of(config)
    split, _, tokenizer, meta = load_corpus(BYTES, T)
    size = {"n_layer": 1, "n_embd": 16, "batch_size": 4, "max_iters": 3} if config.quick else {}
    flags = TrainConfig(context=T, max_minutes=config.minutes, evals=12, prompt_len=Span(0, 0), **size)
    torch.manual_seed(0)
    run = Run(flags, Gauss(model_config(ModelConfig, flags, tokenizer)).to(device).train(), device, meta, tokenizer)
    some, curve = windows(BYTES, T, 2**15), []
    while run.progress() < 1:
        x0, _ = random_windows(split, flags.batch_size, T, run.generator)
        t = draw_levels(widened(flags, run.progress()), len(x0), 1, run.generator)
        levels = levels_at(t, torch.ones_like(x0, dtype=torch.bool), slant)
        lost = levels > 0
        update(run, (x0, levels, lost, lost / lost.sum().clamp(min=1)))
        run.tick()
        if run.evaluation_is_due():
            with run.precision:
                curve.append((run.minutes, nelbo(run.model, some, slant=slant)))
            print(f"{curve[-1][0]:.1f} minutes, step {run.step:,}: bound {curve[-1][1]:.3f}", file=sys.stderr)
    return run.model.eval(), run.step, curve


def gauss(config, device):
    panel, save = plot("gauss")
    flags = f"--max_minutes {config.minutes} --prompt_len 0 --evals 12 --eval_tokens 32768"
    baselines = {"masks": "", "append": "--attention causal", "judge": "--attention causal --seed 9"}
    for name, more in baselines.items():
        baselines[name] = train_model(config, f"out-noise/{name}-{config.minutes}", f"{flags} {more}")
    judge, _, _ = load_checkpoint(baselines["judge"], device)
    T, n, tokenizer = context_of(config), config.texts, load_corpus(BYTES)[2]
    tokens, real = windows(BYTES, T), windows(BYTES, T, n * T)
    print("| noise | steps | bound, nats per byte | its text, nats per byte | bits per pair of bytes |")
    print(f"| text of the corpus | | | {bound(judge, real):.3f} | {pair_entropy(real):.2f} |")

    def show(name, steps, nats, texts, curve):
        row = f"{nats:.3f} | {bound(judge, texts):.3f} | {pair_entropy(texts):.2f}"
        print(f"| {name} | {steps:,} | {row} |\n{tokenizer.decode(texts[0].tolist())}", flush=True)
        panel.plot(*curve, marker="o", markersize=4, label=name)

    for name in ("masks", "append"):
        model, _, checkpoint = load_checkpoint(baselines[name], device)
        texts, _ = write(model, n, T, *((T, "left") if name == "append" else (T // 2,)))
        curve = evaluations(baselines[name], "minutes")
        show(name, checkpoint["step"], bound(model, tokens), texts, curve)
    for name, slant in (("Gaussian noise", 0.0), ("Gaussian noise, the right end first", 1.0)):
        model, steps, curve = train_gauss(config, device, slant)
        with autocast(device):
            texts = denoise(model, torch.full((n, T), model.config.mask_id), T // 2, slant)
            nats = nelbo(model, tokens, slant=slant)
        show(name, steps, nats, texts, zip(*curve))
    panel.set(xlabel="minutes of training", ylabel="validation bound, nats per byte")
    panel.legend()
    save()


if __name__ == "__main__":
    main(gauss, minutes=6, texts=32)
