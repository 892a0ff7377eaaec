"""Make a checkpoint small: its weights in bfloat16, and nothing that only resuming needs."""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.lib.checkpoint import save_checkpoint
from data.lib.errors import command
from data.lib.flags import argument, parse
from model import load_checkpoint


@dataclass
class SlimConfig:
    ckpt: str = argument("a checkpoint")
    out: str = argument("the small one to write")


def main():
    config = SlimConfig(**parse(SlimConfig, __doc__.splitlines()[0]))
    model, tokenizer, checkpoint = load_checkpoint(config.ckpt, keep=torch.bfloat16)
    kept = {name: checkpoint[name] for name in ("train", "bound", "chat", "step", "minutes") if name in checkpoint}
    kept.get("train", {}).pop("out_dir", None)  # a path on the machine where it was trained
    save_checkpoint(config.out, model.to(torch.bfloat16), tokenizer, **kept)
    print(f"{config.out}: {Path(config.out).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    command(main)
