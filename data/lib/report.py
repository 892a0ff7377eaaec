"""What a training run shows and logs: a progress bar, log.csv, and evaluations with a sample."""

import csv
import math
import os
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

from data.lib.corpus import spaced_windows
from data.lib.errors import Mistake
from data.lib.escape import inert
from data.lib.pixels import as_shown
from data.lib.processes import all_reduce_sum, rank, world_size
from data.lib.prompt import make_canvas, shown_of

COLUMNS = "step", "minutes", "loss", "lr", "grad_norm", "tokens_per_second", "val_nats_per_token", "val_bits_per_byte"


class Report:
    """Shows and logs a run. It reads the loss, which synchronises, only when it shows it.

    denoise: writes the samples. val: the windows that are evaluated, and their prompt lengths. meta: of the corpus.
    """

    def __init__(self, run, denoise, val, meta):
        self.run, self.denoise, self.out_dir = run, denoise, Path(run.config.out_dir)
        self.prompt = val[0][0, : val[1][0]]  # (n,), empty unless the corpus has examples
        self.bound_name = bound_name(run.model.config, **run.bound, of_replies="chat" in meta)
        self.counted = text_share(*val, run.model.config.special_ids), meta["val"]

    def __enter__(self):
        run = self.run
        parameters = sum(p.numel() for p in run.model.parameters())
        print(f"{parameters:,} parameters on {run.device} in {run.precision.fast_dtype}")
        self.open_log(self.out_dir / "log.csv" if rank() == 0 else Path(os.devnull))
        layout, seconds = "{percentage:3.0f}%|{bar:20}| {desc}", 0.5 if sys.stderr.isatty() else 10
        self.bar = tqdm(total=1, initial=run.progress(), bar_format=layout, mininterval=seconds, disable=rank() > 0)
        self.restart()
        return self

    def __exit__(self, *_):
        self.bar.close()
        with suppress(OSError):  # the disk is still full
            self.file.close()

    def open_log(self, path):
        """Open log.csv, and drop the rows after the step that the run resumes from."""
        rows = []
        if self.run.step and path.exists():
            with open(path, newline="") as file:
                rows = [row for row in csv.reader(file) if row and row[0].isdecimal() and int(row[0]) <= self.run.step]
        self.file = open(path, "w", newline="", buffering=1)  # line by line, so that it can be watched
        self.log = csv.writer(self.file)
        self.log.writerows([COLUMNS, *rows])

    def restart(self):
        """Measure the speed from now on."""
        self.tokens, self.last, self.shown = 0, time.perf_counter(), self.run.minutes

    def step(self, loss, norm, nats=None, stopped=False):
        """Note a step with its loss, gradient norm and, if it was evaluated, bound. Mistake if one is not finite."""
        run, config = self.run, self.run.config
        self.tokens += config.batch_size * config.context
        logs = nats is not None or run.step % config.log_every == 0
        if not (logs or stopped or run.progress() >= 1 or run.minutes - self.shown > 1 / 120):
            return
        # Each process has the loss of its rows, times the number of processes.
        self.loss, norm = all_reduce_sum(loss.clone()).item() / world_size(), norm.item()
        now = time.perf_counter() if nats is None else run.paused
        speed = self.tokens / (now - max(self.last, run.began))  # compiling is not counted
        self.check(norm, nats)
        if logs:
            lr, bits = run.optimizer.param_groups[0]["lr"], nats and bits_per_byte(nats, *self.counted)
            row = run.step, run.minutes, self.loss, lr, norm, speed, nats, bits
            with suppress(OSError):  # on a full disk; what isn't written now is written with a later row
                self.log.writerow(f"{x:.6g}" if isinstance(x, float) else x for x in row)
        left = run.minutes / run.progress() * (1 - run.progress())
        status = f"step {run.step:,}, loss {self.loss:.3f}, {speed:,.0f} tokens/s, {left:.1f} min left"
        self.bar.set_description_str(status, refresh=False)
        self.bar.update(run.progress() - self.bar.n)
        self.restart()

    def check(self, norm, nats):
        """Raise Mistake unless loss, norm and bound are finite. In float16 the scaler skips a norm that isn't."""
        skipped = self.run.scaler.is_enabled() and not math.isfinite(norm)
        if not all(map(math.isfinite, (self.loss, 0 if skipped else norm, nats or 0))):
            said = f"loss {self.loss:.3g}, gradient norm {norm:.3g}, bound {nats}; a smaller --lr may help"
            raise Mistake(f"step {self.run.step}: {said} (what is in {self.out_dir} was saved before)")

    def evaluation(self, nats):
        """Show the bound, and a sample."""
        text = textwrap.indent(self.sample(), "  | ", lambda line: True)
        self.bar.write(
            f"step {self.run.step:,} at {self.run.minutes:.1f} min: loss {self.loss:.3f}, validation {self.bound_name} "
            f"{nats:.3f} nats per token = {bits_per_byte(nats, *self.counted):.3f} bits per byte. A sample:\n{text}"
        )
        self.restart()

    def sample(self):
        """Write a short text, safe to show. If the corpus has examples, it replies to the first prompt."""
        run, config, tokenizer, T = self.run, self.run.model.config, self.run.tokenizer, self.run.config.context
        ids = make_canvas("", suffix="", length=T, tokenizer=tokenizer, context=T)
        ids[: len(self.prompt)] = self.prompt.tolist()
        run.model.eval()
        with run.precision:
            *_, canvas = self.denoise(run.model, torch.tensor([ids]), steps=64, temperature=0.7)
        run.model.train()
        text = tokenizer.decode(shown_of(canvas[0].tolist(), ids, config.mask_id, config.end_ids))
        return as_shown(text, tokenizer) if sys.stdout.isatty() else inert(text)


