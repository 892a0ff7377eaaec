"""What makes a canvas better in as few forward passes? Compares orders, a causal last layer that verifies, and ReMDM.

OMP_NUM_THREADS=1 python tests/experiments/passes.py     # 50 minutes of one core, 21 of them for the models

The causal layer is that of self-speculative masked diffusion (2510.03929): the network drafts all holes at once, and
one more layer reads the drafts in a random order of the holes. Its prediction of a hole knows the drafts before it, so
a prefix of the drafts can be accepted or corrected as in speculative sampling (2211.17192).
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from common import BYTES, bound, main, pair_entropy, train_model, windows

from data.lib import kernels
from data.lib.corpus import load_corpus
from data.lib.flags import from_plain
from data.lib.machine import autocast
from data.lib.training import Run
from model import MLP, Attention, Transformer, load_checkpoint, rotary_angles, rotate
from sample import denoise
from train import TrainConfig, draw_batch, learning_rate, widened

PASSES = (8, 16, 32, 64)
NEIGHBOURS = (-2, -1, 1, 2)

# --- the causal layer ----------------------------------------------------------------------------


class Verifier(nn.Module):
    """A layer that corrects each place's vector by the tokens before it in an order of the places.

    The query belongs to the place that is predicted, and is rotated by it; keys and values belong to tokens, which have
    their own places. So the permutation is only a mask, and no token has to move. All outputs start at 0, when the
    target equals the draft.
    """

    def __init__(self, config):
        super().__init__()
        C = config.n_embd
        self.near = nn.Linear(len(NEIGHBOURS) * C, C, bias=False)  # in place of a layer's convolution
        self.query_norm, self.key_norm, self.mlp_norm = (nn.LayerNorm(C, bias=False) for _ in range(3))
        self.attention, self.mlp = Attention(config), MLP(config)
        for linear in (self.near, self.attention.out, self.mlp.down):
            nn.init.zeros_(linear.weight)

    def forward(self, x, embedded, rank):
        """Vectors like x (B, T, C), given the embeddings of all tokens, set or drafted, and their ranks (B, T)."""
        T, a, content = x.shape[1], self.attention, self.key_norm(x) + embedded
        width = max(NEIGHBOURS)
        padded, ranks = F.pad(embedded, (0, 0, width, width)), F.pad(rank, (width, width), value=T)
        places = [slice(width + offset, width + offset + T) for offset in NEIGHBOURS]
        near = [padded[:, place] * (ranks[:, place] < rank)[..., None] for place in places]
        y = x + self.near(torch.cat(near, -1))
        q, k, v = a.query(self.query_norm(y)), a.key(content), a.value(content)
        q, k, v = (z.unflatten(2, (-1, a.head_dim)) for z in (q, k, v))  # (B, T, H, D)
        angles = rotary_angles(torch.arange(T, device=x.device), a.head_dim)
        q, k = (rotate(norm(z).type_as(v), *angles) for norm, z in ((a.query_norm, q), (a.key_norm, k)))
        # One more key, of zeros, for the place that comes first and sees nothing.
        k, v = (F.pad(z, (0, 0, 0, 0, 0, 1)) for z in (k, v))
        sees = F.pad(rank[:, :, None] > rank[:, None], (0, 1), value=True)[:, None]  # (B, 1, T, T + 1)
        z = kernels.attend(*(z.transpose(1, 2) for z in (q, k, v)), a.dropout, sees)
        y = y + a.out(z.transpose(1, 2).flatten(2))
        return y + self.mlp(self.mlp_norm(y))


class SelfSpeculative(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config, self.drafter, self.verifier = config, Transformer(config), Verifier(config)
        self.layers = nn.ModuleList((*self.drafter.layers, self.verifier))  # the optimizer looks for matrices here

    def draft(self, canvas):
        """Vectors (B, T, C), and logits (B, T, V) that know the tokens set, as in any canvas model."""
        return draft(self.drafter, canvas)

    def verify(self, x, tokens, rank):
        """Logits (B, T, V) that also know the drafted tokens of lower rank. tokens, rank: (B, T)."""
        y = self.verifier(x, self.drafter.token_embedding(tokens), rank)
        return self.drafter.unembed(y, torch.arange(tokens.shape[1], device=y.device))


def draft(model, canvas):
    places = torch.arange(canvas.shape[1], device=canvas.device)
    x = model.run(canvas, canvas[:, :0], places[:0], canvas.shape[1])
    return x, model.unembed(x, places)


def random_ranks(holes, noise):
    """Each place's rank in a random order, (B, T): first the tokens that are set, then the holes."""
    return (noise + holes).argsort(1).argsort(1)


