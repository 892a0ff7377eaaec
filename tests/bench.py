"""Measures what the README claims, and prints one table.

    python tests/bench.py             # speed: a few minutes
    python tests/bench.py --runs      # and the training runs themselves: twenty minutes more

Every speed is the best of several passes, and a ratio's two sides are timed in turn.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from data.flags import command, flag, parse
from model import ModelConfig, Transformer, autocast, pick_device
from sample import denoise
from train import Run, TrainConfig, draw_batch

ROOT = Path(__file__).resolve().parents[1]


def best_seconds(*functions, repeats=5):
    """The shortest time of each function, called in turn."""
    times = [[] for _ in functions]
    for _ in range(repeats + 1):  # the first round warms up
        for function, seconds in zip(functions, times):
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    return [min(seconds[1:]) for seconds in times]


def matmul_flops(device, precision):
    """Floating-point operations per second of a large matrix product in the precision of training."""
    a, b = torch.randn(2, 2048, 2048, device=device)
    with precision:
        a, b = a.to(precision.fast_dtype), b.to(precision.fast_dtype)
        (seconds,) = best_seconds(lambda: a @ b.T, repeats=20)
    return 2 * 2048**3 / seconds


def step_flops(model, config):
    """Those of the matrix products of one training step: forward once, backward twice."""
    matrices = sum(p.numel() for p in model.blocks.parameters() if p.ndim == 2)
    attention = 2 * config.n_layer * config.block_size * config.n_embd
    return 6 * (matrices + attention) * config.batch_size * config.block_size


def training_speed(device, **flags):
    """Tokens per second of one training step, and the share of the matrix products' peak it reaches."""
    torch.manual_seed(0)
    config = TrainConfig(max_iters=100, **flags)
    shape = {name: getattr(config, name) for name in ("n_layer", "n_head", "n_embd", "block_size")}
    model = Transformer(ModelConfig(**shape)).to(device)
    if config.compile:
        model.compile()
    run = Run(config, model, device)
    batch = draw_batch(torch.randint(0, 256, (100_000,)).numpy(), config, torch.Generator().manual_seed(0))
    (seconds,) = best_seconds(lambda: run.update(batch), repeats=4)
    peak = matmul_flops(device, run.precision)
    return batch[0].numel() / seconds, step_flops(model, config) / seconds / peak, peak


def sampling_cost(device, B=16, T=256, steps=64, **shape):
    """Seconds of denoising and of as many bare forward passes of the same batch."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**shape)).to(device).eval()
    canvas = torch.full((B, T), model.config.mask_id, device=device)

    def sample():
        for _ in denoise(model, canvas, steps, temperature=0.8, generator=torch.Generator().manual_seed(0)):
            pass

    def passes():
        for _ in range(steps):
            model(canvas)

    with torch.no_grad(), autocast(device):
        return best_seconds(sample, passes, repeats=3)


def training_run(*flags):
    """Minutes, peak memory in GB and final NELBO of a training run, and the NELBO of all its val split."""
    with tempfile.TemporaryDirectory() as out_dir:
        start = time.perf_counter()
        train = [sys.executable, str(ROOT / "train.py"), "--out_dir", out_dir, *flags]
        _, status, usage = os.wait4(subprocess.Popen(train, stdout=sys.stderr).pid, 0)
        minutes = (time.perf_counter() - start) / 60
        score = [sys.executable, ROOT / "train.py", "--eval_only", "--init_from", f"{out_dir}/ckpt.pt"]
        printed = subprocess.run(score, check=True, capture_output=True, text=True).stdout
    return minutes, usage.ru_maxrss / 2**20, float(re.search(r"NELBO ([\d.]+)", printed)[1])


@dataclass
class BenchConfig:
    runs: bool = flag(False, "train.py on python and on shakespeare too")
    device: str = flag("auto", "auto (cuda, then mps, then cpu) or a device's name")


def main():
    config = BenchConfig(**parse(BenchConfig, __doc__.splitlines()[0]))
    device = pick_device(config.device)
    large = {"n_layer": 6, "n_head": 6, "n_embd": 384}
    rows = []
    for name, flags in (
        ("6 layers, 6 heads, width 384, batch 64", {**large, "batch_size": 64}),
        ("the same in float32", {**large, "batch_size": 64, "dtype": "float32"}),
        ("the default", {}),
    ):
        speed, share, peak = training_speed(device, **flags)
        measure = f"{share:.0%} of the {peak / 1e9:,.0f} GFLOP/s of a bare matrix product"
        rows.append((f"training step, {name}", f"{speed:,.0f} tokens/s", measure))
    for name, shape in (("6 layers, 6 heads, width 384", large), ("the default", {})):
        sample, passes = sampling_cost(device, **shape)
        measure = f"{sample / passes:.2f} x the {passes:.2f} s of 64 bare forward passes"
        rows.append((f"sampling 16 x 256 in 64 steps, {name}", f"{sample:.2f} s", measure))
    if config.runs:
        for flags in (["--data", "python"], ["--data", "shakespeare", "--max_minutes", "5"]):
            minutes, memory, nats = training_run(*flags)
            measure = f"{minutes:.1f} minutes, {memory:.2f} GB"
            rows.append((f"train.py {' '.join(flags)}", f"{nats:.3f} nats per token", measure))
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    command(main)