def validation_windows(split, config):
    """The windows of a split that are evaluated, (N, T) int64, and how many tokens of each are a prompt, (N, 1)."""
    n_tokens = config.eval_tokens or (len(split) if config.eval_only else 2**16)
    return tuple(map(torch.from_numpy, spaced_windows(split, config.context, n_tokens)))


def print_bound(run, sequence_bounds, val_split, counts):
    """Print the bound of a split, or of --eval_tokens of it, with its standard error."""
    config, K = run.config, run.model.config.block
    tokens, own_prompt = validation_windows(val_split, config)
    # Two draws of 256 windows are enough for a standard error. An exact bound needs one.
    draws = 1 if K == 1 else 1 + math.ceil(256 / len(tokens))
    settings = {"seed": config.seed, "level": config.level, "rate": config.rate}
    with run.precision:
        bounds, n_maskable = sequence_bounds(run.model, tokens, own_prompt + config.prompt_len.low, draws, **settings)
    nats = (bounds.mean(0).sum() / n_maskable.sum()).item()
    error = "exact" if K == 1 else f"standard error {standard_error(bounds, n_maskable):.4f}"
    name = bound_name(run.model.config, **run.bound, level=config.level, of_replies=own_prompt.any())
    bits = bits_per_byte(nats, text_share(tokens, own_prompt, run.model.config.special_ids), counts)
    print(
        f"{config.data}: {name} {nats:.4f} nats per token ({error}), {bits:.4f} bits per byte, perplexity "
        f"{math.exp(nats):.3f}; {tokens.numel() - own_prompt.sum().item():,} validation tokens, {draws} draws"
    )


def bound_name(model_config, prompt_len=0, rate="t", level="uniform", of_replies=False):
    """What a bound with these settings is called."""
    settings = [f"level {level}"] if str(level) != "uniform" else []
    settings += [f"rate {rate}"] if str(rate).startswith("slant") else []
    settings += [f"after a prompt of {prompt_len}"] if prompt_len else []
    name = "negative log-likelihood" if model_config.block == 1 else "NELBO"
    return name + " of replies" * bool(of_replies) + (f" ({', '.join(settings)})" if settings else "")


def bits_per_byte(nats, text_share, counts):
    """Extrapolate nats per token of some windows to bits per byte of a split with these counts of tokens and bytes.

    text_share: the fraction of the windows' tokens that count.
    """
    return nats * text_share * counts["tokens"] / counts["bytes"] / math.log(2)


def text_share(tokens, own_prompt, special_ids):
    """The fraction of the tokens of windows (N, T) that count: not the prompts (N, 1), and no special ones."""
    special = torch.isin(tokens, torch.tensor(special_ids, dtype=tokens.dtype))
    return (~special & (torch.arange(tokens.shape[1]) >= own_prompt)).float().mean().item()


def standard_error(nats, n_maskable, strata=16):
    """Standard error over seeds of the bound that `sequence_bounds` of train.py estimates, from at least two draws.

    strata: how many texts share stratified levels.
    """
    sums = torch.stack([group.sum(1) for group in nats.split(strata, dim=1)])  # (groups, draws)
    return (sums.var(1).sum() / len(nats)).sqrt().item() / n_maskable.sum().item()
