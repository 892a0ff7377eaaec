"""What a training run shows and logs: a progress bar, log.csv, and evaluations with a sample."""

import csv
import dataclasses
import math
import os
import sys
import textwrap
from contextlib import AbstractContextManager, suppress
from pathlib import Path

import torch
from tqdm import tqdm

from data.lib.corpus import spaced_windows
from data.lib.errors import Mistake
from data.lib.escape import inert
from data.lib.layout import as_shown, wrapped
from data.lib.machine import release_memory
from data.lib.processes import full, gather, gathered, rank, world_size
from data.lib.prompt import make_canvas, shown_of

COLUMNS = "step", "minutes", "loss", "lr", "grad_norm", "tokens_per_second", "val_nats_per_token", "val_bits_per_byte"


class Report(AbstractContextManager):
    """Shows and logs a run. denoise: writes the samples. split: the validation split. meta: of the corpus."""

    def __init__(self, run, denoise, split, meta):
        self.run, self.denoise, self.split, self.out_dir = run, denoise, split, Path(run.config.out_dir)
        tokens, prompt_len = validation_windows(split, dataclasses.replace(run.config, eval_tokens=2**16))
        self.prompt = tokens[0, : prompt_len[0]]  # (n,), empty unless the corpus has examples
        self.bits_per_nat = bits_per_nat(tokens, prompt_len, run.model.config.special_ids, meta["val"])
        n_parameters = sum(p.numel() for p in run.model.parameters())
        print(f"{n_parameters:,} parameters on {run.device} in {run.precision.fast_dtype}")
        path, rows = self.out_dir / "log.csv" if rank() == 0 else Path(os.devnull), []
        if run.step and path.exists():  # the run resumes from this step, so drop the rows after it
            with open(path, newline="") as file:
                rows = [row for row in csv.reader(file) if row and row[0].isdecimal() and int(row[0]) <= run.step]
        self.file = open(path, "w", newline="", buffering=1)  # line by line, so that it can be watched
        self.log = csv.writer(self.file)
        self.log.writerows([COLUMNS, *rows])
        layout, seconds = "{percentage:3.0f}%|{bar:10}| {desc}", 0.5 if sys.stderr.isatty() else 10
        self.bar = tqdm(total=1, initial=run.progress(), bar_format=layout, mininterval=seconds, disable=rank() > 0)
        self.tokens, self.shown, self.since = 0, run.minutes, run.minutes  # for the speed since then

    def __exit__(self, *_):
        self.bar.close()
        with suppress(OSError):  # the disk is still full
            self.file.close()

    def step(self, loss, norm, nats=None, stopped=False):
        """Note a step with its loss, gradient norm and, if it was evaluated, bound. Mistake if one is not finite."""
        run = self.run
        self.tokens += run.config.batch_size * run.config.context
        logs = nats is not None or run.step % run.config.log_every == 0
        if not (logs or stopped or run.progress() >= 1 or run.minutes - self.shown > 1 / 120):
            return  # without reading the loss, which would synchronise
        self.loss = gather(loss).mean().item()  # a rank scales the loss of its rows by world_size
        norm = full(norm).item()
        now = run.clock() if nats is None else run.paused
        speed = self.tokens / (now - self.since) / 60
        skipped = run.scaler.is_enabled() and not math.isfinite(norm)  # the scaler skips such a step in float16
        if not all(map(math.isfinite, (self.loss, 0 if skipped else norm, nats or 0))):
            said = f"loss {self.loss:.3g}, gradient norm {norm:.3g}, bound {nats}; a smaller --lr may help"
            raise Mistake(f"step {run.step}: {said} (what is in {self.out_dir} was saved before)")
        if logs:
            lr, bits = run.optimizer.param_groups[0]["lr"], nats and nats * self.bits_per_nat
            row = run.step, run.minutes, self.loss, lr, norm, speed, nats, bits
            with suppress(OSError):  # on a full disk; what isn't written now is written with a later row
                self.log.writerow(f"{x:.6g}" if isinstance(x, float) else x for x in row)
        left = run.minutes / run.progress() * (1 - run.progress())
        status = f"step {run.step:,}, loss {self.loss:.3f}, {speed:,.0f} tokens/s, {left:.1f} min left"
        self.bar.set_description_str(status, refresh=False)
        self.bar.update(run.progress() - self.bar.n)
        self.tokens, self.shown, self.since = 0, run.minutes, now

    def evaluation(self, nats):
        text = textwrap.indent(self.sample(), "  | ", lambda line: True)
        run, bits = self.run, nats * self.bits_per_nat
        said = f"step {run.step:,} at {run.minutes:.1f} min: loss {self.loss:.3f}, validation {run.bound} "
        said += f"{nats:.3f} nats per token = {bits:.3f} bits per byte. A sample:"
        self.bar.write(f"{wrapped(said)}\n{text}")
        release_memory()
        self.since = self.run.clock()

    def windows(self):
        """The windows that an evaluation reads, and the lengths of their prompts."""
        return validation_windows(self.split, self.run.config)

    def sample(self):
        """Write a short text, safe to show. If the corpus has examples, it replies to the first prompt.

        It takes a pass for each window of an evaluation, 8 at least and 64 at most.
        """
        run, config, tokenizer, T = self.run, self.run.model.config, self.run.tokenizer, self.run.config.context
        steps = max(8, min(64, (run.config.eval_tokens or 2**16) // T))
        ids = make_canvas("", suffix="", length=T, tokenizer=tokenizer, context=T)
        ids[: len(self.prompt)] = self.prompt.tolist()
        run.model.eval()
        with run.precision, gathered(run.model):
            *_, canvas = self.denoise(run.model, torch.tensor([ids]), steps=steps, temperature=0.7)
        run.model.train()
        text = tokenizer.decode(shown_of(canvas[0].tolist(), ids, config.mask_id, config.end_ids))
        return as_shown(text, tokenizer) if sys.stdout.isatty() else inert(text)


def validation_windows(split, config):
    """The windows of a split that are evaluated, (N, T) int64, and how many tokens of each are a prompt, (N, 1)."""
    n_tokens = config.eval_tokens or (len(split) if config.eval_only else 2**16)
    return tuple(map(torch.from_numpy, spaced_windows(split, config.context, n_tokens)))


def print_bound(run, sequence_bounds, split, meta):
    """Print the bound of a split, or of --eval_tokens of it, with its standard error. meta: of the corpus."""
    config, is_exact = run.config, run.model.config.block == 1
    tokens, own_prompt = validation_windows(split, config)
    draws = 1 if is_exact else 1 + math.ceil(256 / len(tokens))  # two of 256 windows suffice for a standard error
    settings = {"seed": config.seed, "level": config.level, "rate": config.rate}
    bar = tqdm(desc="evaluating", total=draws * len(tokens), unit=" windows", leave=False, disable=rank() > 0)

    def count(model, inputs, logits):  # what a hook returns would take the place of the logits
        bar.update(len(inputs[0]) * world_size())

    run.model.register_forward_hook(count)
    with run.precision, bar:
        bounds, n_maskable = sequence_bounds(run.model, tokens, own_prompt + config.prompt_len.low, draws, **settings)
    nats = (bounds.mean(0).sum() / n_maskable.sum()).item()
    error = "exact" if is_exact else f"standard error {standard_error(bounds, n_maskable):.4f}"
    bits = nats * bits_per_nat(tokens, own_prompt, run.model.config.special_ids, meta["val"])
    size = f"{tokens.numel() - own_prompt.sum().item():,} validation tokens, {draws} draws"
    said = f"{run.bound} {nats:.4f} nats per token ({error}), {bits:.4f} bits per byte, perplexity {math.exp(nats):.3f}"
    print(f"{config.data}: {said}; {size}")


def bits_per_nat(tokens, own_prompt, special_ids, counts):
    """From nats per token of windows (N, T) with prompts (N, 1) to bits per byte of a split with these counts."""
    special = torch.isin(tokens, torch.tensor(special_ids, dtype=tokens.dtype))
    fraction = (~special & (torch.arange(tokens.shape[1]) >= own_prompt)).float().mean().item()
    return fraction * counts["tokens"] / counts["bytes"] / math.log(2)  # extrapolated to the split


def standard_error(nats, n_maskable, strata=16):
    """Standard error over seeds of a bound from nats (draws, N), two draws or more. strata: texts that share levels."""
    sums = torch.stack([group.sum(1) for group in nats.split(strata, dim=1)])  # (groups, draws)
    return (sums.var(1).sum() / len(nats)).sqrt().item() / n_maskable.sum().item()
