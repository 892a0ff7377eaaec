"""Settles the flags of sample.py with its checkpoints, or says in a sentence why they don't fit."""

import re
from pathlib import Path

from data.lib.errors import Mistake

OWN = Path("out/ckpt.pt")  # where train.py writes by default
SHIPPED = Path(__file__).parents[1] / "shakespeare" / "ckpt.pt"  # its folder's README.md says how it was made


def check_flags(config, given, prompts):
    """Raise Mistake for flags that don't go together, whatever the model. given: the flags on the command line."""
    several = len(config.ckpt) > 1 or len(config.order) > 1
    if config.score is not None:
        others = given.keys() - {"score", "ckpt", "order", "steps", "tau", "gamma", "block", "device", "dtype"}
        if several or others:
            raise Mistake(
                f"--score: with one --ckpt and one --order, and not with {' '.join(f'--{x}' for x in others)}"
            )
    if re.search("[\ud800-\udfff]", "".join([*prompts, config.suffix])):  # how Python reads bytes that aren't UTF-8
        raise Mistake("--prompt: it is not UTF-8")
    if config.chat and config.suffix:
        raise Mistake(f"--suffix {config.suffix}: not with --chat, which writes replies")
    if config.chat and not prompts and (several or config.num_samples > 1):
        raise Mistake("--chat: a conversation is with one --ckpt, in one --order, of one sample at a time")
    if config.steps is not None and {*config.order} <= {"threshold", "entropy-bound"}:
        raise Mistake(f"--steps {config.steps}: --order {config.order[0]} takes as many steps as it needs")
    if config.guidance and not (config.chat or config.suffix or any(prompts)):
        raise Mistake("--guidance: it needs a --prompt")
    if config.save is not None and Path(config.save).suffix not in (".html", ".svg"):
        raise Mistake(f"--save {config.save}: its name must end in .html or .svg")


def flags_for(config, given, path, model, all_causal):
    """The flags of denoise for each order. Mistake if the model can't follow them, and no other can."""
    K, W = model.config.block, model.config.context
    if config.suffix and K:  # in a prompt, a GPT may fill a hole without seeing what stands after it
        raise Mistake(f"--suffix: the model in {path} fills holes without seeing what stands after them")
    flags = {name: getattr(config, name) for name in ("steps", "tau", "gamma", "block", "guidance")}
    if K == 1:
        wrong = [f"--{name}" for name in ("order", *flags) if given.get(name, 0) not in (["left"], 0)]
        if wrong and all_causal:
            raise Mistake(f"{', '.join(wrong)}: the model in {path} is causal and writes from the left")
        return [{"order": "left"}]
    if K and K % (config.block or 1):
        raise Mistake(f"--block {config.block}: it must divide the blocks of {path}, of {K} tokens")
    if (config.block or 0) >= W:
        raise Mistake(f"--block {config.block}: the model sees {W} tokens at a time, and a block must be smaller")
    return [{"order": order, **flags} for order in config.order]
