"""What a command was asked to do, settled with what its checkpoint is; or refused, in a sentence."""

import dataclasses
from pathlib import Path

import torch
import torch.distributed as dist

from data.lib.chat import Chat
from data.lib.corpus import canvas_len
from data.lib.errors import Mistake
from data.lib.flags import Attention, Level, Rate, Span, from_plain
from data.lib.machine import pick_device
from data.lib.processes import size

# --- who sees whom -------------------------------------------------------------------------------


def attention_of(config):
    """The Attention of a ModelConfig."""
    if config.block is None:
        return Attention("canvas" if config.shift_id is None else "shifted")
    causal = config.block == 1 and config.shift_id is not None
    return Attention("causal", 1) if causal else Attention("block", config.block)


def attention_fields(attention, mask_id, old=None):
    """The fields that give a ModelConfig this Attention. A model that goes on with it, whose config is old,
    keeps its shift, the taps of its convolution, and the rows of its table of positions.
    """
    shift_id = None if old is None else old.shift_id
    if attention.kind in ("causal", "shifted") and shift_id is None:
        shift_id = mask_id
    fields = {"block": attention.K, "shift_id": shift_id}
    if old is None:
        return fields
    fields |= {"conv_right": old.conv_right}
    if old.learned_positions:
        fields |= {"context": old.context + old.n_more - dataclasses.replace(old, **fields).n_more}
    return fields


# --- training ------------------------------------------------------------------------------------

# The fields that shape the model; a model that is loaded has its own.
SHAPE = ("n_layer", "n_head", "n_embd", "conv")


def settle(given, config_class, methods, load_checkpoint):
    """Combine the flags given, the method's, and what the checkpoint of --init_from was trained with:
    (config, model, tokenizer, checkpoint), the latter three None for a run from scratch.
    """
    method = methods[given.get("method", config_class.method)]
    method = {name: getattr(from_plain(config_class, method), name) for name in method}
    config = config_class(**{**method, **given})
    if config.init_from == "scratch":
        return without_noise(one_block(with_canvas(config, given)), given), None, None, None
    resume = config.init_from == "resume"
    path = Path(config.out_dir) / "last.pt" if resume else Path(config.init_from)
    changes = {"dropout": given["dropout"]} if "dropout" in given else {}
    # Training needs float32. A model that is only scored may stay as it is, larger than memory.
    keep = getattr(torch, config.dtype, None) if config.eval_only else None
    model, tokenizer, checkpoint = load_checkpoint(path, keep=keep, **changes)
    before, shifted = attention_of(model.config), model.config.shift_id is not None
    attention = given.get("attention", before)
    if "method" in given and not resume:
        attention = config.attention
    if attention.K == model.config.context or (shifted and attention.kind == "canvas"):
        attention = Attention("shifted" if shifted else "canvas")
    if "attention" in given:
        given = {**given, "attention": attention}
    if attention != before and not resume:
        changes |= attention_fields(attention, tokenizer.mask_id, model.config)
        model, tokenizer, checkpoint = load_checkpoint(path, keep=keep, **changes)
    trained, longest = checkpoint.get("train", {}), model.config.context
    if not isinstance(trained, dict) or type(trained.get("context", longest)) is not int:
        raise Mistake(f"{path}: cannot be resumed (its flags are none of a run's)")
    kept = trained if resume else {}
    if config.eval_only:  # the corpus that it was trained on, and whole texts
        kept = {"data": trained.get("data", config.data), "level": "uniform", "prompt_len": "0"}
    shape = {name: getattr(model.config, name) for name in SHAPE}
    model_fields = {
        "context": min(trained.get("context", longest), longest),
        "out_dir": config.out_dir,
        "shard": False,  # another number of processes may go on
        "attention": str(attention_of(model.config)),
        **shape,
    }
    if resume and not config.eval_only:  # the run has its flags already
        method = {}
    try:  # flags win over the model, the model over the method, and the method over the defaults
        config = from_plain(config_class, {**kept, **model_fields})
        chosen = {name: value for name, value in method.items() if name not in model_fields}
        config = dataclasses.replace(config, **{**chosen, **given})
    except (TypeError, ValueError, AttributeError) as error:
        raise Mistake(f"{path}: cannot be resumed ({error})") from None
    if config.context > longest:
        raise Mistake(f"--context {config.context}: the model in {path} sees at most {longest} tokens")
    for name, value in {**shape, **({"attention": before} if resume else {})}.items():
        if getattr(config, name) != value:
            raise Mistake(f"--{name} {getattr(config, name)}: the model in {path} has {value}")
    if resume and "method" in given and config.method != trained.get("method", config.method):
        raise Mistake(f"--method {config.method}: the run in {path} has {trained['method']}")
    if resume and not config.eval_only and config.data != trained.get("data", config.data):
        reason = f"the run in {path} reads {trained['data']}; --init_from {path} takes its model elsewhere"
        raise Mistake(f"--data {config.data}: {reason}")
    return with_canvas(without_noise(config, given), given), model, tokenizer, checkpoint


def one_block(config):
    """The config; but blocks of the whole context are a canvas."""
    whole = config.attention.kind == "block" and config.attention.K == config.context
    return dataclasses.replace(config, attention=Attention("canvas")) if whole else config


def with_canvas(config, given):
    """The config; but where the corpus has canvases, whose places say what their tokens are, a window is one,
    and all of it becomes holes.
    """
    T = canvas_len(config.data)
    if not T:
        return config
    if given.get("context", T) != T:
        raise Mistake(f"--context {given['context']}: a canvas of --data {config.data} has {T} tokens")
    keeps = "prompt_len" in given or config.init_from == "resume"
    prompt_len = config.prompt_len if keeps else Span(0, 0)
    return dataclasses.replace(config, context=T, prompt_len=prompt_len)


