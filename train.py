"""Train a masked text diffusion model: mask random tokens of a text, and train a network to fill them in.

A text x0 of T tokens is corrupted at noise level t in (0, 1]. A token becomes a hole, `<mask>`, with a probability
that rises with t: its rate. The network sees the corrupted text xt and predicts x0 at the holes:

    xt, holes = corrupt(x0, rate, maskable, u, mask_id)  # u: uniform random numbers
    logits = model(xt, where=holes, clean=x0)  # (N, V) at the N holes; for `clean` see model.py
    loss = (weights[holes] * cross_entropy(logits, x0[holes])).sum()

Four choices make a method: how t is drawn, the rate of each token, the weight of each hole in the loss, and who
sees whom (model.py). BERT fixes t = 0.15; text diffusion draws t from (0, 1]. A model that writes in blocks draws a
t for each block. In a GPT a block is one token and t = 1, so every token is a hole.

    python train.py                                      # ten minutes, on the source of Python's library
    python train.py --method mdlm --data shakespeare --max_minutes 5 --out_dir out-mdlm
    python train.py --init_from resume                   # go on after Ctrl-C
    python train.py --attention draft:4 --out_dir out-draft    # a GPT that drafts 4 tokens and verifies them
    python train.py --eval_only --init_from out/ckpt.pt
"""

import functools
from dataclasses import dataclass
from typing import Literal

import torch

from data.lib import corpus, flags, kernels, noise, processes, report, train_settings, training
from data.lib.flags import flag
from model import Transformer, load_checkpoint
from sample import denoise

UNIFORM = flags.Level("uniform")
METHODS = {  # the flags that each method sets; explicit flags win
    "default": {},
    "bert": {"level": "0.15", "prompt_len": "0"},  # 1810.04805, without its 80/10/10
    "roberta-diffusion": {
        "level": "grid:10",
        "one_level": True,
        "prompt_len": "16",
    },  # nathan.rs/posts/roberta-diffusion
    "d3pm": {"level": "grid:100", "weight": "elbo", "prompt_len": "0"},  # 2107.03006
    "mdlm": {"level": "uniform", "weight": "elbo", "prompt_len": "0"},  # also MD4 2406.04329, LLaDA 2502.09992
    "ar-diffusion": {"level": "uniform", "rate": "slant:1", "weight": "elbo", "prompt_len": "0"},  # 2305.09515
    "diffusionbert": {"level": "uniform", "rate": "spindle:0.3", "prompt_len": "0"},  # 2211.15029
    "block-diffusion": {"level": "uniform", "weight": "elbo", "prompt_len": "0", "attention": "block:16"},  # 2503.09573
    "gpt": {"attention": "causal"},  # which implies level 1
    "diffugpt": {"level": "uniform", "weight": "elbo", "prompt_len": "0", "attention": "shifted"},  # 2410.17891
}


