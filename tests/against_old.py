"""Compares this code with that of an earlier commit, until the rewrite between them is done.

git archive d41f12d | tar -x -C DIR && python tests/against_old.py DIR [CASES]
"""

import functools
import importlib
import random
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))


def modules_of(folder):
    """Its model, sample and train, imported beside those of another folder."""
    for name in [n for n in sys.modules if n.split(".")[0] in ("model", "sample", "train", "data", "toys")]:
        del sys.modules[name]
    sys.path.insert(0, str(folder))
    found = [importlib.import_module(name) for name in ("model", "sample", "train")]
    sys.path.remove(str(folder))
    return found


folder = Path(sys.argv[1])
old_model, old_sample, old_train = modules_of(folder)
new_model, new_sample, new_train = modules_of(ROOT)
cases = int(sys.argv[2]) if len(sys.argv) > 2 else 300
choose = random.Random(0)


def pair_of_models(V, T, **config):
    """The same random weights in both."""
    torch.manual_seed(choose.randrange(10**6))
    config = {"n_layer": 2, "n_head": 2, "n_embd": 16, "conv": choose.choice([0, 3]), **config}
    old = old_model.Transformer(old_model.ModelConfig(vocab_size=V + 1, mask_id=V, block_size=T, **config))
    for p in old.parameters():
        torch.nn.init.normal_(p, std=0.5)
    new = new_model.Transformer(new_model.ModelConfig(vocab_size=V + 1, mask_id=V, block_size=T, **config))
    weights = {
        name.replace("norm.", "final_norm.", 1) if name.startswith("norm.") else name: w
        for name, w in old.state_dict().items()
    }
    if config.get("norm") == "post":
        weights = {name.replace("final_norm", "embedding_norm"): w for name, w in weights.items()}
    new.load_state_dict(weights)
    assert [p.shape for p in old.parameters()] == [p.shape for p in new.parameters()]
    return old.eval(), new.eval()


def counting(model):
    passes = []
    model.register_forward_hook(lambda module, inputs, logits: passes.append(1))
    return passes


# --- denoise -------------------------------------------------------------------------------------

differ = 0
for case in range(cases):
    V, W = choose.choice([4, 7, 1100]), choose.choice([5, 8, 16])
    T, B = choose.choice([3, 8, 16, 21]), choose.choice([1, 2, 5])
    special = (0, V) if choose.random() < 0.3 else ()
    old, new = pair_of_models(V, W, special_ids=special, position=choose.choice(["rope", "learned"]))
    canvas = torch.randint(0, V, (B, T))
    canvas[torch.rand(B, T) < choose.choice([0.3, 0.8, 1.1])] = V
    order = choose.choice(new_sample.ORDERS)
    flags = {
        "steps": choose.choice([None, 1, 3, 8, 30]), "order": order,
        "temperature": choose.choice([0.0, 0.7, 1.0]), "top_k": choose.choice([0, 0, 3]),
        "top_p": choose.choice([1.0, 1.0, 0.8]), "seeds": [choose.randrange(99) for _ in range(B)],
        "tau": choose.choice([0.3, 0.6, 1.0]), "block_len": choose.choice([None, None, 1, 3, min(4, W)]),
        "revise": 0.0 if order == "remask" else choose.choice([0.0, 0.0, 0.3]),
        "guidance": choose.choice([0.0, 0.0, 1.5]),
        "token_nats": torch.arange(1.0, V + 2),
    }  # fmt: skip
    text = torch.randint(1, V, (B, T)) if choose.random() < 0.3 else None
    probability = torch.ones(B, T)
    old_passes, new_passes = counting(old), counting(new)
    theirs = list(old_sample.denoise(old, canvas, text=text, probability=probability, **flags))
    flags = dict(flags)
    drawn = {name: flags.pop(name) for name in ("temperature", "top_k", "top_p")}
    take = functools.partial(new_sample.draw, **drawn)
    if text is not None:
        take = functools.partial(new_sample.read, text)
    take = new_sample.Recorded(take, canvas)
    ours = list(new_sample.denoise(new, canvas, take=take, **flags))
    same = len(ours) == len(theirs) and all(a.equal(b) for a, b in zip(ours, theirs))
    same &= len(old_passes) == len(new_passes)
    same &= torch.allclose(take.log_p.exp(), probability, rtol=1e-4, atol=1e-6)
    if not same:
        differ += 1
        print(
            "denoise differs",
            flags,
            canvas.shape,
            V,
            W,
            len(ours),
            len(theirs),
            len(old_passes),
            len(new_passes),
        )
