"""What sample.py was asked to do, settled with its checkpoints, or refused in a sentence."""

import os
from pathlib import Path

from data.lib.errors import Mistake
from data.lib.prompt import MASK_TAG, MOST, check_prompts
from data.lib.views import check_path

OWN = Path("out/ckpt.pt")  # what train.py writes unless told otherwise


SHIPPED = Path(__file__).parents[1] / "shakespeare" / "ckpt.pt"  # README.md there says how it was made


def check_writing(config, given, prompts):
    """Raise Mistake for flags that cannot work together, before a model is loaded. prompts: texts; none is an
    empty one, and with --chat a conversation on stdin.
    """
    goes_with_score = "score", "ckpt", "order", "steps", "tau", "gamma", "block", "device", "dtype"
    wrong = [name for name in given if name not in goes_with_score]
    if config.score is not None and wrong:
        raise Mistake(f"--score: not with --{wrong[0]}; it is at temperature 1, and nothing is written")
    if config.score is not None and len(config.ckpt) > 1:
        raise Mistake(f"--score: of one model at a time, and --ckpt names {len(config.ckpt)}")
    if config.score is not None and len(config.order) > 1:
        raise Mistake(f"--score: under one order at a time, and --order names {len(config.order)}")
    own_pace = {"threshold", "entropy-bound"}  # orders that take as many steps as they need
    if set(config.order) <= own_pace and config.steps is not None:
        raise Mistake(f"--steps {config.steps}: --order {config.order[0]} takes as many steps as it needs")
    if config.chat:
        check_chat(config, given, prompts)
    else:
        check_prompts(prompts or [""], config.suffix, config.length or MOST)
    prompted = all(MASK_TAG.sub("", text) or config.suffix for text in prompts or [""])
    if config.guidance and not (prompted or config.chat):
        raise Mistake("--guidance: it needs a --prompt to heed")
    if config.save is not None:
        check_path(config.save)


def check_chat(config, given, prompts):
    """Raise Mistake for what does not go with --chat."""
    for name in ("suffix", "judge"):
        if given.get(name):
            raise Mistake(f"--{name} {given[name]}: not with --chat, which writes replies alone")
    several = len(config.ckpt) > 1 or len(config.order) > 1 or config.num_samples > 1
    if several and not prompts:
        raise Mistake("--chat: a conversation is with one --ckpt, in one --order, of one sample at a time")


def default_checkpoint():
    """The path of the reader's own checkpoint, or else of the shipped one."""
    for path in OWN, SHIPPED:
        if path.exists():
            return os.path.relpath(path)
    raise Mistake(f"{OWN}: there is no checkpoint yet; `python train.py` makes one")


def flags_for(config, given, path, model, canvases, all_causal):
    """The flags of denoise, for each order, as the model in path can follow them on canvases, lists of ids.
    Mistake if it cannot. Beside other models a causal one writes as it must: the flags are for the others.
    """
    K, W, longest = model.config.block, model.config.context, max(map(len, canvases))
    # Holes in the middle of a text a GPT fills from what stands before them; for these two that is no answer.
    if (config.suffix or model.config.kinds) and any(unseen(ids, model.config) for ids in canvases):
        name = "suffix" if config.suffix else "prompt"
        raise Mistake(f"--{name}: the model in {path} fills holes without seeing what stands after them")
    if K == 1:
        names = "order", "steps", "tau", "gamma", "block", "guidance"
        wrong = [name for name in names if given.get(name, 0) not in (["left"], 0)]
        if wrong and all_causal:
            reason = "is causal and writes from the left, one token a step"
            value = " ".join(given["order"]) if wrong[0] == "order" else given[wrong[0]]
            raise Mistake(f"--{wrong[0]} {value}: the model in {path} {reason}")
        return [{"order": "left"}]
    if K and K % (config.block or 1):
        raise Mistake(f"--block {config.block}: it must divide the blocks of {path}, of {K} tokens")
    if (config.block or 0) > W or (config.block == W < longest):
        raise Mistake(f"--block {config.block}: the model sees {W} tokens at a time")
    flags = {name: getattr(config, name) for name in ("steps", "tau", "gamma", "block", "guidance")}
    return [{"order": order, **flags} for order in config.order]


def unseen(ids, config):
    """Whether a model fills a hole of ids without seeing some of the text, in a block after the hole's."""
    text = [i for i, token in enumerate(ids) if token not in (config.mask_id, *config.special_ids)]
    last = max(text, default=0)
    return config.mask_id in ids[: last // (config.block or len(ids)) * (config.block or len(ids))]