@dataclass
class TrainConfig:
    groups = {  # --help starts a section at each of these flags
        "data": "files",
        "method": "noise and objective",
        "n_layer": "model",
        "batch_size": "optimisation",
        "evals": "output",
        "device": "machine",
    }
    data: str = flag("python", "corpus: a folder in data/")
    out_dir: str = flag("out", "where this run's ckpt.pt (the best), last.pt and log.csv go")
    init_from: str = flag("scratch", "scratch; resume, to go on from out_dir; or a checkpoint's path")
    eval_only: bool = flag(False, "print the bound of --init_from and stop")
    method: Literal[tuple(METHODS)] = flag("default", "sets the flags below to those of a published method")
    level: flags.Level = flag(
        flags.Level("bell", 1.2), "how t is drawn: uniform, bell:S (of width S), grid:N, or a number"
    )
    one_level: bool = flag(False, "draw one t for the whole batch")
    widen: float = flag(1.0, "fraction of the run over which a bell widens to S; 0: at once", least=0, most=1)
    rate: flags.Rate = flag(
        flags.Rate("t"), "masking rate: t; slant:W, the right end first; spindle:W, rare tokens first"
    )
    visible: float = flag(0.0, "fraction of visible tokens also trained on, half of them randomised", least=0, below=1)
    weight: Literal["elbo", "mean"] = flag("mean", "weight of a hole in the loss: the bound's, or all equal")
    prompt_len: flags.Span = flag(
        flags.Span(0, 16), "leading tokens that are never masked: N, or M to N at random (M:N)"
    )
    attention: flags.Attention = flag(flags.Attention("canvas"), "canvas, shifted, block:K, causal (GPT), or draft:K")
    n_layer: int = flag(4, "layers", least=1)
    n_head: int = flag(2, "attention heads", least=1)
    n_embd: int = flag(160, "width", least=1)
    context: int = flag(256, "tokens in a training window", least=1)
    dropout: float = flag(0.0, "dropout probability", least=0, below=1)
    conv: int = flag(5, "taps of each layer's convolution; 0 for none", least=0)
    freeze: bool = flag(False, "with draft:K, train only what drafting adds to the GPT in --init_from")
    batch_size: int = flag(8, "windows per step", least=1)
    grad_accum: int = flag(1, "micro-batches per batch, to save memory", least=1)
    grad_checkpoint: bool = flag(False, "recompute layers in the backward pass, to save memory")
    optimizer: Literal["muon", "adamw"] = flag(
        "muon", "muon: for the layers' and the drafter's matrices, with AdamW for the rest"
    )
    lr: float = flag(0.01, "peak learning rate", above=0)
    beta2: float = flag(0.95, "AdamW: decay of the squared gradient's average", above=0, below=1)
    warmup: float = flag(0.03, "fraction of the run over which lr rises; then it falls to 0", least=0, below=1)
    weight_decay: float = flag(0.1, "decoupled weight decay, on matrices", least=0)
    grad_clip: float = flag(1.0, "largest gradient norm; 0 for no clipping", least=0)
    max_iters: int | None = flag(None, "steps to train for", least=1)
    epochs: float | None = flag(None, "passes over the training split to train for", above=0)
    max_minutes: float | None = flag(None, "minutes to train for (10 if there is no other limit)", above=0)
    evals: int | None = flag(None, "evaluations over the run, each with a checkpoint (8, if time allows)", least=1)
    keep: int = flag(0, "keep the last N of these checkpoints, as step-NUMBER.pt", least=0)
    eval_tokens: int | None = flag(None, "validation tokens per evaluation (up to 65536; --eval_only: all)", least=1)
    log_every: int = flag(10, "steps between rows of log.csv", least=1)
    device: str = flag("auto", "auto (cuda, then mps, then cpu) or a device's name")
    dtype: flags.Dtype = flag("auto", "precision of matrix products; --eval_only keeps weights stored in it")
    compile: bool = flag(False, "torch.compile the model")
    shard: bool = flag(False, "under torchrun: split each tensor over the processes")
    seed: int = flag(0, "for weights, batches, levels and masks", least=0, most=2**32)


# --- noise and loss ------------------------------------------------------------------------------


def draw_levels(level, B, n, generator):
    """Draw a noise level t in (0, 1] for each of n segments of B texts: (B, n). Segments are independent.

    Levels are stratified over the batch: spread evenly over (0, 1] with a random offset, so every batch covers the
    whole range. That lowers the variance of the loss and leaves its mean unchanged.
    """
    t = 1 - (torch.rand(1, n, generator=generator) + torch.arange(B)[:, None] / B) % 1
    shuffled = t[:, 1:].gather(0, torch.rand(B, n - 1, generator=generator).argsort(0))
    t = torch.cat((t[:, :1], shuffled), 1)  # the first stays in order, so micro-batches (every k-th text) cover all
    if level.kind == "bell":  # logit-normal: more middle levels, where there is most to learn (2605.13026)
        return torch.sigmoid(level.value * torch.special.ndtri(t.clamp(max=1 - 1e-6)))
    if level.kind == "grid":  # 1/N, 2/N, .. 1: the N steps of D3PM (2107.03006)
        return (t * level.value).ceil() / level.value
    return torch.full_like(t, level.value) if level.kind == "fixed" else t


