"""Gaussian noise where train.py has masks: the baseline that text diffusion began with (2205.14217).

A token is a vector e, as long as any other. At its noise level t in [0, 1] the network sees

    z = alpha e + sigma noise,    alpha = cos(pi t / 2), sigma = sin(pi t / 2)

and predicts the token, with cross-entropy, told the level and half of the time its own last guess. The
denoiser begins with noise, moves all vectors towards what is expected, a little at each step, and rounds them
to tokens at the end: none is set before, so that there are no orders. Layers, levels, optimizers and the run
are train.py's; levels that depend on the position (--rate slant:W) are AR-Diffusion's own kind (2305.09515).

    python tests/gauss.py train --max_minutes 10         # into out-gauss
    python tests/gauss.py bound                          # of its validation split
    python tests/gauss.py sample --prompt "def "
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.lib.checkpoint import read_checkpoint
from data.lib.corpus import load_corpus, random_windows, spaced_windows
from data.lib.errors import Mistake, command
from data.lib.escape import inert
from data.lib.flags import Level, Rate, argument, flag, parse
from data.lib.kernels import Linear, cross_entropy
from data.lib.machine import autocast, device_of, pick_device
from data.lib.noise import slanted_rate
from data.lib.prompt import make_canvas
from data.lib.report import Report, bits_per_byte, standard_error, text_share, validation_windows
from data.lib.tokenizer import tokenizer_from_state
from data.lib.train_settings import check_training, model_config, settle
from data.lib.training import Run, underway
from model import ModelConfig, Transformer
from sample import draw
from train import METHODS, TrainConfig, draw_levels, update, which_maskable, widened

WIDTH = 16  # D, of a token's vector, as in Plaid (2305.18619)
LENGTH = 2.0  # of all vectors: most is learned about a byte around t = 1/2, where the levels of a bell are
LEAST = 0.02  # a level below it is 0: the signal is a thousand times the noise there, and a vector its token

# --- the noise -----------------------------------------------------------------------------------


def levels_at(t, noisy, slant=0.0):
    """Level of each token at the text's level t (B, 1): (B, T), 0 where noisy (B, T) is False, in a prompt.
    They are train.py's rates: there a token is masked with this probability, here all are noised this much.
    """
    levels = slanted_rate(t, slant, noisy.shape[1], noisy.shape[1])
    return levels.masked_fill(~noisy | (levels < LEAST), 0.0)


def scales(levels):
    """alpha and sigma (B, T, 1) at levels (B, T): the squares sum to 1 (2102.09672's cosine)."""
    angle = levels[..., None] * torch.pi / 2
    return angle.cos(), angle.sin()


def snr(levels):
    """Signal-to-noise ratio alpha^2 / sigma^2, (B, T): infinite at level 0, 0 at level 1."""
    alpha, sigma = scales(levels)
    return (alpha / sigma).square().squeeze(-1)


def corrupt(vectors, levels, generator=None):
    """z (B, T, D), the vectors e (B, T, D) at levels (B, T)."""
    alpha, sigma = scales(levels)
    return alpha * vectors + sigma * torch.randn(vectors.shape, generator=generator).to(vectors.device)


# --- the network ---------------------------------------------------------------------------------


class Gauss(Transformer):
    """A Transformer that reads vectors with noise, their levels, and a guess at what they were."""

    family = "gauss"

    def __init__(self, config):
        super().__init__(config)
        # On a sphere: cross-entropy would let them grow until no noise can hide them (2211.15089).
        self.token_embedding = nn.Embedding(config.vocab_size, WIDTH)
        self.read_in = Linear(3 * WIDTH, config.n_embd, bias=False)

    def vectors(self):
        """The vector e of each token, (V, D)."""
        return LENGTH * F.normalize(self.token_embedding.weight, dim=1)

    def logits_of(self, z, levels, guess):
        """Logits (B, T, V) of the tokens whose vectors are z (B, T, D) at levels (B, T).

        guess (B, T, D): the mean vector that was expected before, or zeros (2208.04202).
        """
        alpha, sigma = scales(levels)
        waves = torch.cos(torch.pi * levels[..., None] * torch.arange(WIDTH, device=z.device))
        x = self.read_in(torch.cat((z, guess, waves), 2))  # (B, T, C)
        layout, positions = self.plan(0, z.shape[1], None, z.device)
        for layer in self.layers:
            x = layer(x, layout)
        # What z itself says of its token, log N(z; alpha e, sigma^2), but for what all tokens share: the
        # network has to say only what the others say of it (2305.18619).
        with torch.autocast(z.device.type, enabled=False):
            own = alpha / sigma.square().clamp(min=1e-4) * z @ self.vectors().T
        return self.unembed(x, positions).float() + own

    @torch.no_grad()
    def guess(self, z, levels, before):
        """The vectors expected at z, (B, T, D), which what was expected before helps to find."""
        return self.logits_of(z, levels, before).softmax(2) @ self.vectors()

    def forward(self, levels, where=None, clean=None):
        """Logits (N, V) of the tokens `clean` (B, T) at `where`, seen at levels (B, T): what train.py's
        loss_of asks of a model, with levels for a canvas.
        """
        z = corrupt(self.vectors()[clean], levels)
        guess = torch.zeros_like(z)
        if torch.rand(()) < 0.5:
            guess = self.guess(z.detach(), levels, guess)
        return self.logits_of(z, levels, guess)[where]


def draw_batch(split, config, generator, special_ids, level):
    """A batch as train.py's update takes it: x0, levels, which tokens have a loss, and what each counts, the
    mean over these; (B, T) each.
    """
    B, T = config.batch_size, config.context
    x0, own_prompt = random_windows(split, B, T, generator)  # (B, T), (B, 1)
    prompt_len = torch.randint(config.prompt_len.low, config.prompt_len.high + 1, (B, 1), generator=generator)
    noisy = which_maskable(x0, own_prompt + prompt_len, special_ids)
    levels = levels_at(draw_levels(level, B, 1, generator), noisy, config.rate.value)
    lost = levels > 0
    return x0, levels, lost, lost / lost.sum().clamp(min=1)


# --- the bound -----------------------------------------------------------------------------------
#
# Text is written in N steps, and each costs the divergence of its distribution from the one that knows the
# token (2107.00630, eq. 13). For a vector that moves from level t to s, and for one that is rounded, s = 0:
#
#     1/2 (SNR(s) - SNR(t)) |e - e_hat(z_t)|^2                 -log p(x | z_t)
#
# At level 1 nothing is left of the text, and so it costs nothing to begin with noise. As N grows the sum
# falls to half the integral of the squared error over the ratio (2305.18619 has it so), which for the best
# e_hat is the entropy of the text (Guo, Shamai and Verdu 2005). e_hat may depend on all of z_t in any way:
# here by two passes, of which the first makes the guess. This is the bound of a denoiser that makes both.

STEPS = 10_000  # of the bound: some 0.001 nats above its limit
BATCH = 64  # texts of a pass of the bound


def step_nats(model, x0, levels, following, generator=None):
    """What the step of each token of x0 (B, T) from its level to the following one costs, all (B, T): in
    nats, for one draw of noise.
    """
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
    """Estimate the negative evidence lower bound of texts (N, T) int64: nats (draws, N), and how many tokens
    have noise, (N,). A draw sees one step of each text and multiplies its cost by the number of steps, which
    are stratified over BATCH texts at a time.
    """
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


def bound(model, tokens, **settings):
    """The bound of texts (N, T) in nats per token; settings as above."""
    nats, n_noisy = sequence_bounds(model, tokens, **settings)
    return (nats.mean(0).sum() / n_noisy.sum()).item()


# --- the denoiser --------------------------------------------------------------------------------


def move(z, expected, levels, following, generator):
    """z (B, T, D) at levels, as it is at the following ones (B, T): a draw from q(z_s | z_t, e) for the e
    that was expected (2107.00630, appendix A).
    """
    (alpha, sigma), (alpha_s, sigma_s) = scales(levels), scales(following)
    kept = (snr(levels) / snr(following))[..., None]  # (B, T, 1), the share of the signal that z_t brings
    mean = alpha_s * (1 - kept) * expected + alpha * sigma_s**2 / (alpha_s * sigma**2) * z
    noise = torch.randn(z.shape, generator=generator).to(z.device)
    return mean + sigma_s * (1 - kept).sqrt() * noise


@torch.no_grad()
def denoise(model, canvas, steps=128, slant=0.0, seed=0):
    """Fill the holes of canvas (B, T) int64 in so many steps, a pass each; (B, T). All are rounded in the
    last step, with a slant some before it. The guess of a step is that of the one before.
    """
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
        arrived = (following == 0) & (levels > 0)
        u = 1 - torch.rand(arrived.sum().item(), dtype=torch.float64, generator=generator)
        canvas[arrived] = draw(logits[arrived], u).to(device)
        z[arrived] = vectors[canvas[arrived]]
    return canvas.cpu()


# --- the run around it ---------------------------------------------------------------------------

WHAT = "train", "bound", "sample"
OF_MASKS = {  # flags of train.py that have no meaning here, or were not tried
    *("attention", "compile", "eval_only", "grad_checkpoint", "method", "one_level"),
    *("shard", "visible", "weight"),
}


@dataclass(kw_only=True)
class GaussConfig(TrainConfig):
    what: Literal[WHAT] = argument(f"one of {', '.join(WHAT)}")
    out_dir: str = flag("out-gauss", "train: where ckpt.pt (best), last.pt and log.csv go")
    init_from: Literal["scratch", "resume"] = flag("scratch", "train: scratch; or resume, to go on from out_dir")
    ckpt: str = flag("out-gauss/ckpt.pt", "bound, sample: a checkpoint that this wrote")
    prompt: str = flag("", "sample: text that is given, <mask> for a hole")
    steps: int | None = flag(None, f"denoising steps (sample: 128, bound: {STEPS})", least=1)


def load(path, device="cpu", keep=None, **changes):
    """Read what train wrote: (model in eval mode, tokenizer, the whole dict). changes: fields of the config."""
    checkpoint = read_checkpoint(path)
    try:
        model = Gauss(ModelConfig(**{**checkpoint["config"], **changes}))
        model.load_state_dict(checkpoint["model"])
        tokenizer = tokenizer_from_state(checkpoint["tokenizer"])
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise Mistake(f"{path}: not a checkpoint of tests/gauss.py ({str(error)[:200]})") from None
    return model.to(device).eval(), tokenizer, checkpoint


def learn(given):
    config, model, _, checkpoint = settle(given, GaussConfig, METHODS, load)
    check_training(config)
    train_split, val_split, tokenizer, meta = load_corpus(config.data, config.context)
    torch.manual_seed(config.seed)
    if model is None:
        model = Gauss(model_config(ModelConfig, config, tokenizer))
    run = Run(config, model, None, meta, tokenizer)
    tokens, own_prompt = val = validation_windows(val_split, config)
    prompt_len, slant, special_ids = own_prompt + config.prompt_len.low, config.rate.value, model.config.special_ids

    def sampler(model, canvas, steps, temperature):
        yield denoise(model, canvas, steps, slant)

    with underway(run, checkpoint) as came, Report(run, sampler, val, meta) as log:
        stopped = False
        while not stopped and run.progress() < 1:
            level = widened(config, run.progress())
            loss, norm = update(run, draw_batch(train_split, config, run.generator, special_ids, level))
            stopped, nats = run.tick(bool(came)), None
            if run.evaluation_is_due():
                with run.precision:
                    nats = bound(model, tokens, prompt_len=prompt_len, slant=slant)
            log.step(loss, norm, nats, stopped)
            if nats is not None:
                run.save(nats)
                log.evaluation(nats)
    run.end(came, "tests/gauss.py train")


def main():
    given = parse(GaussConfig, __doc__.splitlines()[0])
    config = GaussConfig(**given)
    for name in OF_MASKS & given.keys():
        raise Mistake(f"--{name} {given[name]}: not with Gaussian noise")
    if config.rate.kind == "spindle":
        raise Mistake(f"--rate {config.rate}: not with Gaussian noise")
    if config.what == "train":
        return learn(given)
    device = pick_device(config.device)
    precision = autocast(device, config.dtype)
    model, tokenizer, checkpoint = load(config.ckpt, device)
    trained, T = checkpoint["train"], model.config.context
    slant = Rate.from_text(trained["rate"]).value
    if config.what == "sample":
        canvas = torch.tensor([make_canvas(config.prompt, suffix="", length=T, tokenizer=tokenizer, context=T)])
        with precision:
            text = denoise(model, canvas, config.steps or 128, slant, config.seed)
        return print(inert(tokenizer.decode(text[0].tolist())))
    _, val_split, _, meta = load_corpus(trained["data"], T)
    tokens, own_prompt = map(torch.from_numpy, spaced_windows(val_split, T, config.eval_tokens or len(val_split)))
    steps, draws = config.steps or STEPS, 1 + math.ceil(256 / len(tokens))  # two for 256 windows, to show the error
    with precision:
        bounds, n_noisy = sequence_bounds(model, tokens, own_prompt, steps, slant, draws, config.seed)
    nats = (bounds.mean(0).sum() / n_noisy.sum()).item()
    bits = bits_per_byte(nats, text_share(tokens, own_prompt, model.config.special_ids), meta["val"])
    print(
        f"{trained['data']}: bound in {steps:,} steps {nats:.4f} nats per token (standard error "
        f"{standard_error(bounds, n_noisy, BATCH):.4f}), {bits:.4f} bits per byte; {tokens.numel():,} "
        f"validation tokens, {draws} draws"
    )


if __name__ == "__main__":
    command(main)
