"""The state of a training run: its optimizers, random numbers and clock, and how it is saved and resumed."""

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
from data.lib.processes import agree, average, rank, size, spread, whole
from data.lib.train_settings import check_unused


class Run:
    """A training run at one step, with everything that `--init_from resume` needs to go on as if never
    stopped.
    """

    def __init__(self, config, model, device=None, meta=None, tokenizer=None, template=None):
        """device: by default that of config. meta: that of the corpus; without one, epochs have no length.
        template: how the model chats.
        """
        self.device = device = device or pick_device(config.device)
        self.config, self.model, self.tokenizer = config, model, tokenizer
        if config.grad_checkpoint:  # each layer is computed again for its gradient instead of being kept
            for layer in model.layers:
                layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
        self.network = spread(model, device, config.shard)  # called in place of the model
        self.max_iters = config.max_iters or math.inf
        if config.epochs:
            steps = config.epochs * meta["train"]["tokens"] / (config.batch_size * config.context)
            self.max_iters = min(self.max_iters, math.ceil(min(steps, 2**53)))
        self.precision = autocast(device, config.dtype)
        self.optimizer = Optimizers(model, config, self.precision.fast_dtype)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.precision.fast_dtype == torch.float16)
        self.generator = torch.Generator().manual_seed(config.seed)  # for batches, levels and holes
        self.corpus = [meta[split]["sha256"] for split in SPLITS] if meta else []
        self.template = template
        self.step, self.minutes, self.best = 0, 0.0, math.inf
        # What the bound in nats that chooses ckpt.pt, `best`, was measured with. A spindle has none of its own.
        rate = "t" if config.rate.kind == "spindle" else str(config.rate)
        self.bound_flags = {"prompt_len": config.prompt_len.low, "rate": rate}
        self.start_clock()
        self.evals_done = 0

    # --- how far it is ---------------------------------------------------------------------------

    def progress(self):
        """How far the run is, in [0, 1], by the limit that will end it: steps or minutes."""
        by_steps = self.step / self.max_iters
        default = 10 if self.max_iters == math.inf else math.inf
        by_minutes = self.minutes / (self.config.max_minutes or default)
        return min(1.0, max(by_steps, by_minutes))

    def start_clock(self):
        """From now on the clock runs."""
        self.began = time.perf_counter()
        self.start = self.began - 60 * self.minutes

    def tick(self, stopped=False):
        """Read the clock. Returns whether a process was told to stop; all of them go by the clock of one."""
        self.minutes, stopped = agree((time.perf_counter() - self.start) / 60, stopped)
        return stopped

    def evaluation_is_due(self):
        """Whether one of the run's evaluations, which are spaced evenly, is due now; true once for each."""
        before, self.evals_done = self.evals_done, int(self.progress() * self.config.evals)
        if self.evals_done == before:
            return False
        getattr(torch, self.device.type).synchronize()
        self.paused = time.perf_counter()  # an evaluation is not part of the training speed
        return True

    # --- a step ----------------------------------------------------------------------------------

    def micro_batches(self, batch):
        """Cut a batch, tensors of B rows, into --grad_accum micro-batches of this process, on the device;
        each has levels from all of (0, 1]. Weights are multiplied by the number of processes, over which
        gradients average.
        """
        # Dropout depends only on the seed, the step and the process, so it resumes.
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

    def clip(self):
        """Scale the gradients down to a norm of --grad_clip; returns the norm before."""
        largest = self.config.grad_clip or math.inf
        return whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), largest))

    def compile_ahead(self, batch, loss_of, *more):
        """Have torch compile passes of every kind, and those of more functions, before the clock starts. They
        leave no trace.
        """
        for piece in self.micro_batches(batch):
            with self.precision:
                loss_of(self.network, *piece).sum().backward()
        self.optimizer.zero_grad()
        for function in more:
            function()
        self.start_clock()

    # --- saving and resuming ---------------------------------------------------------------------

    def state(self):
        return {
            "train": as_plain(self.config),
            "optimizers": self.optimizer.state(),
            "scaler": self.scaler.state_dict(),
            "random": {"batches": self.generator.get_state()},
            "bound": self.bound_flags,
            "corpus": self.corpus,
            **({"chat": self.template} if self.template else {}),
            **{name: getattr(self, name) for name in ("step", "minutes", "best")},
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
        self.start_clock()
        self.evals_done = int(self.progress() * self.config.evals)

    def load(self, state):
        self.optimizer.load(state["optimizers"])
        self.scaler.load_state_dict(state["scaler"])
        self.generator.set_state(state["random"]["batches"])
        self.step, self.minutes, best = int(state["step"]), float(state["minutes"]), float(state["best"])
        if not (0 <= self.step < 2**63 and self.minutes >= 0 and best >= 0):
            raise ValueError("its step, minutes or bound cannot be")
        if self.bound_flags == state["bound"]:
            self.best = best

    def save(self, nats=math.inf):
        """Write last.pt, and ckpt.pt if there is none, or if nats, the bound per token, is the lowest. A full
        disk before the end of the run is no error: it is reported, and the run goes on.
        """
        folder = Path(self.config.out_dir)
        last, best = folder / "last.pt", nats < self.best or not (folder / "ckpt.pt").exists()
        before, self.best = self.best, float(nats) if best else self.best
        state = self.state()
        try:
            save_checkpoint(last, self.model, self.tokenizer, **state)
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
        """Unless the run is complete, end the process with the exit code of the signal that came (by default
        that of Ctrl-C), and say on stderr how to go on.
        """
        if self.progress() >= 1:
            return
        if rank() == 0:
            again = f"python {script} --out_dir {self.config.out_dir} --init_from resume"
            print(f"stopped at step {self.step}; `{again}` goes on from there", file=sys.stderr)
        sys.exit(128 + (came or [signal.SIGINT])[0])


@contextmanager
def underway(run, checkpoint):
    """Context in which a run trains: it has its folder to itself, resumes where it should, and stops after
    the step during which Ctrl-C or SIGTERM came, which the list that the context gives tells. It saves where
    it stopped.
    """
    config = run.config
    if config.init_from == "resume":
        run.restore(checkpoint)
    else:
        check_unused(config.out_dir)
    alone = nullcontext() if rank() else alone_in(config.out_dir)
    with signals() as came, alone:
        run.model.train()
        run.start_clock()
        yield came
        if run.progress() < 1:
            run.save()