def losses(model, x0, xt, holes, weights):
    """Cross-entropies of the drafts and of the target, (2,), in nats; the weights normalise them."""
    x, logits = model.draft(xt)
    target = model.verify(x, x0, random_ranks(holes, torch.rand(holes.shape)))
    both = [kernels.cross_entropy(z.flatten(0, 1), x0.flatten()).view_as(weights) for z in (logits, target)]
    return (torch.stack(both) * weights * holes).sum((1, 2))


def train_causal(config, path, device):
    """The model with a causal layer, trained as long and on the same batches as the plain model of this checkpoint."""
    plain, _, checkpoint = load_checkpoint(path, device)
    settings, kept = from_plain(TrainConfig, checkpoint["train"]), path.with_name("causal.pt")
    torch.manual_seed(settings.seed)
    model = SelfSpeculative(plain.config).to(device)
    if kept.exists():
        model.load_state_dict(torch.load(kept, weights_only=True))
        return model.eval()
    run, (split, *_) = Run(settings, model, device), load_corpus(settings.data, settings.context)
    while run.progress() < 1:
        batch = draw_batch(split, settings, run.generator, model.config, widened(settings, run.progress()))
        with run.precision:
            loss = losses(model, *(tensor.to(device) for tensor in batch))
        loss.sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip)
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(settings, run.progress())
        run.optimizer.step()
        model.zero_grad()
        run.step += 1
        if run.step % 100 == 0:
            print(f"step {run.step}: draft {loss[0]:.3f}, target {loss[1]:.3f}, {run.clock():.1f} min", flush=True)
    torch.save(model.state_dict(), kept)
    return model.eval()


# --- writing -------------------------------------------------------------------------------------


def draw(p, generator):
    """One token for each row of probabilities (.., V), which need not be normalised: (..)."""
    return p.flatten(0, -2).multinomial(1, generator=generator).view(p.shape[:-1])


def cosine_window(n_set, T, steps):
    """How many tokens are set after one more step of a cosine schedule, (B, 1): few at first, many at the end."""
    time = (1 - n_set / T).acos() * 2 / math.pi + 1 / steps
    return (T - T * (time.clamp(max=1) * math.pi / 2).cos()).round().long().maximum(n_set + 1)


@torch.no_grad()
def speculate(model, canvas, steps, loops, seed=0, window=cosine_window):
    """Fill canvas (B, T): it, how many passes each text took, and how many readings of the causal layer, (B,) each.

    A pass drafts all holes and sets at most as many as the window allows. Up to `loops` times the causal layer
    verifies them: it accepts a prefix of those that are left and corrects the next one. loops = 0: accept all drafts.
    """
    (B, T), generator, mask_id = canvas.shape, torch.Generator().manual_seed(seed), model.config.mask_id
    passes, readings = torch.zeros(2, B)
    while (holes := canvas == mask_id).any():
        x, logits = model.draft(canvas)
        q = logits.double().softmax(-1)  # (B, T, V)
        tokens = torch.where(holes, draw(q, generator), canvas)
        rank, n_set = random_ranks(holes, torch.rand(B, T, generator=generator)), T - holes.sum(1, keepdim=True)
        end = window(n_set, T, steps)  # (B, 1)
        certain = n_set if loops else end  # tokens with a rank below this are final
        passes += holes.any(1)
        for _ in range(loops):
            waiting = (rank >= certain) & (rank < end)
            if not waiting.any():
                break
            readings += waiting.any(1)
            p = model.verify(x, tokens, rank).double().softmax(-1)
            ratio = (p / q).gather(2, tokens[..., None]).squeeze(2)
            accepted = torch.rand(B, T, generator=generator) < ratio
            first = rank.masked_fill(accepted | ~waiting, T).amin(1, keepdim=True)  # the first that is rejected
            wrong = rank == first
            if wrong.any():
                tokens[wrong] = draw((p - q)[wrong].clamp(min=0), generator)
            certain = end.minimum(first + 1)
        canvas = torch.where(rank < certain, tokens, mask_id)
    return canvas, passes, readings


def remdm_levels(kind, eta, t, s):
    """ReMDM (2503.00307): alpha, the share of tokens that are set, at times t > s, and the probability of a remask."""
    on, off, alpha_on = 0.55, 0.05, 0.9  # its loop: write most of it, then only remask for a while, then finish

    def alpha(t):
        if kind != "loop":
            return 1 - t
        return max(min((1 - t) * alpha_on / (1 - on), alpha_on), 1 - t * (1 - alpha_on) / off)

    most = min(1, (1 - alpha(s)) / max(alpha(t), 1e-9))
    sigma = {"cap": min(eta, most), "rescale": eta * most, "loop": min(eta, most) if off < t <= on else 0}[kind]
    return alpha(t), alpha(s), sigma


