"""Settles the flags of sample.py with its checkpoints, or says in a sentence why they don't fit."""

import os
from pathlib import Path

from data.lib.errors import Mistake

OWN = Path("out/ckpt.pt")  # where train.py writes by default
SHIPPED = Path(__file__).parents[1] / "shakespeare" / "ckpt.pt"  # its folder's README.md says how it was made


def check_flags(config, given, prompts):
    """Raise Mistake for flags that don't go together, whatever the model. given: the flags on the command line."""
    several = len(config.ckpt) > 1 or len(config.order) > 1
    if config.score is not None:
        for name in given:
            if name not in ("score", "ckpt", "order", "steps", "tau", "gamma", "block", "device", "dtype"):
                raise Mistake(f"--score: not with --{name}; it is at temperature 1, and nothing is written")
        if several:
            raise Mistake("--score: it takes one --ckpt and one --order")
    if config.chat:
        if config.suffix:
            raise Mistake(f"--suffix {config.suffix}: not with --chat, which writes replies")
        if not prompts and (several or config.num_samples > 1):
            raise Mistake("--chat: a conversation is with one --ckpt, in one --order, of one sample at a time")
    if config.steps is not None and {*config.order} <= {"threshold", "entropy-bound"}:
        raise Mistake(f"--steps {config.steps}: --order {config.order[0]} takes as many steps as it needs")
    if config.guidance and not (config.chat or config.suffix or any(prompts)):
        raise Mistake("--guidance: it needs a --prompt")
    if config.save is not None:
        path = Path(config.save)
        if path.suffix not in (".html", ".svg") or not os.access(path.parent, os.W_OK):
            raise Mistake(f"--save {path}: its name must end in .html or .svg, and its folder must be writable")


def default_checkpoint():
    """The path of the user's own checkpoint, or else of the one that comes with the project."""
    for path in OWN, SHIPPED:
        if path.exists():
            return os.path.relpath(path)
    raise Mistake(f"{OWN}: there is no checkpoint yet; `python train.py` makes one")


def flags_for(config, given, path, model, canvases, all_causal):
    """The flags of denoise for each order. Mistake if the model can't follow them, and no other can."""
    K, W = model.config.block, model.config.context
    if config.suffix and K:  # in a prompt, a GPT may fill a hole without seeing what stands after it
        raise Mistake(f"--suffix: the model in {path} fills holes without seeing what stands after them")
    if K == 1:
        names = "order", "steps", "tau", "gamma", "block", "guidance"
        wrong = [name for name in names if given.get(name, 0) not in (["left"], 0)]
        if wrong and all_causal:
            value = " ".join(config.order) if wrong[0] == "order" else given[wrong[0]]
            raise Mistake(f"--{wrong[0]} {value}: the model in {path} is causal and writes from the left")
        return [{"order": "left"}]
    if K and K % (config.block or 1):
        raise Mistake(f"--block {config.block}: it must divide the blocks of {path}, of {K} tokens")
    if (config.block or 0) >= W < max(map(len, canvases)):
        raise Mistake(f"--block {config.block}: the model sees {W} tokens at a time, and a block must be smaller")
    flags = {name: getattr(config, name) for name in ("steps", "tau", "gamma", "block", "guidance")}
    return [{"order": order, **flags} for order in config.order]
