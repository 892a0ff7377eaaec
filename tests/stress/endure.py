"""Checks that training survives days on a machine: kills, memory, disks, several processes, large models.

python tests/stress/endure.py kills --times 200    # kill a run at random moments: a quarter of an hour
python tests/stress/endure.py soak --minutes 30    # memory of a run, minute by minute
python tests/stress/endure.py saving               # the fraction of a run that its checkpoints take: seconds
python tests/stress/endure.py processes            # two processes of one thread beside one of two: five minutes
python tests/stress/endure.py converting           # memory that LLaDA-8B takes: 3 minutes, 32 GB of disk
"""

import csv
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from bench import best_seconds

from data.lib.checkpoint import read_checkpoint
from data.lib.errors import command
from data.lib.flags import argument, flag, parse
from data.lib.tokenizer import ByteTokenizer
from data.lib.training import Run
from model import ModelConfig, Transformer
from train import TrainConfig

ROOT = Path(__file__).resolve().parents[2]
WHAT = "kills", "soak", "saving", "processes", "converting"


@dataclass
class EndureConfig:
    what: Literal[WHAT] = argument(f"one of {', '.join(WHAT)}")
    times: int = flag(200, "kills: how often the run is killed", least=1)
    minutes: float = flag(30.0, "soak: how long the run takes", least=4)
    seed: int = flag(0, "kills: for the moments")


def start(*flags, launch=(), stderr=subprocess.PIPE, **more):
    line = [sys.executable, *launch, ROOT / "train.py", *" ".join(flags).split()]
    return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=stderr, text=True, **more)


def step_in(path):
    return read_checkpoint(path)["step"] if path.exists() else 0


def kills(config):
    """Kill a run that saves after each step, again and again. No checkpoint may be broken, and none may be further back
    than the step before the last one in the log.
    """
    rng, lost = random.Random(config.seed), []
    with tempfile.TemporaryDirectory() as folder:
        last, log = Path(folder) / "last.pt", Path(folder) / "log.csv"
        shape = "--n_layer 2 --n_embd 32 --n_head 1 --context 64 --batch_size 4 --eval_tokens 64 --log_every 1"
        flags = f"--data python {shape} --max_iters 100000 --evals 100000 --out_dir {folder}"
        for number in range(config.times):
            process, before = start(flags, "--init_from resume" if last.exists() else ""), step_in(last)
            while process.poll() is None and step_in(last) == before:  # the first step of this life
                time.sleep(0.05)
            time.sleep(rng.random() / 2)
            process.kill()
            process.wait()
            assert process.returncode == -signal.SIGKILL, process.stderr.read()
            with open(log) as file:
                steps = [row["step"] for row in csv.DictReader(file)]
            logged = max(int(step) for step in steps if step and step.isdecimal())
            lost.append(logged - step_in(last))
            print(f"\r{number + 1} kills, at step {step_in(last):,}", end="", file=sys.stderr)
    print(f"\n{config.times} kills: every checkpoint is whole; steps lost: {max(lost)} at most")
    assert max(lost) <= 1


def resident(pid):
    """Megabytes of memory that belong to a process alone; 0 when it is ending."""
    found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else 0