def uniform_rates(t, x0):
    """The masking rate of each token at levels t (B, T), and its slope in t. `noise.rates_of` has others."""
    return t, 1.0


def corrupt(x0, rate, maskable, u, mask_id):
    """Mask each maskable token of x0 with probability `rate`. Return xt and holes, (B, T) each.

    u (B, T): uniform random numbers in [0, 1). A token becomes a hole if its u is below its rate.
    """
    holes = maskable & (u < rate)
    return x0.masked_fill(holes, mask_id), holes


def hole_weights(weight, rate, slope, holes, maskable):
    """The weight of each hole in the loss, (B, T).

    elbo: slope/rate (1/t where the rate is t), over the number of maskable tokens. For uniform levels the
    expected loss is then the bound in nats per token (2502.09992, eq. 3), and for grid:N it is D3PM's N-step bound.
    mean: the plain average over the holes of the batch. With --one_level this is about 1/t as well.
    """
    if weight == "elbo":
        return slope / (rate.clamp(min=1e-12) * maskable.sum().clamp(min=1))
    return torch.ones_like(rate) / holes.sum().clamp(min=1)


def loss_of(model, x0, xt, holes, weights):
    """The weighted cross-entropy of each text's holes, (B,), in nats; the weights normalise it.

    holes: (B, T) bool, or its nonzero indices, as `machine.send` copies it to a device.
    """
    logits = model(xt, where=holes, clean=x0)  # (N, V)
    loss = torch.zeros_like(weights)  # (B, T)
    loss[holes] = weights[holes] * kernels.cross_entropy(logits, x0[holes])
    return loss.sum(1)


def loss_with_drafts(model, x0, xt, holes, weights, K, first, frozen=False):
    """The mean of two losses of each text, (B,): of what a GPT appends, and of its drafts, in groups of K from `first`.

    The drafts of a frozen GPT (--freeze) learn its distribution instead of the true tokens, and nothing else learns.
    The other parameters are those of loss_of, but holes are indices.
    """
    T, (_, place) = x0.shape[1], holes
    n_drafted = (T - first) // K * K
    is_drafted = (place >= first) & (place < first + n_drafted)  # (N,)
    append, draft = model(xt, where=holes, clean=x0, drafts_from=first)  # (N, V) each
    if frozen:
        append = append.detach()
        drafts = kernels.soft_cross_entropy(draft, append)
    else:
        drafts = kernels.cross_entropy(draft, x0[holes])
    nats = kernels.cross_entropy(append, x0[holes]) + drafts * is_drafted * (T / n_drafted)
    loss = torch.zeros_like(weights)  # (B, T)
    loss[holes] = weights[holes] * nats / 2
    return loss.sum(1)


def loss_for(run):
    """The loss that a run trains with at its step. Over K steps, every position is the first of a group."""
    if not (K := run.model.config.draft_len):
        return loss_of
    return functools.partial(loss_with_drafts, K=K, first=run.step % K, frozen=run.config.freeze)


def which_maskable(x0, prompt_len, special_ids):
    """Mark the tokens of x0 (B, T) that may be masked: all but the first prompt_len (B, 1) and the special ones."""
    special = torch.isin(x0, torch.tensor(special_ids, dtype=x0.dtype))
    return ~special & (torch.arange(x0.shape[1]) >= prompt_len)


def draw_batch(split, config, generator, model_config, level=None, rates=uniform_rates):
    """Draw windows from a split and corrupt them: x0, xt, holes and weights, (B, T) each. level: config's by default.

    Each segment (a block, or else the text or each kind of token) has its own level. rates: like `uniform_rates`.
    """
    B, T, level = config.batch_size, config.context, level or config.level
    x0, own_prompt = corpus.random_windows(split, B, T, generator)  # (B, T); (B, 1): length of an example's own prompt
    lengths = torch.tensor(noise.segment_lengths(model_config, T, config.weight))
    shape = (1, 1) if config.one_level else (B, len(lengths))
    t = draw_levels(level, *shape, generator).expand(B, len(lengths)).repeat_interleave(lengths, 1)  # (B, T)
    prompt_len = torch.randint(config.prompt_len.low, config.prompt_len.high + 1, (B, 1), generator=generator)
    maskable = which_maskable(x0, own_prompt + prompt_len, model_config.special_ids)
    rate, slope = rates(t, x0)
    xt, holes = corrupt(x0, rate, maskable, torch.rand(B, T, generator=generator), model_config.mask_id)
    weights = hole_weights(config.weight, rate, slope, holes, maskable)
    if config.visible:  # from here on, holes are all trained positions
        xt, holes, weights = noise.with_visible(x0, xt, holes, maskable, config.visible, model_config, generator)
    return x0, xt, holes, weights