@torch.no_grad()
def remask(model, canvas, steps, kind, eta, seed=0):
    """Fill canvas (B, T) by ReMDM's sampler: each step also masks some of the tokens again. Returns as `speculate`."""
    generator, mask_id = torch.Generator().manual_seed(seed), model.config.mask_id
    for step in range(steps):
        now, after, sigma = remdm_levels(kind, eta, 1 - step / steps, 1 - (step + 1) / steps)
        holes, u = canvas == mask_id, torch.rand(canvas.shape, generator=generator)
        tokens = draw(draft(model, canvas)[1].double().softmax(-1), generator)
        canvas = torch.where(holes & (u < (after - (1 - sigma) * now) / (1 - now)), tokens, canvas)
        canvas = torch.where(~holes & (u < sigma), mask_id, canvas)
    return canvas, torch.full((len(canvas),), float(steps)), torch.zeros(len(canvas))


@torch.no_grad()
def in_order(model, canvas, seed=0, **flags):
    """Fill canvas (B, T) by an order of sample.py. Returns as `speculate`."""
    passes = torch.zeros(len(canvas))
    for after in denoise(model, canvas, seeds=range(seed * len(canvas), (seed + 1) * len(canvas)), **flags):
        passes += (canvas == model.config.mask_id).any(1)
        canvas = after
    return canvas, passes, torch.zeros(len(canvas))


# --- the table -----------------------------------------------------------------------------------


def passes(config, device):
    path = train_model(config, "out-passes", "--max_iters 1500")
    plain, _, _ = load_checkpoint(path, device)
    judge, _, _ = load_checkpoint(train_model(config, "out-passes-judge", "--max_iters 2250 --seed 1"), device)
    causal, n, T = train_causal(config, path, device), config.texts, plain.config.context
    drafter = SelfSpeculative(plain.config).to(device).eval()  # never asked to verify
    drafter.drafter = plain
    rows = {  # a function that writes, its model, and its settings for about 8, 16, 32 and 64 passes
        "`random`": (in_order, plain, [{"order": "random", "steps": steps} for steps in PASSES]),
        "`random`, cosine steps": (speculate, drafter, [{"steps": steps, "loops": 0} for steps in PASSES]),
        "`confidence`": (in_order, plain, [{"order": "confidence", "steps": steps} for steps in PASSES]),
        "`entropy-bound`": (in_order, plain, [{"order": "entropy-bound", "gamma": gamma} for gamma in (85, 40, 17, 7)]),
        "self-speculative": (speculate, causal, [{"steps": steps, "loops": T} for steps in PASSES]),
        "the same, one reading per pass": (speculate, causal, [{"steps": 32, "loops": 1}]),
        "the same, drafts alone": (speculate, causal, [{"steps": steps, "loops": 0} for steps in PASSES]),
    }
    for kind, eta in ("cap", 0.04), ("rescale", 0.05), ("loop", 0.02):  # the values of ReMDM's own code
        settings = [{"steps": steps, "kind": kind, "eta": eta} for steps in PASSES]
        rows[f"ReMDM {kind}, eta {eta}"] = (remask, plain, settings)

    def cell(texts, counts):
        """The judge's nats with their standard deviation over the seeds, bits per pair, and passes (+ readings)."""
        nats = torch.tensor([bound(judge, text, draws=16) for text in texts])
        bits = sum(map(pair_entropy, texts)) / len(texts)
        counts = " + ".join(f"{count:.0f}" for count in torch.tensor(counts).mean(0) if count)
        print(f" {nats.mean():.2f} ({nats.std(correction=0):.2f}), {bits:.1f}, {counts} |", end="", flush=True)

    print("| text of the corpus |", end="")
    cell(windows(BYTES, T, config.seeds * n * T).split(n), [[]])
    for name, (function, model, settings) in rows.items():
        print(f"\n| {name} |", end="")
        for flags in settings:
            results = []
            for seed in range(config.seeds):
                with autocast(device):
                    texts, *counts = function(model, torch.full((n, T), plain.config.mask_id), seed=seed, **flags)
                results.append((texts, [count.mean() for count in counts]))
            cell(*zip(*results))
    print()


if __name__ == "__main__":
    main(passes, texts=32, seeds=3)
