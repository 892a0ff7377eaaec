"""What is shown and logged of a training run while it goes on: a progress bar, log.csv, evaluations with a
sample.
"""

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
from data.lib.machine import release_memory
from data.lib.pixels import as_shown
from data.lib.processes import rank, size, total
from data.lib.prompt import make_canvas, shown_of


class Report:
    """Shows and logs a run, one call after each step. It reads the loss, and so waits for the device, only
    when it shows it.
    """

    def __init__(self, run, denoise, val, meta):
        """denoise: the sampler, for a sample after each evaluation. val: the windows that are evaluated, and
        how many tokens of each are a prompt. meta: that of the corpus.
        """
        self.run, self.denoise, self.out_dir = run, denoise, Path(run.config.out_dir)
        self.prompt = val[0][0, : val[1][0]]  # (n,), and n is 0 but for examples
        self.bound_name = bound_name(run.model.config, **run.bound_flags, of_replies="chat" in meta)
        self.share, self.counts = text_share(*val, run.model.config.special_ids), meta["val"]

    def __enter__(self):
        run = self.run
        parameters = sum(p.numel() for p in run.model.parameters())
        print(f"{parameters:,} parameters on {run.device} in {run.precision.fast_dtype}")
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
        """The speed and the losses that are shown next are those of steps from now on."""
        self.tokens, self.last, self.shown = 0, time.perf_counter(), self.run.minutes

    def step(self, loss, norm, nats=None, stopped=False):
        """Note a step with this loss, gradient norm and, if it was evaluated, bound. Mistake if one is not
        finite.
        """
        run, config = self.run, self.run.config
        self.tokens += config.batch_size * config.context
        logs = nats is not None or run.step % config.log_every == 0
        if not (logs or stopped or run.progress() >= 1 or run.minutes - self.shown > 1 / 120):
            return
        # A process has the loss of its share, times the number of processes.
        loss, norm = total(loss.clone()).item() / size(), norm.item()
        now = time.perf_counter() if nats is None else run.paused
        speed = self.tokens / (now - max(self.last, run.began))  # compiling comes before it
        self.check(loss, norm, nats)
        if logs:
            lr = run.optimizer.param_groups[0]["lr"]
            bits = None if nats is None else self.to_bits(nats)
            self.log.write(run.step, run.minutes, loss, lr, norm, speed, nats, bits)
        left = run.minutes / run.progress() * (1 - run.progress())
        self.loss = loss
        status = f"step {run.step:,}, loss {loss:.3f}, {speed:,.0f} tokens/s, {left:.1f} min left"
        self.bar.set_description_str(status, refresh=False)
        self.bar.update(run.progress() - self.bar.n)
        self.start_clock()

    def to_bits(self, nats):
        return bits_per_byte(nats, self.share, self.counts)

    def sample(self):
        """A short text, safe to show; of a corpus of examples the reply to the first prompt."""
        return sample(self.run, self.denoise, self.prompt)

    def evaluation(self, nats):
        """Show the bound, and a sample."""
        text = textwrap.indent(self.sample(), "  | ", lambda line: True)
        self.bar.write(
            f"step {self.run.step:,} at {self.run.minutes:.1f} min: loss {self.loss:.3f}, validation {self.bound_name} "
            f"{nats:.3f} nats per token = {self.to_bits(nats):.3f} bits per byte. A sample:\n{text}"
        )
        release_memory()
        self.start_clock()

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


def sample(run, denoise, prompt):
    """A short text, safe to show, from a canvas that is empty but for the prompt (n,) of an example."""
    T, config, tokenizer = run.config.context, run.model.config, run.tokenizer
    ids = make_canvas("", suffix="", length=T, tokenizer=tokenizer, context=T)
    ids[: len(prompt)] = prompt.tolist()
    run.model.eval()
    with run.precision:
        *_, canvas = denoise(run.model, torch.tensor([ids]), steps=64, temperature=0.7)
    run.model.train()
    text = tokenizer.decode(shown_of(canvas[0].tolist(), ids, config.mask_id, config.end_ids))
    return as_shown(text, tokenizer) if sys.stdout.isatty() else inert(text)


def bound_name(model_config, prompt_len=0, rate="t", level="uniform", of_replies=False):
    """What a bound with these settings is called."""
    name = "negative log-likelihood" if model_config.block == 1 else "NELBO"
    settings = [
        f"level {level}" if str(level) != "uniform" else "",
        f"rate {rate}" if str(rate).startswith("slant") else "",
    ]
    settings += [f"after a prompt of {prompt_len}" if prompt_len else ""]
    settings = ", ".join(filter(None, settings))
    return name + " of replies" * bool(of_replies) + (f" ({settings})" if settings else "")


def bits_per_byte(nats, text_share, counts):
    """Extrapolate from nats per token of some windows to a whole split. text_share: the fraction of the
    windows' tokens that count. counts: how many tokens the split has, and bytes (for examples, those of the
    replies).
    """
    return nats * text_share * counts["tokens"] / counts["bytes"] / math.log(2)


def text_share(tokens, own_prompt, special_ids):
    """The fraction of the tokens of windows (N, T) that count: no special ones, and none of a prompt (N, 1)."""
    special = torch.isin(tokens, torch.tensor(special_ids, dtype=tokens.dtype))
    return (~special & (torch.arange(tokens.shape[1]) >= own_prompt)).float().mean().item()


def standard_error(nats, n_maskable, strata=16):
    """Standard error of the bound over seeds, for the same texts, from what `sequence_bounds` of train.py returns. It
    needs two draws. strata: how many texts share stratified levels.
    """
    sums = torch.stack([group.sum(1) for group in nats.split(strata, dim=1)])  # (groups, draws)
    return (sums.var(1).sum() / len(nats)).sqrt().item() / n_maskable.sum().item()


def print_bound(run, sequence_bounds, val_split, counts):
    """Print the bound of a split, or of --eval_tokens of it, with its standard error."""
    config, K = run.config, run.model.config.block
    tokens, own_prompt = validation_windows(val_split, config)
    # Two draws for 256 windows are enough for a standard error; a bound that is exact needs one.
    draws = 1 if K == 1 else 1 + math.ceil(256 / len(tokens))
    settings = {"seed": config.seed, "level": config.level, "rate": config.rate}
    with run.precision:
        bounds, n_maskable = sequence_bounds(run.model, tokens, own_prompt + config.prompt_len.low, draws, **settings)
    nats = (bounds.mean(0).sum() / n_maskable.sum()).item()
    error = "exact" if K == 1 else f"standard error {standard_error(bounds, n_maskable):.4f}"
    n_prompt = own_prompt.sum().item()
    name = bound_name(run.model.config, **run.bound_flags, level=config.level, of_replies=own_prompt.any())
    bits = bits_per_byte(nats, text_share(tokens, own_prompt, run.model.config.special_ids), counts)
    print(
        f"{config.data}: {name} {nats:.4f} nats per token ({error}), {bits:.4f} bits per "
        f"byte, perplexity {math.exp(nats):.3f}; {tokens.numel() - n_prompt:,} validation tokens, "
        f"{draws} draws"
    )


def validation_windows(split, config):
    """The windows of a split that evaluations score, (N, T) int64, and how many tokens of each are a prompt
    of its own, (N, 1).
    """
    n_tokens = config.eval_tokens or (len(split) if config.eval_only else 2**16)
    return tuple(map(torch.from_numpy, spaced_windows(split, config.context, n_tokens)))


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
