"""A training run: its optimizers, random numbers and clock, and how it is saved, stopped and resumed."""

import functools
import math
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from data.lib.checkpoint import save_checkpoint
from data.lib.corpus import SPLITS
from data.lib.errors import Mistake, signals
from data.lib.files import alone_in, link
from data.lib.flags import as_plain
from data.lib.machine import autocast, pick_device, send
from data.lib.optimizer import Optimizers
from data.lib.processes import agree, distribute, full, rank, synchronise_gradients, world_size


class Run:
    """A training run at one step, with everything that resuming needs to continue as if it had never stopped.

    meta: that of the corpus; epochs need it. template: how the model chats.
    """

    def __init__(self, config, model, device=None, meta=None, tokenizer=None, template=None):
        self.device = device = device or pick_device(config.device)
        self.config, self.model, self.tokenizer, self.template = config, model, tokenizer, template
        if config.grad_checkpoint:
            for layer in model.layers:
                layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        self.network = distribute(model, device, config.shard)  # called in place of the model
        self.max_iters = config.max_iters or math.inf
        if config.epochs:
            steps = config.epochs * meta["train"]["tokens"] / (config.batch_size * config.context)
            self.max_iters = min(self.max_iters, steps)
        self.precision = autocast(device, config.dtype)
        self.optimizer = Optimizers(model, config, self.precision.fast_dtype)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision.fast_dtype == torch.float16)
        self.generator = torch.Generator().manual_seed(config.seed)  # for batches, levels and holes
        self.corpus = [meta[split]["sha256"] for split in SPLITS] if meta else []
        # `best` is the lowest bound so far, in nats per token, under these flags. A spindle's is that of uniform rates.
        rate = "t" if config.rate.kind == "spindle" else str(config.rate)
        self.best, self.bound = math.inf, {"prompt_len": config.prompt_len.low, "rate": rate}
        self.step, self.minutes, self.evals_done = 0, 0.0, 0
        self.start_clock()

    def progress(self):
        """The fraction of the run that is done, by whichever limit ends it: steps or minutes."""
        default = 10 if self.max_iters == math.inf else math.inf
        return min(1.0, max(self.step / self.max_iters, self.minutes / (self.config.max_minutes or default)))

    def start_clock(self):
        self.began = time.perf_counter()
        self.start = self.began - 60 * self.minutes

    def tick(self, stopped=False):
        """Read the clock, that of rank 0 in all processes. Returns whether any of them was told to stop."""
        self.minutes, stopped = agree((time.perf_counter() - self.start) / 60, stopped)
        return stopped

    def evaluation_is_due(self):
        """Whether the next of the run's evenly spaced evaluations is due; true once for each."""
        before, self.evals_done = self.evals_done, int(self.progress() * self.config.evals)
        if self.evals_done == before:
            return False
        getattr(torch, self.device.type).synchronize()
        self.paused = time.perf_counter()  # the speed of training excludes evaluations
        return True

    def micro_batches(self, batch):
        """Yield this process's micro-batches of a batch (tensors of B rows), each with levels from all of (0, 1].

        Weights are multiplied by the number of processes, because gradients are averaged over them.
        """
        seed, n = np.random.SeedSequence([self.config.seed, self.step, rank()]), self.config.grad_accum
        torch.manual_seed(seed.generate_state(1).item())  # for dropout, which a resumed run has to repeat
        for i in range(n):
            synchronise_gradients(self.network, i == n - 1)
            x0, xt, holes, weights = (tensor[i * world_size() + rank() :: n * world_size()] for tensor in batch)
            part = send(self.device, x0, xt, holes, weights * world_size())
            if self.config.compile:  # once for all numbers of holes
                for index in part[2]:
                    torch._dynamo.maybe_mark_dynamic(index, 0)
            yield part

    def clip(self):
        """Scale the gradients down to the norm --grad_clip; return the norm before."""
        return full(torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip or math.inf))

    def compile_ahead(self, batch, loss_of, *more):
        """Run what torch.compile compiles, before the clock starts: the loss of a batch, and more functions."""
        for part in self.micro_batches(batch):
            with self.precision:
                loss_of(self.network, *part).sum().backward()
        self.optimizer.zero_grad()
        for function in more:
            function()
        self.start_clock()

    def state(self):
        return {
            **{name: getattr(self, name) for name in ("step", "minutes", "best", "bound", "corpus")},
            **({"chat": self.template} if self.template else {}),
            "train": as_plain(self.config),
            "optimizers": self.optimizer.state(),
            "scaler": self.scaler.state_dict(),
            "random": self.generator.get_state(),
        }

    def restore(self, state):
        """Continue from a state. Mistake if this run can't, or if that one is complete."""
        if state.get("corpus", self.corpus) != self.corpus:
            text = f"data/{self.config.data} has another text than when this run began"
            raise Mistake(f"--init_from resume: {text}; prepare that again, or give the checkpoint's path instead")
        try:
            self.optimizer.load(state["optimizers"])
            self.scaler.load_state_dict(state["scaler"])
            self.generator.set_state(state["random"])
            self.step, self.minutes = int(state["step"]), float(state["minutes"])
            self.best = float(state["best"]) if self.bound == state["bound"] else math.inf
            if min(self.step, self.minutes) < 0:
                raise ValueError("its step or minutes are negative")
            complete = self.progress() >= 1
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
            raise Mistake(f"--init_from resume: not with these flags ({str(error)[:200]})") from None
        if complete:
            raise Mistake("--init_from resume: that run is complete; raise --max_minutes, --max_iters or --epochs")
        self.evals_done = int(self.progress() * self.config.evals)

    def save(self, nats=math.inf):
        """Write last.pt, and ckpt.pt if nats per token, the bound, is the lowest so far or there is none yet.

        If the disk is full before the run ends, say so and go on.
        """
        last, best = (Path(self.config.out_dir) / name for name in ("last.pt", "ckpt.pt"))
        before, is_best = self.best, nats < self.best or not best.exists()
        self.best = float(nats) if is_best else self.best
        try:
            save_checkpoint(last, self.model, self.tokenizer, **self.state())
        except OSError as error:
            self.best = before
            if nats == math.inf or self.progress() >= 1:
                raise
            kept = "the earlier one stays" if last.exists() else "there is none yet"
            said = f"step {self.step}: no checkpoint ({error.strerror or error}); {kept}"
            return tqdm.write(f"{said}, and the next evaluation tries again", file=sys.stderr)
        if rank() == 0:
            if is_best:
                link(last, best)
            if self.config.keep:
                link(last, last.with_name(f"step-{self.step:08}.pt"))
                for old in sorted(last.parent.glob("step-*.pt"))[: -self.config.keep]:
                    old.unlink()

    def end(self, came, script):
        """If a signal (the first of `came`, or Ctrl-C) stopped the run, exit with its code, and say how to resume."""
        if self.progress() >= 1:
            return
        if rank() == 0:
            again = f"python {script} --out_dir {self.config.out_dir} --init_from resume"
            print(f"stopped at step {self.step}; `{again}` goes on from there", file=sys.stderr)
        sys.exit(128 + (came or [signal.SIGINT])[0])


@contextmanager
def underway(run, checkpoint):
    """Context in which a run trains. It resumes from the checkpoint if it should, and saves if it ends early.

    It has its folder to itself, and notes Ctrl-C and SIGTERM in the list that it gives.
    """
    if run.config.init_from == "resume":
        run.restore(checkpoint)
    with signals() as came, nullcontext() if rank() else alone_in(run.config.out_dir):
        run.model.train()
        run.start_clock()
        yield came
        if run.progress() < 1:
            run.save()
