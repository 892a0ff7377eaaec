"""Converts a published model's weights and tokenizer into one of our checkpoints, and back.

    python data/weights/prepare.py roberta-base    # downloads it once; or gpt2, smollm2-135m, llada-8b-base, ..
    python data/weights/prepare.py FOLDER --out mine.pt    # files that you have
    python data/weights/prepare.py out/ckpt.pt --export FOLDER    # a fine-tuned RoBERTa, BERT or GPT-2

Folders have the layout of huggingface.co.
"""

import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.lib.checkpoint import check_config, save, save_checkpoint
from data.lib.corpus import DATA
from data.lib.errors import Mistake
from data.lib.flags import argument, flag, script
from data.weights import bert, gpt2, hub, llada, llama, mdlm
from model import load_checkpoint

FAMILY = {"roberta": bert, "bert": bert, "gpt2": gpt2, "mdlm": mdlm, "bd3lm": mdlm}  # by model_type
FAMILY |= {"llada": llada, "llama": llama, "qwen3": llama}
REPOSITORIES = {name: files for family in FAMILY.values() for name, files in family.REPOSITORIES.items()}


def convert(folder):
    """Convert a folder: (model, tokenizer, names of tensors left out, dict of extra entries for the checkpoint)."""
    path = folder / "config.json"
    theirs = hub.read_json(path)
    # Older files of Llamas don't say the rotary base, and transformers 5 writes it in rope_parameters.
    theirs = {"rope_theta": 10000.0} | theirs | (theirs.get("rope_parameters") or {})
    family = FAMILY.get(str(theirs.get("model_type")))
    if not family:
        raise Mistake(f"{path}: its model_type is {theirs.get('model_type')}, and we only know {', '.join(FAMILY)}")
    if other := [name for name, value in family.REQUIRED.items() if theirs.get(name, value) != value]:
        raise Mistake(f"{path}: {other[0]} is {theirs[other[0]]}, but our network needs {family.REQUIRED[other[0]]}")
    if missing := [name for name in family.SETTINGS.values() if theirs.get(name) is None]:
        raise Mistake(f"{path}: it has no {missing[0]}")
    settings = {field: theirs[name] for field, name in family.SETTINGS.items()}
    tensors, unused = hub.read_weights(folder, family.PREFIX, family.NAMES, family.LAYERS, family.IGNORED)
    tokenizer, more = family.convert(folder, theirs, settings, tensors)  # changes settings and tensors
    for name in [name for name in tensors if ".attention.all." in name]:  # query, key and value in one tensor
        for part, tensor in zip(("query", "key", "value"), tensors.pop(name).chunk(3)):
            tensors[name.replace("all", part)] = tensor.clone(memory_format=torch.contiguous_format)
    if settings.get("tied"):  # the head's matrix may be missing, and if it differs, it isn't tied after all
        embedding = tensors["token_embedding.weight"]
        settings["tied"] = torch.equal(embedding, tensors.setdefault("head.weight", embedding))
    config = family.Network.Config(**settings)
    if config.n_layer > len(tensors) or not 0 < config.n_head <= config.n_embd or not config.vocab_size:
        raise ValueError(f"{config.n_layer:,} layers, {config.n_head:,} heads, width {config.n_embd:,} can't be")
    with torch.device("meta"):  # takes no memory
        model = family.Network(config).eval()
    model.load_state_dict(tensors, assign=True)  # RuntimeError if one is missing, left over or of another shape
    check_config(config, tokenizer, {"model": model.state_dict()})
    return model, tokenizer, unused, more


def write_model(path, folder):
    """Write a checkpoint's model to a folder, in the hub's layout."""
    model, tokenizer, _ = load_checkpoint(path, draft_len=None, draft_rank=0)  # a GPT-2 without its drafts
    if model.family not in ("bert", "gpt2"):
        raise Mistake(f"{path}: only a RoBERTa, a BERT or a GPT-2 can be exported")
    if (folder / "config.json").exists():
        raise Mistake(f"--export {folder}: there is a model in it already")
    family = FAMILY[model.family]
    theirs, texts, ours, names, prefix = family.export(path, model, tokenizer)
    theirs |= {their: getattr(model.config, field) for field, their in family.SETTINGS.items()}
    texts = {"config.json": json.dumps(theirs, indent=2), **texts}
    names, tensors = {our: their for their, our in names.items()}, {}
    for name, tensor in ours.items():
        their = hub.renamed(name, names, "layers", family.LAYERS)
        tensors[their if their.startswith(("lm_head.", "cls.")) else f"{prefix}.{their}"] = tensor
    save(folder / "pytorch_model.bin", tensors)
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())
    print(f"{folder}: pytorch_model.bin, {', '.join(texts)}")


@script
def main(
    source: str = argument(f"{', '.join(REPOSITORIES)}; a folder in the hub's layout; or a checkpoint to --export"),
    out: str | None = flag(None, "checkpoint to write (default: data/weights/NAME.pt)"),
    export: str | None = flag(None, "folder to write a fine-tuned RoBERTa, BERT or GPT-2 to, in the hub's layout"),
):
    name, home = source.lower(), DATA / "weights"
    known = name in REPOSITORIES
    folder = home / name if known else Path(source)
    if export:
        return write_model(home / f"{name}.pt" if known else folder, Path(export))
    if not known and not folder.is_dir():
        raise Mistake(f"{folder}: no such folder, and no model of that name; we know {', '.join(REPOSITORIES)}")
    try:
        hub.fetch(REPOSITORIES.get(name, {}), folder)
        model, tokenizer, unused, more = convert(folder)
    except Mistake:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        reason = f"{type(error).__name__}: {str(error)[:300]}"
        raise Mistake(f"{folder}: these files don't make a model ({reason})") from None
    out = Path(out or home / f"{folder.resolve().name}.pt")
    save_checkpoint(out, model, tokenizer, **more)
    if unused:
        print(f"not used: {', '.join(unused)}")
    print(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters, {tokenizer.vocab_size:,} tokens")
