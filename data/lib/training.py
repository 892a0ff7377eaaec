"""A training run: its optimizers, random numbers and clock, and how it is saved, stopped and resumed."""

import dataclasses
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

from data.lib.checkpoint import refused, save_checkpoint
from data.lib.corpus import SPLITS
from data.lib.errors import Mistake, signals
from data.lib.files import alone_in, link
from data.lib.flags import as_plain
from data.lib.machine import autocast, pick_device, send
from data.lib.optimizer import Optimizers
from data.lib.processes import distribute, gather, rank, world_size


class Run:
    """A training run at one step. It resumes as if it had never stopped. template: how the model chats."""

    def __init__(self, config, model, device=None, meta=None, tokenizer=None, template=None):
        self.device = device = device or pick_device(config.device)
        self.config, self.model, self.tokenizer, self.template = config, model, tokenizer, template
        if config.freeze:
            model.requires_grad_(False).drafter.requires_grad_(True)
        if config.grad_checkpoint:
            for layer in model.layers:
                layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        self.network = distribute(model, device, config.shard)  # called in place of the model
        self.max_iters = config.max_iters or math.inf
        if config.epochs:
            steps = config.epochs * meta["train"]["tokens"] / (config.batch_size * config.context)
            self.max_iters = min(self.max_iters, steps)
        self.max_minutes = config.max_minutes or (10 if self.max_iters == math.inf else math.inf)
        self.precision = autocast(device, config.dtype)
        self.optimizer = Optimizers(model, config, self.precision.fast_dtype)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision.fast_dtype == torch.float16)
        self.generator = torch.Generator().manual_seed(config.seed)  # for batches, levels and holes
        self.corpus = [meta[split]["sha256"] for split in SPLITS] if meta else []
        self.best, self.bound = math.inf, bound_name(config, model.config, meta or {})  # best: lowest nats per token
        self.step, self.minutes, self.evals_done = 0, 0.0, 0
        self.step_minutes, self.eval_minutes, self.evaluated = 0.0, [0.0], False  # of the last step; of each evaluation
        self.paused = 0.0  # when the last evaluation began, in minutes
        self.start_clock()

    def progress(self):
        """The fraction of the run that is done, by whichever limit ends it: steps or minutes."""
        return min(1.0, max(self.step / self.max_iters, self.minutes / self.max_minutes))

    def start_clock(self):
        self.start = time.perf_counter() - 60 * self.minutes

    def clock(self):
        """The minutes of the run up to now. `minutes` is only updated at the end of a step."""
        return (time.perf_counter() - self.start) / 60

    def tick(self, stopped=False):
        """Read the clock; every process gets rank 0's time. Returns whether any of them was told to stop."""
        said = gather(torch.tensor([self.clock(), stopped, self.paused], dtype=torch.float64))  # (world_size, 3)
        before, self.minutes = self.minutes, said[0, 0].item()
        if self.evaluated:
            self.eval_minutes.append(max(0.0, self.minutes - said[0, 2].item() - self.step_minutes))
        else:
            self.step_minutes = self.minutes - before
        self.evaluated = False
        return bool(said[:, 1].any())

    def evaluation_is_due(self):
        """Whether the next of the run's evenly spaced evaluations is due; true once for each.

        Unless flags say otherwise, evaluations with their samples and checkpoints take a tenth of the run: they read a
        tenth as many tokens as training does, and one that would exceed it is skipped, except the first and the last.
        """
        config, done = self.config, self.progress()
        before, self.evals_done = self.evals_done, int(done * (config.evals or 8))
        due, expected = self.evals_done > before, sum(self.eval_minutes) + 2 * self.eval_minutes[-1]
        if due and config.evals is None and done < 1:
            due = expected <= 0.1 * self.minutes / done
        if due:
            if config.eval_tokens is None:
                n_tokens = self.step * config.batch_size * config.context / done  # over the whole run
                n_tokens = min(2**16, max(4 * config.context, int(0.1 * n_tokens / (config.evals or 8))))
                self.config = dataclasses.replace(config, eval_tokens=n_tokens)  # saved, so a resumed run keeps it
            getattr(torch, self.device.type).synchronize()
            self.paused = self.clock()  # the speed of training excludes evaluations
        self.evaluated = due
        return due

    def micro_batches(self, batch):
        """Yield this process's micro-batches of a batch (tensors of B rows), each with levels from all of (0, 1]."""
        seed, n = np.random.SeedSequence([self.config.seed, self.step, rank()]), self.config.grad_accum
        torch.manual_seed(seed.generate_state(1).item())  # for dropout, which a resumed run has to repeat
        for i in range(n):
            self.network.require_backward_grad_sync = i == n - 1  # the last backward pass averages over processes
            if self.config.shard:
                self.network.set_requires_gradient_sync(i == n - 1)
            x0, xt, holes, weights = (tensor[i * world_size() + rank() :: n * world_size()] for tensor in batch)
            part = send(self.device, x0, xt, holes, weights * world_size())  # the average divides by it
            if self.config.compile:  # compile once for any number of holes
                for index in part[2]:
                    torch._dynamo.maybe_mark_dynamic(index, 0)
            yield part

    def compile_ahead(self, batch, loss_of, *more):
        """Compile before the clock starts, by calling what a run calls: the loss of a batch, and `more` functions."""
        if rank() == 0:
            print("torch.compile compiles the network first, which takes minutes", file=sys.stderr)
        try:
            for part in self.micro_batches(batch):
                with self.precision:
                    loss_of(self.network, *part).sum().backward()
            self.model.zero_grad()
            for function in more:
                function()
        except torch._dynamo.exc.BackendCompilerFailed as error:
            cache, inner = torch._inductor.runtime.cache_dir_utils.cache_dir(), error.inner_exception
            first_line, _, _ = str(inner).partition("\n")
            said = f"torch could not compile the network ({type(inner).__name__}: {first_line})"
            hint = f"it needs a C++ compiler, and an interrupted run may have broken {cache}, which you can delete"
            raise Mistake(f"--compile: {said}; {hint}") from None
        self.start_clock()

    def restore(self, state):
        """Continue from the state that `save` wrote. Mistake if this run can't, or if that one is complete."""
        with refused("--init_from resume", "not with these flags"):
            if state["corpus"] != self.corpus:
                raise ValueError(f"data/{self.config.data} has another text than when the run began")
            self.optimizer.load(state["optimizers"])
            self.scaler.load_state_dict(state["scaler"])
            self.generator.set_state(state["random"])
            self.step, self.minutes = int(state["step"]), float(state["minutes"])
            self.eval_minutes = [float(minutes) for minutes in state["eval_minutes"]]
            self.best = float(state["best"]) if self.bound == state["bound"] else math.inf
            if min(self.step, self.minutes) < 0:
                raise ValueError("its step or minutes are negative")
            if self.progress() >= 1:
                raise ValueError("that run is complete; raise --max_minutes, --max_iters or --epochs")
        self.evals_done = int(self.progress() * (self.config.evals or 8))

    def save(self, nats=math.inf):
        """Write last.pt, and also ckpt.pt if this bound (nats per token) is the lowest so far, or --freeze fixes it."""
        last, best = (Path(self.config.out_dir) / name for name in ("last.pt", "ckpt.pt"))
        is_best = nats < self.best or not best.exists() or self.config.freeze
        before, self.best = self.best, min(nats, self.best)
        names = "step", "minutes", "best", "bound", "corpus", "eval_minutes"
        state = {name: getattr(self, name) for name in names}
        state |= {"chat": self.template} if self.template else {}
        state |= {"train": as_plain(self.config), "optimizers": self.optimizer.state()}
        state |= {"scaler": self.scaler.state_dict(), "random": self.generator.get_state()}
        try:
            save_checkpoint(last, self.model, self.tokenizer, **state)
        except OSError as error:
            if nats == math.inf or self.progress() >= 1:  # the run ends here; otherwise it goes on
                raise
            self.best = before
            said = f"step {self.step}: no checkpoint ({error.strerror or error}); the next evaluation tries again"
            return tqdm.write(said, file=sys.stderr)
        if rank() == 0:
            if is_best:
                link(last, best)
            if self.config.keep:
                link(last, last.with_name(f"step-{self.step:08}.pt"))
                for old in sorted(last.parent.glob("step-*.pt"))[: -self.config.keep]:
                    old.unlink()


