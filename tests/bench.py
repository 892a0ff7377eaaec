"""Measures what the README claims, and prints one table.

    python tests/bench.py             # speed: a few minutes
    python tests/bench.py --runs      # and the training runs themselves: twenty minutes more

Every speed is the best of several passes, and a ratio's two sides are timed in turn.
"""

import argparse
import re
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

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


def sampling_cost(device, B=16, T=256, steps=64):
    """Seconds of denoising and of as many bare forward passes of the same batch."""
    torch.manual_seed(0)
    model = Transformer(ModelConfig(**{k: getattr(TrainConfig, k) for k in ("n_layer", "n_head", "n_embd")}))
    model = model.to(device).eval()
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
        train = [sys.executable, ROOT / "train.py", "--out_dir", out_dir, *flags]
        subprocess.run(train, check=True, stdout=sys.stderr)
        minutes = (time.perf_counter() - start) / 60
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
        score = [
            sys.executable,
            ROOT / "train.py",
            "--eval_only",
            "--init_from",
            f"{out_dir}/ckpt.pt",
            *flags[:2],
        ]
        printed = subprocess.run(score, check=True, capture_output=True, text=True).stdout
    return minutes, memory, float(re.search(r"NELBO ([\d.]+)", printed)[1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", action="store_true", help="train.py on python and shakespeare too")
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    device = pick_device(options.device)
    rows = []

    large = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 64}
    for name, flags in (("auto", {}), ("float32", {"dtype": "float32"})):
        speed, share, peak = training_speed(device, **large, **flags)
        rows.append((f"training step, 6 layers of 384, batch 64 x 256, {name}", f"{speed:,.0f} tokens/s",
                     f"{share:.0%} of the {peak / 1e9:,.0f} GFLOP/s of a bare matrix product"))  # fmt: skip
    speed, share, peak = training_speed(device)
    rows.append(
        ("training step, default model and batch", f"{speed:,.0f} tokens/s", f"{share:.0%} of the same")
    )
    sample, passes = sampling_cost(device)
    rows.append(("sampling 16 x 256 in 64 steps", f"{sample:.2f} s",
                 f"{sample / passes:.2f} x the {passes:.2f} s of 64 bare forward passes"))  # fmt: skip
    if options.runs:
        for flags in (["--data", "python"], ["--data", "shakespeare", "--max_minutes", "5"]):
            minutes, memory, nats = training_run(*flags)
            rows.append((f"train.py {' '.join(flags)}", f"{nats:.3f} nats per token",
                         f"{minutes:.1f} minutes, {memory:.2f} GB"))  # fmt: skip
    for row in rows:
        print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
