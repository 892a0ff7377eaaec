"""What the experiments share: their flags, trained models, texts and bounds, and the figure to draw.

An experiment is a function of (config, device) that `main` calls. It prints what it measures and draws it as an SVG. It
trains the models that it doesn't find in out-NAME/.
"""

import csv
import dataclasses
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch

from data.lib.corpus import DATA, load_corpus, spaced_windows
from data.lib.errors import command
from data.lib.flags import flag, parse
from data.lib.machine import autocast, device_of, pick_device
from sample import denoise
from train import nelbo

ROOT = Path(__file__).resolve().parents[2]
BYTES = "python-bytes"  # the default corpus in bytes, of which most figures are
EARLIER = "--n_embd 192 --batch_size 16 --widen 0"  # the default when most figures were drawn
QUICK_MODEL = "--n_layer 1 --n_head 1 --n_embd 16 --batch_size 4 --max_iters 3 --eval_tokens 256"
TAUS = (0.2, 0.4, 0.6, 0.8, 0.9, 0.95, 0.99)
OWN_PACE = {  # the orders that take as many steps as they need, and the values of their flag
    "threshold": ("tau", TAUS),
    "entropy-bound": ("gamma", (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)),
}


def main(experiment, **more):
    """Run an experiment as a command. more: further flags and their defaults; an int is a count, a str is a name."""
    fields = []
    for name, default in more.items():
        says = {"help": f"how many {name}", "least": 1} if type(default) is int else {"help": f"the {name} to use"}
        fields.append((name, type(default), flag(default, **says)))
    fields += [("quick", bool, flag(False, "check that it works, with tiny models, in a temporary folder"))]
    fields += [("device", str, flag("auto", "auto (cuda, then mps, then cpu) or a device's name"))]
    command(lambda: run(experiment, dataclasses.make_dataclass("Config", fields)))


def run(experiment, config_class):
    config = config_class(**parse(config_class, sys.modules["__main__"].__doc__))
    device, here = pick_device(config.device), Path.cwd()
    if not config.quick:
        os.chdir(ROOT)
        if not (DATA / BYTES / "meta.json").exists():
            run_script(config, "data/python/prepare.py", f"--name {BYTES} --tokenizer bytes")
        return experiment(config, device)
    config.texts, config.seeds = 2, 1
    with tempfile.TemporaryDirectory() as folder, mock.patch("data.lib.corpus.DATA", Path(folder, "data")):
        os.chdir(folder)
        try:
            Path(".github").mkdir()
            for corpus in ("shakespeare", BYTES):
                run_script(config, "data/text/prepare.py", f"{ROOT}/train.py --name {corpus}")
            experiment(config, device)
        finally:
            os.chdir(here)


def run_script(config, script, flags):
    """Run a script of the project. With --quick that is in this process, which knows the temporary corpora."""
    print(f"python {script} {flags}", file=sys.stderr)
    if config.quick:
        with mock.patch("sys.argv", [script, *flags.split()]):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    elif subprocess.run([sys.executable, ROOT / script, *flags.split()], stdout=sys.stderr).returncode:
        sys.exit(2)  # the script has said why


def context_of(config):
    return 32 if config.quick else 256


def train_model(config, out_dir, flags, run=run_script):
    """Train a model with these flags of train.py, of bytes unless they name a corpus; return its checkpoint's path.

    run: how the script is called, like run_script.
    """
    folder, unfinished = Path(out_dir), Path(f"{out_dir}-unfinished")
    if not (folder / "ckpt.pt").exists():
        shutil.rmtree(unfinished, ignore_errors=True)  # from a run that was stopped
        flags = f"--data {BYTES} --context {context_of(config)} --device {config.device} {flags} --out_dir {unfinished}"
        run(config, "train.py", f"{flags} {QUICK_MODEL}" if config.quick else flags)
        unfinished.rename(folder)
    return folder / "ckpt.pt"


def windows(corpus, T, n_tokens=10**9):
    """About n_tokens of a corpus's validation split, or all of it, as evenly spaced windows (N, T)."""
    return torch.from_numpy(spaced_windows(load_corpus(corpus)[1], T, n_tokens)[0])


def bound(model, tokens, **options):
    """The bound of texts (N, T) in nats per token, in the precision that is fast on this machine."""
    with autocast(device_of(model)):
        return nelbo(model, tokens, **options)


def write(model, n, T, steps=None, order="random", **flags):
    """Write n texts of T tokens from empty canvases: the texts (n, T), and the number of forward passes."""
    passes = []
    hook = model.layers[0].register_forward_hook(lambda *_: passes.append(1))
    canvas = torch.full((n, T), model.config.mask_id, device=device_of(model))
    with autocast(device_of(model)):
        *_, canvas = denoise(model, canvas, steps, order, **flags)
    hook.remove()
    return canvas.cpu(), len(passes)


def pair_entropy(texts):
    """Entropy of the pairs of successive bytes in texts (N, T), in bits. It is low in texts that repeat themselves."""
    pairs = (texts[:, :-1] * 256 + texts[:, 1:]).flatten().bincount()
    p = pairs[pairs > 0] / pairs.sum()
    return -(p * p.log2()).sum().item()


def evaluations(path, column):
    """A column of the log beside a checkpoint, such as "step", and nats per token, both at the evaluations: arrays."""
    with open(path.with_name("log.csv"), newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["val_nats_per_token"]]
    return [np.array([float(row[name]) for row in rows]) for name in (column, "val_nats_per_token")]


def plot(name, n_panels=1, n_rows=1):
    """The empty panels of a figure, row by row, and a function that writes .github/NAME.svg."""
    try:
        import matplotlib
    except ImportError:
        print("matplotlib isn't installed (tests/requirements.txt), so no figure is drawn", file=sys.stderr)
        return [mock.MagicMock() for _ in range(n_panels + 1)]
    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "setitem"  # so that the same figure is the same file
    from matplotlib import pyplot

    n = n_panels // n_rows
    figure, panels = pyplot.subplots(n_rows, n, figsize=(5 * n, 4 * n_rows), layout="constrained", squeeze=False)

    def save():
        figure.savefig(f".github/{name}.svg", format="svg", metadata={"Date": None}, facecolor="white")
        pyplot.close(figure)

    return *panels.flatten(), save


def log_ticks(panel, ticks, name):
    """Make a panel's x-axis logarithmic, with these ticks and this label."""
    panel.set(xscale="log", xlabel=name)
    panel.set_xticks(ticks, labels=[f"{tick:,}" for tick in ticks])
    panel.minorticks_off()
