"""The state of a training run: its optimizers and random numbers, how far it is, and how it resumes."""

import functools
import math
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data.lib.checkpoint import save_checkpoint
from data.lib.corpus import SPLITS
from data.lib.errors import Mistake
from data.lib.fast import Muon
from data.lib.files import link
from data.lib.flags import as_plain
from data.lib.machine import autocast, send
from data.lib.processes import average, gathered, piece_of, rank, size, spread


class Run:
    """A training run at one step: all that `--init_from resume` needs to go on as if never stopped."""

    def __init__(self, config, model, device, meta=None, token_nats=None, template=None):
        """meta: that of the corpus; without one, epochs have no length. template: how the
        model chats (data/lib/chat.py).
        """
        self.config, self.model, self.device, self.token_nats = config, model, device, token_nats
        if config.grad_checkpoint:  # each layer is computed again for its gradient, and so not kept
            for layer in model.blocks:
                layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        self.network = spread(model, device, config.shard)  # what a step calls
        self.max_iters = config.max_iters or math.inf
        if config.epochs:
            steps = config.epochs * meta["train"]["tokens"] / (config.batch_size * config.block_size)
            self.max_iters = min(self.max_iters, math.ceil(min(steps, 2**53)))
        self.precision = autocast(device, config.dtype)
        self.optimizers = make_optimizers(model, config, self.precision.fast_dtype)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision.fast_dtype == torch.float16)
        self.generator = torch.Generator().manual_seed(config.seed)  # of batches, levels and holes
        self.corpus = [meta[split].get("sha256") for split in SPLITS] if meta else []
        if meta and "chat" in meta:
            self.corpus += [meta[split]["rows_sha256"] for split in SPLITS]
        self.template = template
        self.step, self.minutes, self.best = 0, 0.0, math.inf
        # Of the bound that its noise trains for, whose lowest value, best, chooses ckpt.pt.
        self.bound_flags = {"prompt_len": config.prompt_len.low, "slant": config.slant}

    def state(self):
        return {
            "train": as_plain(self.config),
            "optimizers": [with_state(optimizer.state_dict(), gathered) for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "random": {"batches": self.generator.get_state()},
            "bound": self.bound_flags,
            "corpus": self.corpus,
            **({"chat": self.template} if self.template else {}),
            **{name: getattr(self, name) for name in ("step", "minutes", "best", "token_nats")},
        }

    def restore(self, state):
        """Go on from state; Mistake where that run cannot, or has come to its end."""
        if state.get("corpus", self.corpus) != self.corpus:
            raise Mistake(
                f"--init_from resume: data/{self.config.data} has another text than when this run began; "
                "prepare that again, or give the checkpoint's path, to take its model elsewhere"
            )
        try:
            self.load(state)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise Mistake(f"--init_from resume: not with these flags ({str(error)[:200]})") from None
        if self.progress() >= 1:
            raise Mistake(
                "--init_from resume: that run is complete; a larger --max_minutes, --max_iters or --epochs, "
                "counted from its first step, goes on"
            )

    def load(self, state):
        for optimizer, saved in zip(self.optimizers, state["optimizers"]):
            groups = optimizer.state_dict()["param_groups"]  # what the flags say, whatever was
            if [len(g["params"]) for g in groups] != [len(g["params"]) for g in saved["param_groups"]]:
                raise ValueError("another optimizer had them")
            saved = {"state": saved["state"], "param_groups": groups}
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            for i, kept in saved["state"].items():
                shape = dict.fromkeys(kept, parameters[i].shape) | {"step": ()}
                if any(tensor.shape != shape[name] for name, tensor in kept.items()):
                    raise ValueError("an optimizer's state is not of its parameter's shape")
            optimizer.load_state_dict(with_state(saved, piece_of, parameters))
        self.scaler.load_state_dict(state["scaler"])
        self.generator.set_state(state["random"]["batches"])
        self.step, self.minutes, best = int(state["step"]), float(state["minutes"]), float(state["best"])
        if not (0 <= self.step < 2**63 and self.minutes >= 0 and best >= 0):
            raise ValueError("its step, minutes or bound cannot be")
        earlier = {"prompt_len": 0, "slant": 0.0}  # what versions chose by that did not say
        if self.bound_flags == state.get("bound", earlier):
            self.best = best

    def save(self, tokenizer, nats=math.inf):
        """Write last.pt, and ckpt.pt if there is none, or if nats, the bound per token, is the lowest. Before
        the end a disk that takes no more is no error: it is said, and the run goes on.
        """
        folder = Path(self.config.out_dir)
        last, best = folder / "last.pt", nats < self.best or not (folder / "ckpt.pt").exists()
        before, self.best = self.best, float(nats) if best else self.best
        state = self.state()
        try:
            save_checkpoint(last, self.model, tokenizer, **state)
        except OSError as error:
            self.best = before
            if nats == math.inf or self.progress() >= 1:  # the run is over
                raise
            kept = "the earlier one stays" if last.exists() else "there is none yet"
            sentence = f"step {self.step}: no checkpoint ({error.strerror or error}); {kept}"
            tqdm.write(f"{sentence}, and the next evaluation tries again", file=sys.stderr)
            return
        if rank() == 0:
            if best:
                link(last, folder / "ckpt.pt")
            if self.config.keep:
                link(last, folder / f"step-{self.step:08}.pt")
                for old in sorted(folder.glob("step-*.pt"))[: -self.config.keep]:
                    old.unlink()

    def end(self, came, script):
        """Unless the run is complete, end the process with the code of a signal that came, or else of Ctrl-C;
        stderr says how it goes on.
        """
        if self.progress() >= 1:
            return
        if rank() == 0:
            again = f"python {script} --out_dir {self.config.out_dir} --init_from resume"
            print(f"stopped at step {self.step}; `{again}` goes on from there", file=sys.stderr)
        sys.exit(128 + (came or [signal.SIGINT])[0])

    def pieces(self, batch):
        """This process's pieces of a batch, tensors of B rows, one after the other on the device; each has
        levels from all of (0, 1]. Weights are `size` times those of the batch, since gradients become means
        over the processes.
        """
        # Dropout depends on the seed, the step and the process alone, and so it resumes.
        seed = np.random.SeedSequence([self.config.seed, self.step, rank()])
        torch.manual_seed(seed.generate_state(1).item())
        n = self.config.grad_accum
        for i in range(n):
            average(self.network, i == n - 1)
            rows = slice(i * size() + rank(), None, n * size())
            x0, xt, holes, weights = (tensor[rows] for tensor in batch)
            piece = send(self.device, x0, xt, holes, weights * size())
            if self.config.compile:  # the number of holes changes from step to step: it is not compiled in
                for index in piece[2]:
                    torch._dynamo.maybe_mark_dynamic(index, 0)
            yield piece

    def progress(self):
        """How far the run is, in [0, 1], by the limit that will end it: steps or minutes."""
        by_steps = self.step / self.max_iters
        default = 10 if self.max_iters == math.inf else math.inf
        by_minutes = self.minutes / (self.config.max_minutes or default)
        return min(1.0, max(by_steps, by_minutes))

    def opened(self):
        """While a causal model becomes a canvas: the share of what it hides that is seen (2410.17891)."""
        share = self.step / max(1, self.config.open_steps)
        return torch.tensor(share) if share < 1 and self.config.open_steps else None

    def level(self):
        """The config's level; a bell widens from the middle level, over the share `widen` of the run."""
        level, widen = self.config.level, self.config.widen
        share = min(1.0, self.progress() / widen) if widen else 1.0
        return level._replace(value=level.value * share) if level.kind == "bell" else level

    def learning_rate(self):
        """Rises over the first `warmup` of the run, then falls to 0 at its end, both linearly."""
        warmup, progress = self.config.warmup, self.progress()
        rise = max(progress, 0.001) / warmup if progress < warmup else 1.0  # the first step moves, too
        return self.config.lr * min(1.0, rise, (1 - progress) / (1 - warmup))


def with_state(saved, function, parameters=None):
    """An optimizer's state_dict with function(tensor), or function(tensor, parameter), for each tensor."""
    state = {
        i: {name: function(tensor, *([parameters[i]] if parameters else [])) for name, tensor in kept.items()}
        for i, kept in saved["state"].items()
    }
    return {**saved, "state": state}


def make_optimizers(model, config, dtype):
    """Muon on the blocks' matrices and AdamW on the rest, or AdamW on all."""
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2 and config.optimizer == "muon"]
    chosen = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    groups = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, config.beta2), fused=True)]
    if matrices:
        optimizers += [Muon(matrices, config.lr, config.weight_decay, dtype)]
    return optimizers
