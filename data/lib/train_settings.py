"""The settings of train.py: what its flags, its method and its checkpoint come to, and which of them are refused."""

import dataclasses
from pathlib import Path

import torch
import torch.distributed as dist

from data.lib.chat import Chat
from data.lib.checkpoint import refused
from data.lib.corpus import canvas_len
from data.lib.errors import Mistake
from data.lib.flags import Attention, Level, Rate, Span, from_plain
from data.lib.machine import pick_device
from data.lib.processes import world_size

SHAPE = "n_layer", "n_head", "n_embd", "conv"  # fields that a checkpoint's model fixes


def attention_of(config):
    """The Attention of a ModelConfig."""
    if config.block is None:
        return Attention("canvas" if config.shift_id is None else "shifted")
    causal = config.block == 1 and config.shift_id is not None
    return Attention("causal", 1) if causal else Attention("block", config.block)


def attention_fields(attention, mask_id, old=None):
    """The fields that give a ModelConfig this Attention.

    old: the config of a trained model that goes on with it. Its shift, convolution and position table stay.
    """
    shift_id = None if old is None else old.shift_id
    if attention.kind in ("causal", "shifted") and shift_id is None:
        shift_id = mask_id
    fields = {"block": attention.K, "shift_id": shift_id}
    if old is None:
        return fields
    fields |= {"conv_right": old.conv_right}
    if old.learned_positions:  # a shifted canvas reads one position more than its context
        fields |= {"context": old.context + old.n_more - dataclasses.replace(old, **fields).n_more}
    return fields


def one_canvas(attention, context, shifted):
    """Call one block of the whole context a canvas, and a canvas of a model with a shift `shifted`."""
    if attention.kind == "canvas" or (attention.kind == "block" and attention.K == context):
        return Attention("shifted" if shifted else "canvas")
    return attention


def settle(given, config_class, methods, load_checkpoint):
    """Combine the flags given, the method's and the checkpoint's: (config, model, tokenizer, checkpoint).

    Flags win over the checkpoint, the checkpoint over the method, and the method over the defaults. A run from scratch
    has no model, tokenizer and checkpoint.
    """
    plain = methods[given.get("method", config_class.method)]
    config = dataclasses.replace(from_plain(config_class, plain), **given)
    if config.init_from == "scratch":
        config = with_canvas(config, given)
        attention = one_canvas(config.attention, config.context, shifted=config.attention.kind == "shifted")
        return without_noise(dataclasses.replace(config, attention=attention), given), None, None, None

    resume = config.init_from == "resume"
    path = Path(config.out_dir) / "last.pt" if resume else Path(config.init_from)
    changes = {"dropout": given["dropout"]} if "dropout" in given else {}
    keep = getattr(torch, config.dtype, None) if config.eval_only else None  # training needs float32
    model, tokenizer, checkpoint = load_checkpoint(path, keep=keep, **changes)
    before, longest = attention_of(model.config), model.config.context
    attention = config.attention if "method" in given and not resume else given.get("attention", before)
    attention = one_canvas(attention, longest, shifted=model.config.shift_id is not None)
    if attention != before and not resume:
        changes |= attention_fields(attention, tokenizer.mask_id, model.config)
        model, tokenizer, checkpoint = load_checkpoint(path, keep=keep, **changes)
        longest = model.config.context

    with refused(path):
        trained = checkpoint.get("train", {})
        fixed = {name: getattr(model.config, name) for name in SHAPE}
        if config.eval_only:  # on the corpus of the run, with whole texts
            plain = {"data": trained.get("data", config.data), "level": "uniform", "prompt_len": "0", **plain}
        elif resume:
            plain = trained
            fixed |= {name: trained[name] for name in ("data", "method")}
        plain = {**plain, **fixed, "context": min(trained.get("context", longest), longest), "attention": str(before)}
        plain |= {"out_dir": config.out_dir, "shard": False}  # it may resume elsewhere, in other processes
        config = from_plain(config_class, plain)
    config = dataclasses.replace(config, **{**given, "attention": attention})
    if resume:
        fixed["attention"] = before
    for name, value in fixed.items():
        if getattr(config, name) != value:
            raise Mistake(f"--{name} {getattr(config, name)}: the run in {path} has {value}")
    if config.context > longest:
        raise Mistake(f"--context {config.context}: the model in {path} sees at most {longest} tokens")
    return without_noise(with_canvas(config, given), given), model, tokenizer, checkpoint


def with_canvas(config, given):
    """If the corpus consists of canvases, make each window one of them, which may be masked all over."""
    T = canvas_len(config.data)
    if not T:
        return config
    if given.get("context", T) != T:
        raise Mistake(f"--context {given['context']}: a canvas of --data {config.data} has {T} tokens")
    return dataclasses.replace(config, context=T, prompt_len=prompt_len(config, given))