print(f"denoise: {cases} random settings, {differ} differ")

# --- a step of training --------------------------------------------------------------------------

ROWS = [
    {"level": "0.15"}, {"level": "grid:10", "one_level": True}, {"level": "grid:100", "weight": "elbo"},
    {"level": "uniform", "weight": "elbo"}, {"level": "uniform"}, {"level": "bell:1.2"},
    {"level": "uniform", "slant": 1.0, "weight": "elbo"}, {"level": "uniform", "slant": 0.7},
    {"level": "uniform", "spindle": 0.3}, {"level": "bell:0.8", "one_level": True},
]  # fmt: skip


def parsed(flags):
    read = {
        "level": sys.modules["data.run.flags"].Level.from_text,
        "prompt_len": sys.modules["data.run.flags"].Span.from_text,
    }
    return {name: read[name](value) if name in read else value for name, value in flags.items()}


import numpy as np

largest, count = 0.0, 0
for row in ROWS:
    for prompt_len in ("0", "0:16", "5"):
        for optimizer in ("adamw", "muon"):
            for dtype in ("float32", "bfloat16"):
                flags = {**row, "prompt_len": prompt_len, "optimizer": optimizer, "dtype": dtype, "block_size": 32,
                         "batch_size": 8, "max_iters": 50, "seed": choose.randrange(99), "warmup": 0.0}  # fmt: skip
                old, new = pair_of_models(20, 32, special_ids=choose.choice([(), (3, 20)]))
                corpus = np.random.default_rng(0).integers(0, 20, 5000).astype(np.uint16)
                nats = torch.rand(21) + 1
                a = old_train.Run(old_train.TrainConfig(**flags), old.train(), torch.device("cpu"), 0, nats)
                b = sys.modules["data.run.training"].Run(
                    new_train.TrainConfig(**parsed(flags)), new.train(), torch.device("cpu"), 0, nats
                )
                a.model.zero_grad = b.model.zero_grad = lambda **_: None
                for step in range(2):
                    batch = old_train.draw_batch(corpus, a.config, a.generator, old.config.special_ids, nats)
                    x0, xt, holes, weights = new_train.draw_batch(
                        corpus, b.config, b.generator, new.config, nats
                    )
                    assert x0.equal(batch[0]) and holes.equal(batch[1])
                    assert torch.allclose(weights.expand_as(x0), batch[2].expand_as(x0), rtol=1e-6)
                    if dtype == "bfloat16" or optimizer == "muon":  # its products are not those of torch's
                        if step:
                            break
                    loss, norm = a.update(batch)
                    ours, our_norm = next(new_train.train(b, [(x0, xt, holes, weights)]))
                    gradients = [torch.cat([p.grad.flatten() for p in m.parameters()]) for m in (old, new)]
                    error = max(
                        abs(loss - ours) / loss,
                        ((gradients[0] - gradients[1]).norm() / gradients[0].norm()).item(),
                    )
                    largest, count = max(largest, error), count + 1
                    for p in (*old.parameters(), *new.parameters()):
                        p.grad.zero_()
                if optimizer == "adamw" and dtype == "float32":
                    for p, q in zip(old.parameters(), new.parameters()):
                        assert torch.allclose(p, q, atol=1e-6), (p - q).abs().max()
print(f"training: {count} steps, largest relative difference of loss and gradient {largest:.1e}")

# --- the bound -----------------------------------------------------------------------------------

largest, count = 0.0, 0
for case in range(30):
    old, new = pair_of_models(6, 12, special_ids=choose.choice([(), (2, 6)]))
    tokens = torch.randint(0, 6, (choose.choice([1, 7, 40]), 12))
    flags = {"prompt_len": choose.choice([0, 3]), "draws": choose.choice([2, 5]), "seed": case,
             "batch_size": choose.choice([8, 64])}  # fmt: skip
    for more in ({}, {"slant": 0.8}, {"level": "grid:7"}):
        theirs = old_train.sequence_bounds(old, tokens, **flags, **more)
        bound = new_train.nelbo(new, tokens, **flags, **parsed(more))
        mean = old_train.mean_nats(*theirs)
        error = abs(old_train.standard_error(*theirs) / bound.error - 1)
        largest, count = max(largest, abs(bound / mean - 1), error), count + 1
print(f"bound: {count} settings, largest relative difference of it and its error {largest:.1e}")
