"""Make a checkpoint small: keep its weights, in bfloat16, and drop whatever is only needed to resume."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.lib.checkpoint import save_checkpoint
from data.lib.flags import argument, script
from model import load_checkpoint


@script
def main(ckpt: str = argument("a checkpoint"), out: str = argument("the small one to write")):
    model, tokenizer, checkpoint = load_checkpoint(ckpt, keep=torch.bfloat16)
    kept = {name: checkpoint[name] for name in ("train", "bound", "chat", "step", "minutes") if name in checkpoint}
    kept.get("train", {}).pop("out_dir", None)  # a path on the machine where it was trained
    save_checkpoint(out, model.to(torch.bfloat16), tokenizer, **kept)
    print(f"{out}: {Path(out).stat().st_size / 1e6:.1f} MB")