def soak(config):
    """Watch the memory of a run with evaluations and samples. A minute's figure is the lower quartile over its seconds,
    because an evaluation needs more for some of them.
    """
    with tempfile.TemporaryDirectory() as folder:
        evals = round(4 * config.minutes)
        process = start(
            f"--data python --max_minutes {config.minutes} --evals {evals} --out_dir {folder}/out",
            stderr=subprocess.DEVNULL,
        )
        minutes = []
        while process.poll() is None:
            began, sizes = time.monotonic(), []
            while time.monotonic() - began < 60 and process.poll() is None:
                sizes.append(resident(process.pid))
                time.sleep(1)
            if process.poll() is None:
                minutes.append(sorted(sizes)[len(sizes) // 4])
                print(f"minute {len(minutes)}: {minutes[-1]:.0f} MB, {max(sizes):.0f} at most", flush=True)
    print(f"{minutes[-1] / minutes[1] - 1:+.1%} from the second minute to the last")


def saving(config):
    """Time a checkpoint of the default model, and print what fraction of a ten-minute run its checkpoints take."""
    with tempfile.TemporaryDirectory() as folder:
        model = Transformer(ModelConfig()).train()
        run = Run(TrainConfig(out_dir=folder), model, torch.device("cpu"), tokenizer=ByteTokenizer())
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        run.optimizer.step()
        (seconds,) = best_seconds(lambda: run.save(1.0))
    evals = run.config.evals
    print(f"{evals} saves of {1000 * seconds:.0f} ms in ten minutes: {evals * seconds / 600:.3%}")


def processes(config):
    """Compare the tokens per second of two processes of one thread with those of one process of two, in turn."""
    pace = {"one": [], "two": []}
    for _ in range(3):
        for name in pace:
            with tempfile.TemporaryDirectory() as folder:
                n = {"one": 1, "two": 2}[name]
                launch = ("-m torch.distributed.run --standalone --nproc_per_node 2".split()) * (n - 1)
                environment = {**os.environ, "OMP_NUM_THREADS": str(3 - n)}
                flags = f"--data python --max_iters 60 --evals 1 --eval_tokens 256 --out_dir {folder}/out"
                start(flags, launch=launch, env=environment).communicate()
                with open(Path(folder) / "out" / "log.csv") as file:
                    pace[name] += [float(row["tokens_per_second"]) for row in csv.DictReader(file)][1:-1]
    one, two = (sorted(each)[-len(each) // 2] for each in pace.values())
    print(f"one process {one:,.0f}, two {two:,.0f} tokens/s: {two / one:.2f}")


def write_zeros(folder):
    """Write a LLaDA of the real shape, in six bfloat16 shards. The files are sparse, so the zeros take no space."""
    sys.path.insert(0, str(ROOT / "tests"))
    from model_files import llada_settings, llada_shapes, make_tokenizer

    tokenizer = make_tokenizer("a book of few words", 10)
    shape = {"width": 4096, "layers": 32, "heads": 32, "inside": 12288, "length": 4096}
    settings = {**llada_settings(tokenizer, **shape), "embedding_size": 126464}
    missing = 126464 - 115 - tokenizer.get_vocab_size()  # up to the size of the real vocabulary
    tokenizer.add_special_tokens([f"<|reserved {i}|>" for i in range(missing)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(settings))
    shapes, shard_of = llada_shapes(settings), {}
    for i in range(6):
        name, header, at = f"model-{i + 1:05}-of-00006.safetensors", {}, 0
        for tensor in list(shapes)[i::6]:
            n = 2 * math.prod(shapes[tensor])
            header[tensor] = {"dtype": "BF16", "shape": shapes[tensor], "data_offsets": [at, at + n]}
            at, shard_of[tensor] = at + n, name
        text = json.dumps(header).encode()
        (folder / name).write_bytes(len(text).to_bytes(8, "little") + text)
        os.truncate(folder / name, 8 + len(text) + at)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shard_of}))


def largest_memory(*line):
    """Run a script: its seconds, and its peak memory in MB, without pages of files and with them."""
    began, most = time.time(), {"RssAnon": 0, "VmRSS": 0}
    process = subprocess.Popen([sys.executable, *map(str, line)], cwd=ROOT, stdout=subprocess.DEVNULL)
    while process.poll() is None:
        status = Path(f"/proc/{process.pid}/status").read_text()
        for name, kilobytes in re.findall(r"(RssAnon|VmRSS):\s+(\d+)", status):
            most[name] = max(most[name], int(kilobytes) / 1024)
        time.sleep(0.02)
    assert process.returncode == 0
    return time.time() - began, *most.values()


def converting(config):
    """Measure the memory for converting LLaDA-8B and for sampling from it in bfloat16."""
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        model, out = Path(folder) / "zeros", Path(folder) / "zeros.pt"
        model.mkdir()
        write_zeros(model)
        sampling = "--ckpt", out, "--dtype", "bfloat16", "--length", 16, "--steps", 2
        for name, line in (
            ("converting", (ROOT / "data" / "weights" / "prepare.py", model, "--out", out)),
            ("sampling", (ROOT / "sample.py", *sampling)),
        ):
            seconds, own, whole = largest_memory(*line)
            print(f"{name} {seconds:.0f} s, {own:,.0f} MB of its own, {whole:,.0f} MB with pages of files")
        print(f"{out.stat().st_size / 1e9:.1f} GB")


def main():
    config = EndureConfig(**parse(EndureConfig, __doc__))
    globals()[config.what](config)


if __name__ == "__main__":
    command(main)