def without_noise(config, given):
    """With blocks of one token make every token a hole, at t = 1. There is no noise to choose."""
    if config.attention.K != 1:
        return config
    for name in ("level", "one_level", "rate", "visible"):
        if given.get(name) and given[name] != Rate("t"):
            raise Mistake(f"--{name} {given[name]}: with --attention {config.attention} each token is a hole")
    level = Level("uniform") if config.eval_only else Level("fixed", 1.0)
    noise = {"level": level, "rate": Rate("t"), "one_level": False, "weight": "mean"}  # at t = 1 that is elbo, too
    return dataclasses.replace(config, **noise, prompt_len=prompt_len(config, given))


def prompt_len(config, given):
    """The config's prompt length if it was chosen, else none."""
    return config.prompt_len if "prompt_len" in given or config.init_from == "resume" else Span(0, 0)


def model_config(config_class, config, tokenizer):
    """The ModelConfig of a new model."""
    shape = {name: getattr(config, name) for name in (*SHAPE, "context", "dropout")}
    shape |= attention_fields(config.attention, tokenizer.mask_id)
    shape |= {"special_ids": tokenizer.special_ids, "kinds": tokenizer.kinds}
    return config_class(tokenizer.vocab_size, tokenizer.mask_id, **shape)


def with_corpus(config, given, model, tokenizer, corpus_tokenizer, meta, checkpoint):
    """Adapt config and model to the corpus; return config and chat template. Mistake if they don't fit."""
    if tokenizer is not None and tokenizer.state != corpus_tokenizer.state:
        raise Mistake(f"--data {config.data}: its tokenizer is not the one that the model was trained with")
    template = meta.get("chat") or (checkpoint or {}).get("chat")
    if "chat" in meta:  # examples have prompts of their own, and the model learns what ends a reply
        if given.get("prompt_len", Span(0, 0)) != Span(0, 0):
            own = f"the examples of --data {config.data} have prompts of their own"
            raise Mistake(f"--prompt_len {given['prompt_len']}: {own}")
        config, ends = dataclasses.replace(config, prompt_len=Span(0, 0)), Chat(template, corpus_tokenizer).end_ids
        model.config.end_ids = tuple(sorted({*model.config.end_ids, *ends}))
        model.config.special_ids = tuple(i for i in model.config.special_ids if i not in model.config.end_ids)
    if config.compile:
        model.compile()
    return config, template


def check_training(config):
    """Raise Mistake for flags that don't go together, before anything is written."""
    level, rate, span, K = config.level, config.rate, config.prompt_len, config.attention.K
    needs_bound = config.eval_only or config.weight == "elbo"
    # A fixed level gives no bound, and under a bell 1/t over its density has infinite variance.
    levels = ("uniform",) if rate.kind == "slant" else ("uniform", "grid")
    rows = config.grad_accum * world_size()

    def refuse(wrong, sentence):
        if wrong:
            raise Mistake(sentence)

    refuse(
        config.eval_only and config.init_from == "scratch",
        "--eval_only: needs --init_from resume, or a checkpoint's path",
    )
    refuse(rate.kind == "spindle" and needs_bound, f"--rate {rate}: has no bound; train with --weight mean")
    needs = "the bound needs --level uniform, or grid:N with --rate t; to train without it, --weight mean"
    refuse(needs_bound and level.kind not in levels, f"--level {level}: {needs}")
    refuse(config.visible and config.weight == "elbo", f"--visible {config.visible}: goes with --weight mean")
    refuse(config.eval_only and span.low < span.high, f"--prompt_len {span}: --eval_only needs one number")
    refuse(span.high >= config.context, f"--prompt_len {span}: must be below --context {config.context}")
    refuse(K and config.context % K, f"--attention {config.attention}: K must divide --context {config.context}")
    multiple = f"not a multiple of --grad_accum times the number of processes, {rows}"
    refuse(config.batch_size % rows, f"--batch_size {config.batch_size}: {multiple}")
    refuse(config.shard and not dist.is_initialized(), "--shard: is for the processes that torchrun starts")
    heads = config.init_from == "scratch" and config.n_embd % (2 * config.n_head)
    refuse(heads, f"--n_embd {config.n_embd}: must be a multiple of twice --n_head {config.n_head}")
    pick_device(config.device)


def check_unused(out_dir):
    """Raise Mistake if there is a run in out_dir, which a new one would overwrite."""
    if any((Path(out_dir) / name).exists() for name in ("last.pt", "ckpt.pt")):
        raise Mistake(f"--out_dir {out_dir}: there is a run in it; name another, or --init_from resume")