# --- the bound -----------------------------------------------------------------------------------
#
# The expected loss with weight elbo is the bound (NELBO). It is measured with other holes and weights, which have the
# same expectation and less variance. The bound of a text written in blocks is the sum of its blocks' bounds.
# A block of one token is always a hole here, so its bound is exact. Levels are stratified over STRATA texts at a time:
# enough to remove most variance, few enough to leave many groups for report.standard_error.

STRATA = 16


def exact_holes(x0, maskable, t, generator, K):
    """Draw holes at levels t, and their weights, without the variance of 1/t (2502.09992, eq. 6).

    In each block of K with M maskable tokens, k = ceil(tM) random ones are holes of weight M/k, for nats per text.
    """
    M = maskable.unflatten(1, (-1, K)).sum(2).repeat_interleave(K, 1)  # (B, T)
    keys = torch.rand(x0.shape, generator=generator).masked_fill(~maskable, torch.inf)
    place = keys.unflatten(1, (-1, K)).argsort(2).argsort(2).flatten(1)  # rank in a random order of its block
    k = (t * M).ceil()
    return maskable & (place < k), M / k.clamp(min=1)


def grid_holes(x0, maskable, t, generator, K):
    """Draw independent holes at levels of grid:N. The mean loss over t is the sum of D3PM's N steps (2107.03006)."""
    return maskable & (torch.rand(x0.shape, generator=generator) < t), 1 / t


