"""Masking rates other than t, the bound under a slanted rate, and the loss at visible tokens.

rates(t, x0) returns each token's masking rate and its slope in t, which `corrupt` and `hole_weights` of train.py take.
"""

import functools

import numpy as np
import torch


def segment_lengths(model_config, T, weight):
    """Lengths of the segments of T tokens that have a noise level each: the blocks, or the whole text.

    On a canvas of several kinds of tokens each kind has its own level, so the holes decide the task (2303.06555). The
    elbo weight needs one level for all.
    """
    if model_config.kinds and not model_config.block and weight == "mean":
        return [n for n, _, _ in model_config.kinds]
    K = model_config.block or T
    return [K] * (T // K)


def rates_of(rate, uniform_rates, model_config, occurrences=None):
    """The function rates(t, x0) -> (rate, slope), (B, T) each, of a Rate. occurrences: of each token in the corpus.

    slant:W masks the right end of each block first, so it is written last (AR-Diffusion's idea, 2305.09515).
    spindle:W masks informative tokens first (DiffusionBERT, 2211.15029). It has no bound, so its slope is just 1.
    """
    token_nats = unigram_nats(occurrences) if rate.kind == "spindle" else None

    def slanted(t, x0):
        r = slanted_rate(t, rate.value, model_config.block or x0.shape[1], x0.shape[1])
        return r, (1 + rate.value) * (r < 1)  # a rate clipped at 1 no longer rises

    def spindled(t, x0):
        K = model_config.block or x0.shape[1]
        information = relative_information(x0.unflatten(1, (-1, K)), token_nats).flatten(1)  # (B, T)
        return (t + rate.value * torch.sin(torch.pi * t) * information).clamp(0, 1), 1.0

    return {"t": uniform_rates, "slant": slanted, "spindle": spindled}[rate.kind]


def slanted_rate(t, slant, K, T):
    """clip(t (1 + w) - w (1 - i / (K - 1)), 0, 1) for token i of each block of K, at levels t (B, T)."""
    return (t * (1 + slant) - slant * (1 - torch.linspace(0, 1, K).repeat(T // K))).clamp(0, 1)


def relative_information(x0, token_nats):
    """1 - mean_j(I_j) / I_i for each token i of x0 (.., T), where I is token_nats (V,) (2211.15029)."""
    nats = token_nats[x0]
    return 1 - nats.mean(-1, keepdim=True) / nats


def unigram_nats(occurrences):
    """-log of each token's fraction of a text, in nats, (V,) float32. Each counts once more, so all are finite."""
    smoothed = np.array(occurrences) + 1.0
    return torch.from_numpy(-np.log(smoothed / smoothed.sum()).astype(np.float32))


def bound_holes(level, rate, exact_holes, grid_holes):
    """Choose how `sequence_bounds` of train.py draws holes and weights. ValueError if the level has no bound.

    spindle:W has no bound of its own, so it gets that of uniform rates.
    """
    slanted = rate.kind == "slant"
    if level.kind not in ("uniform", "grid") or (slanted and level.kind == "grid"):
        raise ValueError(f"level {level}, rate {rate}: only uniform levels and, with rate t, grid:N have a bound")
    if slanted:
        return functools.partial(slanted_holes, slant=rate.value)
    return grid_holes if level.kind == "grid" else exact_holes


def slanted_holes(x0, maskable, t, generator, K, slant):
    """`exact_holes` of train.py for the rates of slant:W.

    Token i is masked at level s_i = (u_i + w (1 - i/(K-1))) / (1 + w), where its rate rises above u_i. The first
    k = ceil(tM) that are masked become holes. If the last of them is masked at level s,
        P(i is the last | the k holes) is proportional to r_i'(s) / r_i(s), and weight_i = M P(i is the last).
    The expected loss is that of weights rate'/rate, but no weight exceeds M.
    """
    shape = x0.shape
    x0, maskable, t = (y.reshape(-1, K) for y in (x0, maskable, t))
    M = maskable.sum(1, keepdim=True)
    delay = slant * (1 - torch.linspace(0, 1, K))
    masked_at = (torch.rand(x0.shape, generator=generator) + delay) / (1 + slant)  # (B * T/K, K)
    place = masked_at.masked_fill(~maskable, torch.inf).argsort(1).argsort(1)  # 0 is masked first
    holes = place < (t * M).ceil()
    last = masked_at.masked_fill(~holes, 0).amax(1, keepdim=True)  # (B * T/K, 1)
    rates = slanted_rate(last, slant, K, K)
    # A rate that reached 1 earlier doesn't rise at s. The last hole itself must not be lost to rounding.
    odds = holes * ((rates < 1) | (masked_at == last)) / rates.clamp(min=1e-12)
    weights = M * odds / odds.sum(1, keepdim=True).clamp(min=1e-12)
    return holes.view(shape), weights.view(shape)


def with_visible(x0, xt, holes, maskable, fraction, model_config, generator):
    """Also train on a fraction of the visible tokens, half of them randomised, as BERT does (1810.04805).

    Otherwise a network learns nothing about tokens that it sees, and `--order remask` spoils them when it rewrites
    them. Returns xt, the trained positions, and their weights.
    """
    u = torch.rand(x0.shape, generator=generator)
    words = random_tokens(*x0.shape, model_config, generator)
    visible = maskable & ~holes & (u < fraction)
    trained = holes | visible
    weights = torch.full(x0.shape, 1 / max(1, trained.sum().item()))
    return torch.where(visible & (u < fraction / 2), words, xt), trained, weights


def random_tokens(B, T, model_config, generator):
    """Tokens (B, T), each drawn uniformly from those that may stand at its place."""
    special = torch.tensor([model_config.mask_id, *model_config.special_ids])
    places = []
    for n, first, end in model_config.kinds or ((T, 0, model_config.vocab_size),):
        ids = torch.arange(first, end)
        ids = ids[torch.isin(ids, special, invert=True)]
        places.append(ids[torch.randint(len(ids), (B, n), generator=generator)])
    return torch.cat(places, 1)
