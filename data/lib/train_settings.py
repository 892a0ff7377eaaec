"""Settles the flags of train.py with its method and its checkpoint, or says in a sentence why they don't fit."""

import dataclasses
from pathlib import Path

import torch
import torch.distributed as dist

from data.lib.chat import Chat
from data.lib.checkpoint import refused
from data.lib.corpus import canvas_len
from data.lib.errors import Mistake
from data.lib.flags import Attention, Level, Rate, Span, from_plain
from data.lib.machine import autocast, memory_of, pick_device
from data.lib.processes import world_size

SHAPE = "n_layer", "n_head", "n_embd", "conv"  # fields that a checkpoint's model fixes


def attention_of(config):
    """The Attention of a ModelConfig."""
    if config.block is None:
        return Attention("canvas" if config.shift_id is None else "shifted")
    if config.draft_len:
        return Attention("draft", config.draft_len)
    return Attention("causal") if config.is_gpt else Attention("block", config.block)


def attention_fields(attention, mask_id, old=None, freeze=False):
    """The fields that give a ModelConfig this Attention.

    old: the config of the model that is being trained further. Its shift and position table stay. freeze: see --freeze.
    """
    shift_id = old and old.shift_id
    if shift_id is None and attention.kind in ("causal", "draft", "shifted"):
        shift_id = mask_id
    drafts = attention.value if attention.kind == "draft" else None
    rank = (old.draft_rank or old.n_embd // 8 * freeze) if old and drafts else 0
    fields = {"block": attention.K, "shift_id": shift_id, "draft_len": drafts, "draft_rank": rank}
    if old and old.learned_positions:  # a shifted canvas reads one position more than its context
        fields["context"] = old.context + old.n_more - dataclasses.replace(old, **fields).n_more
    return fields


def settle(given, config_class, methods, load_checkpoint):
    """Combine the flags given, the method's and the checkpoint's. Return (config, model, tokenizer, checkpoint).

    Flags win over the checkpoint, the checkpoint over the method, and the method over the defaults. For a run from
    scratch, model, tokenizer and checkpoint are None.
    """
    plain = methods[given.get("method", config_class.method)]
    config = dataclasses.replace(from_plain(config_class, plain), **given)
    if config.init_from == "scratch":
        return with_implied(config, given), None, None, None

    resume = config.init_from == "resume"
    path = Path(config.out_dir) / "last.pt" if resume else Path(config.init_from)
    changes = {"dropout": given["dropout"]} if "dropout" in given else {}
    keep = getattr(torch, config.dtype, None) if config.eval_only else None  # training needs float32
    model, tokenizer, checkpoint = load_checkpoint(path, keep=keep, **changes)
    before = attention_of(model.config)
    attention = config.attention if "method" in given and not resume else given.get("attention", before)
    if attention.kind == "canvas" and model.config.shift_id is not None:
        attention = Attention("shifted")
    if (attention != before or config.freeze) and not resume:
        changes |= attention_fields(attention, tokenizer.mask_id, model.config, config.freeze)
        model, tokenizer, checkpoint = load_checkpoint(path, keep=keep, **changes)

    longest, fixed = model.config.context, {name: getattr(model.config, name) for name in SHAPE}
    with refused(path):
        trained = checkpoint.get("train", {})
        if config.eval_only:  # on the corpus of the run, with whole texts
            plain = {"data": trained.get("data", config.data), "level": "uniform", "prompt_len": "0", **plain}
        elif resume:
            plain, fixed = trained, {**fixed, "data": trained["data"], "method": trained["method"]}
        plain = {**plain, **fixed, "context": min(trained.get("context", longest), longest)}
        plain |= {"out_dir": config.out_dir, "shard": False}  # it may resume elsewhere, in other processes
        config = dataclasses.replace(from_plain(config_class, plain), **{**given, "attention": attention})
    fixed |= {"attention": before} if resume else {}
    for name, value in fixed.items():
        if getattr(config, name) != value:
            raise Mistake(f"--{name} {getattr(config, name)}: the run in {path} has {value}")
    if config.context > longest:
        raise Mistake(f"--context {config.context}: the model in {path} sees at most {longest} tokens")
    return with_implied(config, given), model, tokenizer, checkpoint


def with_implied(config, given):
    """Set the flags that follow from a corpus of canvases, and from blocks of one token."""
    T, implied = canvas_len(config.data), {}
    if T:  # each window is a canvas, which may be masked all over
        if given.get("context", T) != T:
            raise Mistake(f"--context {given['context']}: a canvas of --data {config.data} has {T} tokens")
        implied["context"] = T
    if config.attention.K == 1:  # every token is a hole, at t = 1, where the weights mean and elbo are equal
        for name in ("level", "one_level", "rate", "visible"):
            if given.get(name) and given[name] != Rate("t"):
                raise Mistake(f"--{name} {given[name]}: with --attention {config.attention} each token is a hole")
        level = Level("uniform") if config.eval_only else Level("fixed", 1.0)
        implied |= {"level": level, "rate": Rate("t"), "one_level": False, "weight": "mean"}
    if implied and "prompt_len" not in given and config.init_from != "resume":
        implied["prompt_len"] = Span(0, 0)
    return dataclasses.replace(config, **implied)


def model_config(config_class, config, tokenizer):
    """The ModelConfig of a new model."""
    shape = {name: getattr(config, name) for name in (*SHAPE, "context", "dropout")}
    shape |= attention_fields(config.attention, tokenizer.mask_id)
    shape |= {"special_ids": tokenizer.special_ids, "kinds": tokenizer.kinds}
    return config_class(tokenizer.vocab_size, tokenizer.mask_id, **shape)


def check_memory(config, model_config, model, layer_class):
    """Raise Mistake if training needs more memory than there is; from scratch, before the model (None) is made.

    The estimate is a lower bound: float32 for weights and, unless they are frozen, for gradients and their averages;
    eight vectors per token and layer, which the backward pass reads, in the run's precision; and the batch, on the CPU.
    """
    if config.eval_only or config.shard:
        return
    if model is None:
        with torch.device("meta"):
            in_layer = sum(p.numel() for p in layer_class(model_config).parameters())
        n_parameters = model_config.n_layer * in_layer + 2 * model_config.vocab_size * model_config.n_embd
    else:
        n_parameters = sum(p.numel() for p in model.parameters())
    n_tokens, device = config.batch_size * config.context, pick_device(config.device)
    vectors = 8 * model_config.n_layer * n_tokens // (config.grad_accum * world_size())
    activations = vectors * model_config.n_embd * autocast(device, config.dtype).fast_dtype.itemsize
    training = n_parameters * (4 if config.freeze else 12) + activations * (not config.grad_checkpoint)
    for need, device in ((training, device), (32 * n_tokens, torch.device("cpu"))):
        if need > (there := memory_of(device)):
            said = f"{n_parameters:,} parameters and {n_tokens:,} tokens per step, --batch_size times --context"
            raise Mistake(f"training needs {need / 1e9:,.0f} GB or more for {said}; there are {there / 1e9:,.0f} GB")


def with_corpus(config, given, model, tokenizer, corpus_tokenizer, meta, checkpoint):
    """Adapt config and model to the corpus; return config and chat template. Mistake if they don't fit."""
    if tokenizer is not None and tokenizer.state != corpus_tokenizer.state:
        raise Mistake(f"--data {config.data}: its tokenizer is not the one that the model was trained with")
    template = meta.get("chat") or (checkpoint or {}).get("chat")
    if "chat" in meta:  # examples have prompts of their own, and the model learns what ends a reply
        if given.get("prompt_len", Span(0, 0)) != Span(0, 0):
            span = given["prompt_len"]
            raise Mistake(f"--prompt_len {span}: the examples of --data {config.data} have prompts of their own")
        config = dataclasses.replace(config, prompt_len=Span(0, 0))
        ends = {*model.config.end_ids, *Chat(template, corpus_tokenizer).end_ids}
        model.config.end_ids = tuple(sorted(ends))
        model.config.special_ids = tuple(i for i in model.config.special_ids if i not in ends)
    if config.compile:
        model.compile()
    return config, template


def check_training(config):
    """Raise Mistake for flags that don't go together, before anything is written."""
    pick_device(config.device)
    level, rate, span, K = config.level, config.rate, config.prompt_len, config.attention.K
    scratch, resume, folder = config.init_from == "scratch", config.init_from == "resume", Path(config.out_dir)
    in_use = any((folder / name).exists() for name in ("last.pt", "ckpt.pt")) and not (resume or config.eval_only)
    rows, heads = config.grad_accum * world_size(), 2 * config.n_head if scratch else 1
    wrong_freeze = config.freeze and (scratch or config.attention.kind != "draft")
    needs_bound = config.eval_only or config.weight == "elbo"
    # A fixed level gives no bound, and with bell levels the weight, 1/t over their density, has infinite variance.
    has_bound = level.kind == "uniform" or (level.kind == "grid" and rate.kind != "slant")
    needs = "the bound needs --level uniform, or grid:N with --rate t; to train without it, --weight mean"
    multiple = f"not a multiple of --grad_accum times the number of processes, {rows}"
    for sentence, is_wrong in {
        "--eval_only: needs --init_from resume, or a checkpoint's path": config.eval_only and scratch,
        f"--rate {rate}: has no bound; train with --weight mean": rate.kind == "spindle" and needs_bound,
        f"--level {level}: {needs}": needs_bound and not has_bound,
        f"--visible {config.visible}: goes with --weight mean": config.visible and config.weight == "elbo",
        f"--prompt_len {span}: --eval_only needs one number": config.eval_only and span.low < span.high,
        f"--prompt_len {span}: must be below --context {config.context}": span.high >= config.context,
        f"--attention {config.attention}: K must divide --context {config.context}": K and config.context % K,
        f"--batch_size {config.batch_size}: {multiple}": config.batch_size % rows,
        "--freeze: goes with --attention draft:K and the checkpoint of a GPT in --init_from": wrong_freeze,
        "--shard: is for the processes that torchrun starts": config.shard and not dist.is_initialized(),
        f"--n_embd {config.n_embd}: must be a multiple of twice --n_head {config.n_head}": config.n_embd % heads,
        f"--out_dir {folder}: there is a run in it; name another, or --init_from resume": in_use,
    }.items():
        if is_wrong:
            raise Mistake(sentence)
