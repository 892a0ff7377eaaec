"""What is shown and kept of a training run while it goes on."""

import csv
import math
import os
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

from tqdm import tqdm

from data.lib.errors import Mistake
from data.lib.machine import release_memory
from data.lib.processes import agree, rank, size, total


class Report:
    """The bar, log.csv, evaluations with a sample, and checkpoints of a run: one call after each step."""

    def __init__(self, run, out_dir, bound_name, evaluate, sample, save):
        """When due: evaluate() -> (nats per token, bits per byte), sample() -> text, and save(nats)."""
        self.run, self.out_dir, self.bound_name = run, out_dir, bound_name
        self.evaluate, self.sample, self.save = evaluate, sample, save
        self.evals_done = self.evals_due()

    def __enter__(self):
        run = self.run
        self.log = Log(self.out_dir / "log.csv" if rank() == 0 else Path(os.devnull), run.step)
        layout, pace = "{percentage:3.0f}%|{bar:20}| {desc}", 0.5 if sys.stderr.isatty() else 10  # seconds
        start = run.progress()
        self.bar = tqdm(total=1, initial=start, bar_format=layout, mininterval=pace, disable=rank() > 0)
        self.start_clock()
        return self

    def __exit__(self, *_):
        self.bar.close()
        with suppress(OSError):  # a disk that is full to the end
            self.log.file.close()

    def start_clock(self):
        """Training takes place from now on."""
        self.show_from_now()
        self.start = self.last - 60 * self.run.minutes

    def show_from_now(self):
        """What is shown next is of the steps from now on."""
        self.tokens, self.last, self.shown = 0, time.perf_counter(), self.run.minutes

    def evals_due(self):
        """How many of the run's evaluations should have been made by now."""
        return int(self.run.progress() * self.run.config.evals)

    def __call__(self, loss, norm, stopped=False):
        """After a step with this loss and gradient norm; whether this is the last one: its end has come, or a
        process was stopped. What is given is read, and the device waited for, only where it is shown.
        Mistake if these, or the bound, are not finite.
        """
        run, config, nats, bits = self.run, self.run.config, None, None
        # The processes go by the clock of one, and stop together.
        run.minutes, stopped = agree((time.perf_counter() - self.start) / 60, stopped)
        self.tokens += config.batch_size * config.block_size
        evaluates, logs = self.evals_due() > self.evals_done, run.step % config.log_every == 0
        if not (evaluates or logs or stopped or run.minutes - self.shown > 1 / 120):
            return False
        # A process has the loss of its share, times the number of processes.
        loss, norm = total(loss.clone()).item() / size(), norm.item()
        speed = self.tokens / (time.perf_counter() - self.last)
        if evaluates:
            self.evals_done = self.evals_due()
            nats, bits = self.evaluate()
        self.check(loss, norm, nats)
        if nats is not None or logs:
            lr = run.optimizers[0].param_groups[0]["lr"]
            self.log.write(run.step, run.minutes, loss, lr, norm, speed, nats, bits)
        if nats is not None:
            self.save(nats)
            text = textwrap.indent(self.sample(), "  | ", lambda line: True)
            self.bar.write(
                f"step {run.step:,} at {run.minutes:.1f} min: loss {loss:.3f}, validation {self.bound_name} "
                f"{nats:.3f} nats per token = {bits:.3f} bits per byte. A sample:\n{text}"
            )
            release_memory()
        left = run.minutes / run.progress() * (1 - run.progress())
        status = f"step {run.step:,}, loss {loss:.3f}, {speed:,.0f} tokens/s, {left:.1f} min left"
        self.bar.set_description_str(status, refresh=False)
        self.bar.update(run.progress() - self.bar.n)
        self.show_from_now()
        return stopped or run.progress() >= 1

    def check(self, loss, norm, nats):
        """Raise Mistake if one of them is not finite; nats, the bound, may be None."""
        finite = math.isfinite(loss) and (math.isfinite(norm) or self.run.scaler.is_enabled())
        if finite and math.isfinite(nats or 0):
            return
        last = self.out_dir / "last.pt"
        kept = f"{last} is from before" if last.exists() else "nothing was saved"
        validation = "" if nats is None else f", validation {self.bound_name} {nats:.3g}"
        raise Mistake(
            f"step {self.run.step}: loss {loss:.3g}, gradient norm {norm:.3g}{validation}; "
            f"a smaller --lr may help ({kept})"
        )


class Log:
    """log.csv, a row per log point; resuming drops the rows that come after the step resumed from."""

    columns = "step minutes loss lr grad_norm tokens_per_second val_nats_per_token val_bits_per_byte".split()

    def __init__(self, path, step):
        rows = [self.columns]
        if step and path.exists():
            with open(path, newline="") as file:
                old = [row for row in csv.reader(file) if row and row[0].isdecimal()]
            rows += [row for row in old if int(row[0]) <= step]
        self.file = open(path, "w", newline="", buffering=1)  # a line at a time, to be watched
        self.writer = csv.writer(self.file)
        self.writer.writerows(rows)

    def write(self, *row):
        with suppress(OSError):  # a full disk: what it did not take is written with a later row
            self.writer.writerow(f"{v:.6g}" if isinstance(v, float) else v for v in row)
