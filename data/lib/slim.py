"""Make a checkpoint small: its weights in bfloat16, and nothing that only resuming needs."""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.lib.checkpoint import save_checkpoint
from data.lib.errors import command
from model import load_checkpoint


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ckpt", help="a checkpoint")
    parser.add_argument("out", help="the small one to write")
    flags = parser.parse_args()
    model, tokenizer, checkpoint = load_checkpoint(flags.ckpt, keep=torch.bfloat16)
    kept = {name: checkpoint[name] for name in ("train", "bound", "chat", "step", "minutes") if name in checkpoint}
    kept.get("train", {}).pop("out_dir", None)  # a path on the machine where it was trained
    save_checkpoint(flags.out, model.to(torch.bfloat16), tokenizer, **kept)
    print(f"{flags.out}: {Path(flags.out).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    command(main)