def without_noise(config, given):
    """The config; but with blocks of one token every token is a hole, and there is no noise to choose."""
    if config.attention.K != 1:
        return config
    for name in ("level", "one_level", "rate", "visible"):
        if given.get(name, Rate("t")) not in (Rate("t"), 0):
            raise Mistake(f"--{name} {given[name]}: with --attention {config.attention} each token is a hole")
    config = dataclasses.replace(config, rate=Rate("t"), one_level=False)  # a method may have set them
    if config.eval_only:
        return dataclasses.replace(config, level=Level("uniform"))
    if "prompt_len" not in given and config.init_from != "resume":
        config = dataclasses.replace(config, prompt_len=Span(0, 0))
    # Every token is a hole at t = 1, where the weights elbo and mean are one number.
    return dataclasses.replace(config, level=Level("fixed", 1.0), weight="mean")


def model_config(config_class, config, tokenizer):
    """The ModelConfig of a new model."""
    shape = {name: getattr(config, name) for name in (*SHAPE, "context", "dropout")}
    shape |= attention_fields(config.attention, tokenizer.mask_id)
    shape |= {"special_ids": tokenizer.special_ids, "kinds": tokenizer.kinds}
    return config_class(tokenizer.vocab_size, tokenizer.mask_id, **shape)


def with_corpus(config, given, model, tokenizer, corpus_tokenizer, meta, checkpoint):
    """The config for this model on this corpus, and the chat template of either. Mistake if they don't go
    together.
    """
    if tokenizer is not None and tokenizer.state != corpus_tokenizer.state:
        raise Mistake(f"--data {config.data}: its tokenizer is not the one that the model was trained with")
    template = meta.get("chat") or (checkpoint or {}).get("chat")
    if "chat" in meta:
        config = with_examples(config, given, model.config, Chat(template, corpus_tokenizer))
    if config.compile:
        model.compile()
    return config, template


def with_examples(config, given, model_config, chat):
    """The config for a corpus of examples, which have prompts of their own, by its Chat. What ends a text
    there the model, whose config is changed, learns from now on.
    """
    if given.get("prompt_len", Span(0, 0)) != Span(0, 0):
        own = f"the examples of --data {config.data} have prompts of their own"
        raise Mistake(f"--prompt_len {given['prompt_len']}: {own}")
    ends = {*model_config.end_ids, *chat.end_ids}
    model_config.end_ids = tuple(sorted(ends))
    model_config.special_ids = tuple(i for i in model_config.special_ids if i not in ends)
    return dataclasses.replace(config, prompt_len=Span(0, 0))


def check_training(config):
    """Raise Mistake for flags that cannot work together, before anything is written."""
    if config.eval_only and config.init_from == "scratch":
        raise Mistake("--eval_only: needs --init_from resume or a checkpoint's path")
    needs_bound = config.eval_only or config.weight == "elbo"
    if config.rate.kind == "spindle" and needs_bound:
        raise Mistake(
            f"--rate {config.rate}: there is no bound, because the rate depends on the token itself; "
            "it goes with --weight mean, and not with --eval_only"
        )
    if config.visible and config.weight == "elbo":
        raise Mistake(f"--visible {config.visible}: it goes with --weight mean; the bound is of holes alone")
    if config.rate.kind == "slant" and config.level.kind == "grid" and needs_bound:
        raise Mistake(f"--rate {config.rate}: it has a bound with --level uniform, not with {config.level}")
    if needs_bound and config.level.kind not in ("uniform", "grid"):
        # A fixed level gives no bound; under a bell 1/t over its density has infinite variance.
        reason = "--eval_only prints" if config.eval_only else "it goes with --weight mean; elbo is"
        raise Mistake(f"--level {config.level}: {reason} the bound, which needs uniform or grid:N")
    if config.eval_only and config.prompt_len.low < config.prompt_len.high:
        raise Mistake(f"--prompt_len {config.prompt_len}: --eval_only needs one number")
    if config.batch_size % config.grad_accum:
        raise Mistake(f"--grad_accum {config.grad_accum}: must divide --batch_size {config.batch_size}")
    if config.batch_size % (config.grad_accum * size()):
        pieces = f"--grad_accum {config.grad_accum} times the number of processes, {size()}"
        raise Mistake(f"--batch_size {config.batch_size}: not a multiple of {pieces}")
    if config.shard and not dist.is_initialized():
        raise Mistake("--shard: for several processes; `torchrun --nproc_per_node=N train.py` starts N")
    if config.init_from == "scratch" and config.n_embd % (2 * config.n_head):
        raise Mistake(f"--n_embd {config.n_embd}: must be a multiple of twice --n_head {config.n_head}")
    pick_device(config.device)  # before a corpus is made
    if config.attention.K and config.context % config.attention.K:
        raise Mistake(f"--attention {config.attention}: K must divide --context {config.context}")
    if config.prompt_len.high >= config.context:
        raise Mistake(f"--prompt_len {config.prompt_len}: must be below --context {config.context}")


def check_unused(out_dir):
    """Raise Mistake if there is a run in out_dir, which a new one would overwrite."""
    if any((Path(out_dir) / name).exists() for name in ("last.pt", "ckpt.pt")):
        raise Mistake(f"--out_dir {out_dir}: there is a run in it; name another, or --init_from resume")


# --- writing -------------------------------------------------------------------------------------