@torch.no_grad()
def sequence_bounds(
    model, tokens, prompt_len=0, draws=1, batch_size=None, seed=0, level=UNIFORM, rate=flags.Rate("t"), strata=STRATA
):
    """Estimate the bound of texts (N, T) int64 without bias: nats (draws, N), and how many tokens are maskable (N,).

    It estimates E_t [ sum over holes of rate'(t)/rate(t) * -log p(x_i | xt) ], t uniform in (0, 1] (2406.07524), or,
    for grid:N, D3PM's bound, with t in 1/N .. 1. The same seed gives the same numbers.
    """
    (N, T), K = tokens.shape, model.config.block or tokens.shape[1]
    if T % K:
        raise ValueError(f"{T} tokens can't be cut into blocks of {K}; cut the text to a multiple")
    draw_holes = noise.bound_holes(level, rate, exact_holes, grid_holes)  # slant has its own; spindle uses t
    generator = torch.Generator().manual_seed(seed)
    sizes = [len(part) for part in tokens.split(strata)] * draws
    # Shuffled, because neighbours in a text are alike, and should not have neighbouring levels.
    t = [draw_levels(level, n, T // K, generator)[torch.randperm(n, generator=generator)] for n in sizes]
    t = torch.cat(t).repeat_interleave(K, 1)  # (draws * N, T)
    maskable = which_maskable(tokens, prompt_len, model.config.special_ids)  # (N, T)
    was_training, nats = model.training, []
    model.eval()
    for rows in torch.arange(draws * N).split(batch_size or kernels.rows_at_once(64, T, model.config.vocab_size)):
        x0, counted = tokens[rows % N], maskable[rows % N]  # (B, T)
        holes, weights = draw_holes(x0, counted, t[rows], generator, K)
        xt = x0.masked_fill(holes, model.config.mask_id)
        nats.append(processes.share_rows(loss_of, model, x0, xt, holes, weights))  # each process does some rows
    model.train(was_training)
    return torch.cat(nats).cpu().double().view(draws, N), maskable.sum(1)


def nelbo(model, tokens, **options):
    """Estimate the negative evidence lower bound of texts (N, T), in nats per token.

    With uniform levels it equals the mean negative log-likelihood over all orders of generation (2406.03736).
    """
    nats, n_maskable = sequence_bounds(model, tokens, **options)
    return (nats.mean(0).sum() / n_maskable.sum()).item()


# --- the loop ------------------------------------------------------------------------------------


def learning_rate(config, progress):
    """Rises linearly over the first `warmup` of the run, then falls linearly to 0."""
    rise = max(progress, 0.001) / config.warmup if progress < config.warmup else 1.0  # the first step moves, too
    return config.lr * min(1.0, rise, (1 - progress) / (1 - config.warmup))


def widened(config, progress):
    """The config's level; a bell starts as the middle level alone and widens over the first `widen` of the run."""
    if config.level.kind != "bell" or not config.widen:
        return config.level
    return config.level._replace(value=config.level.value * min(1.0, progress / config.widen))


def update(run, batch):
    """Take one optimizer step on a batch; return its loss in nats and the gradient's norm.

    Both are zero-dimensional tensors; calling .item() on them synchronises.
    """
    loss, lr = 0.0, learning_rate(run.config, run.progress())
    for x0, xt, holes, weights in run.micro_batches(batch):  # normalised over the batch, so parts just add
        with run.precision:
            part = loss_for(run)(run.network, x0, xt, holes, weights).sum()
        run.scaler.scale(part).backward()
        loss = loss + part.detach()
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    run.scaler.unscale_(run.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.config.grad_clip or torch.inf)
    run.scaler.step(run.optimizer)  # in float16 it skips a step whose gradient overflowed
    run.scaler.update()
    run.model.zero_grad()
    run.step += 1
    return loss, norm


def train(run, split, log, rates, signals):
    """Train until the run ends, or a signal (Ctrl-C, SIGTERM) is in the list `signals`."""
    config, stopped = run.config, False
    while not stopped and run.progress() < 1:
        level = widened(config, run.progress())
        loss, norm = update(run, draw_batch(split, config, run.generator, run.model.config, level, rates))
        stopped = run.tick(bool(signals))  # reads the clock; true if any process was told to stop
        nats = evaluate(run, *log.windows()) if run.evaluation_is_due() else None
        log.step(loss, norm, nats, stopped)
        if nats is not None:
            run.save(nats)
            log.evaluation(nats)


def evaluate(run, tokens, own_prompt):
    """The bound of windows (N, T) at uniform levels with the shortest prompts, in nats per token."""
    config = run.config
    with run.precision:
        return nelbo(
            run.model, tokens, prompt_len=own_prompt + config.prompt_len.low, seed=config.seed, rate=config.rate
        )


def main():
    given = flags.parse(TrainConfig, __doc__)
    # From scratch, model, tokenizer and checkpoint are None.
    config, model, tokenizer, checkpoint = train_settings.settle(given, TrainConfig, METHODS, load_checkpoint)
    train_settings.check_training(config)
    train_split, val_split, corpus_tokenizer, meta = corpus.load_corpus(config.data, config.context)
    torch.manual_seed(config.seed)
    shape = model.config if model else train_settings.model_config(Transformer.Config, config, corpus_tokenizer)
    train_settings.check_memory(config, shape, model, Transformer.Layer)
    model = model or Transformer(shape)
    config, chat = train_settings.with_corpus(config, given, model, tokenizer, corpus_tokenizer, meta, checkpoint)
    run = training.Run(config, model, meta=meta, tokenizer=corpus_tokenizer, template=chat)
    if config.eval_only:
        return report.print_bound(run, sequence_bounds, val_split, meta)
    rates = noise.rates_of(config.rate, uniform_rates, model.config, meta["occurrences"])
    with training.underway(run, checkpoint) as signals, report.Report(run, denoise, val_split, meta) as log:
        if config.compile:
            batch = draw_batch(train_split, config, torch.Generator(), model.config)
            run.compile_ahead(batch, loss_for(run), lambda: evaluate(run, *log.windows()), log.sample)
        train(run, train_split, log, rates, signals)


if __name__ == "__main__":
    processes.command(main)
