"""Puts runs through what days on a machine put them through, and counts.

python tests/endure.py kills --times 200    # SIGKILL at random moments: a quarter of an hour
python tests/endure.py soak --minutes 30    # memory at the end against that after the first minute
python tests/endure.py saving               # the share of a run that its checkpoints take
python tests/endure.py loading              # the share of loading that the check of sums takes
python tests/endure.py processes            # two processes of a thread against one of two threads
python tests/endure.py converting           # the memory that LLaDA-8B takes: 32 GB of disk, 16 of memory
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
from functools import partial
from pathlib import Path
from typing import Literal
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from bench import best_seconds

from data.lib.checkpoint import read_checkpoint, save_checkpoint
from data.lib.errors import command
from data.lib.flags import argument, flag, parse
from data.lib.sample_settings import SHIPPED
from data.lib.tokenizer import BPETokenizer, ByteTokenizer
from data.lib.training import Run
from data.weights import bert
from model import ModelConfig, Transformer, load_checkpoint
from train import TrainConfig

ROOT = Path(__file__).resolve().parents[1]
WHAT = "kills", "soak", "saving", "loading", "processes", "converting"


@dataclass
class EndureConfig:
    what: Literal[WHAT] = argument(f"one of {', '.join(WHAT)}")
    times: int = flag(200, "kills", least=1)
    minutes: float = flag(30.0, "of the soak", least=4)
    seed: int = flag(0, "of the moments")


def start(*flags, launch=(), stderr=subprocess.PIPE, **more):
    line = [sys.executable, *launch, ROOT / "train.py", *" ".join(flags).split()]
    return subprocess.Popen(line, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=stderr, text=True, **more)


def step_in(path):
    return read_checkpoint(path)["step"] if path.exists() else 0


def kills(config):
    """Of a run that saves after each step, killed again and again: no checkpoint is broken, and none is
    further back than the step before the last that was logged.
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
    print(f"\n{config.times} kills: {config.times} checkpoints whole; steps lost: {max(lost)} at most")
    assert max(lost) <= 1


def resident(pid):
    """Megabytes of memory of a process's own; 0 when it is ending."""
    found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else 0


def soak(config):
    """Memory of a run with evaluations and samples, minute by minute: the lower quartile of its seconds,
    since an evaluation needs more for some of them.
    """
    with tempfile.TemporaryDirectory() as folder:
        evals = round(4 * config.minutes)
        process = start(
            f"--data python --max_minutes {config.minutes} --evals {evals} --out_dir {folder}/out",
            stderr=subprocess.DEVNULL,  # nobody reads it
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
    """The seconds of the saves of a ten-minute run with the default flags, and their share of it."""
    with tempfile.TemporaryDirectory() as folder:
        model = Transformer(ModelConfig()).train()
        run = Run(TrainConfig(out_dir=folder), model, torch.device("cpu"), tokenizer=ByteTokenizer())
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        run.optimizer.step()
        (seconds,) = best_seconds(lambda: run.save(1.0))
    evals = run.config.evals
    print(f"{evals} saves of {1000 * seconds:.0f} ms in ten minutes: {evals * seconds / 600:.3%}")


def loading(config):
    """What the check of sums adds to loading two models, until every weight has been read once."""
    tokens = [chr(i) for i in range(256)] + [f"{i:05}" for i in range(50_000)]
    shape = {"n_layer": 12, "n_head": 12, "n_embd": 768, "tied": True}

    def load(path):
        for p in load_checkpoint(path)[0].parameters():
            p.sum()

    def load_unchecked(path):
        with mock.patch("data.lib.checkpoint.byte_sum", return_value=mock.ANY):  # equals every sum
            load(path)

    with tempfile.TemporaryDirectory() as folder:
        bpe = BPETokenizer(tokens, r"\w+")
        big = bert.Network(bert.Network.Config(bpe.vocab_size, bpe.mask_id, **shape))
        save_checkpoint(Path(folder) / "big.pt", big, bpe)
        for name, path in (("the shipped model", SHIPPED), ("RoBERTa's shape", Path(folder) / "big.pt")):
            checked, plain = best_seconds(partial(load, path), partial(load_unchecked, path), repeats=50)
            print(f"{name}: {1000 * checked:.0f} ms, {checked / plain - 1:+.1%} with the sums")


def processes(config):
    """Tokens per second of two processes of one thread, as a share of those of one of two, in turn."""
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
    """A LLaDA of the real shape, of six shards in bfloat16 whose tensors are holes in the files."""
    from test_llada import make_tokenizer, settings_of, shapes_of

    tokenizer = make_tokenizer("a book of few words", 10)
    shape = {"width": 4096, "layers": 32, "heads": 32, "inside": 12288, "length": 4096}
    settings = {**settings_of(tokenizer, **shape), "embedding_size": 126464}
    missing = 126464 - 115 - tokenizer.get_vocab_size()  # as many tokens as the real one has
    tokenizer.add_special_tokens([f"<|reserved {i}|>" for i in range(missing)])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps(settings))
    shapes, shard_of = shapes_of(settings), {}
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
    """Run a script; its seconds, and the most megabytes of memory that it had: of its own, which no file
    holds, and in all.
    """
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
    """The memory that converting LLaDA-8B takes, and then sampling from it in bfloat16."""
    with tempfile.TemporaryDirectory(dir=ROOT) as folder:
        model, out = Path(folder) / "zeros", Path(folder) / "zeros.pt"
        model.mkdir()
        write_zeros(model)
        sampling = "--ckpt", out, "--dtype", "bfloat16", "--length", 16, "--steps", 2
        for name, line in (
            ("converting", (ROOT / "data" / "llada" / "prepare.py", model, "--out", out)),
            ("sampling", (ROOT / "sample.py", *sampling)),
        ):
            seconds, own, whole = largest_memory(*line)
            print(f"{name} {seconds:.0f} s, {own:,.0f} MB of its own, {whole:,.0f} MB with the files' pages")
        print(f"{out.stat().st_size / 1e9:.1f} GB")


def main():
    config = EndureConfig(**parse(EndureConfig, __doc__.splitlines()[0]))
    globals()[config.what](config)


if __name__ == "__main__":
    command(main)