def bound_name(config, model_config, meta):
    """The name of the bound under this run's settings. With a spindle, it is that of uniform rates."""
    settings = [f"level {config.level}"] if config.eval_only and config.level.kind != "uniform" else []
    settings += [f"rate {config.rate}"] if config.rate.kind == "slant" else []
    settings += [f"after a prompt of {config.prompt_len.low}"] if config.prompt_len.low else []
    name = "negative log-likelihood" if model_config.block == 1 else "NELBO"
    return name + " of replies" * ("chat" in meta) + (f" ({', '.join(settings)})" if settings else "")


@contextmanager
def underway(run, checkpoint):
    """Context manager for a run, from scratch or resumed from the checkpoint. Its list receives Ctrl-C and SIGTERM."""
    if run.config.init_from == "resume":
        run.restore(checkpoint)
    with signals() as came, nullcontext() if rank() else alone_in(run.config.out_dir):
        run.model.train()
        run.start_clock()
        yield came
        if run.progress() < 1:
            run.save()
            if rank() == 0:
                again = f"python train.py --out_dir {run.config.out_dir} --init_from resume"
                print(f"stopped at step {run.step}; `{again}` goes on from there", file=sys.stderr)
            sys.exit(128 + (came or [signal.SIGINT])[0])
    if rank() == 0:
        path = Path(run.config.out_dir) / "ckpt.pt"
        print(f"`python sample.py --ckpt {path}` writes with this model", file=sys.stderr)
