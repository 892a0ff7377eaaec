"""A published model's weights and tokenizer as one checkpoint of ours, and back.

python data/weights/prepare.py roberta-base    # downloads it once; or gpt2, mdlm-owt, llada-8b-base, ..
python data/weights/prepare.py FOLDER --out mine.pt    # files that you have, in the hub's layout
python data/weights/prepare.py out/ckpt.pt --export FOLDER    # a fine-tuned RoBERTa, BERT or GPT-2, in that layout
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from data.lib.checkpoint import check_config, save, save_checkpoint
from data.lib.corpus import DATA
from data.lib.errors import Mistake
from data.lib.files import replacing
from data.lib.flags import argument, flag, script
from data.weights import bert, gpt2, hub, llada, mdlm
from model import load_checkpoint

FAMILY = {kind: family for family in (bert, gpt2, mdlm, llada) for kind in family.KINDS}
REPOSITORIES = {name: files for family in FAMILY.values() for name, files in family.REPOSITORIES.items()}


def convert(folder):
    """(model, tokenizer, names of tensors left out, dict of more for the checkpoint) of a folder's files."""
    kind = hub.read_json(folder / "config.json").get("model_type")
    if kind not in [*FAMILY]:
        raise Mistake(f"{folder / 'config.json'}: its model_type is {kind}, and we only know {', '.join(FAMILY)}")
    model, tokenizer, unused, more = FAMILY[kind].convert(folder)
    check_config(model.config, tokenizer, {"model": model.state_dict()})
    return model, tokenizer, unused, more


def write_model(path, folder):
    """Write a checkpoint's model to a folder, in the hub's layout."""
    model, tokenizer, _ = load_checkpoint(path)
    if model.family not in ("bert", "gpt2"):
        raise Mistake(f"{path}: only a RoBERTa, a BERT or a GPT-2 can be exported")
    if (folder / "config.json").exists():
        raise Mistake(f"--export {folder}: there is a model in it already")
    texts, tensors = FAMILY[model.family].export(path, model, tokenizer)
    with replacing(folder / "pytorch_model.bin") as file:
        save(tensors, file)
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())
    print(f"{folder}: pytorch_model.bin, {', '.join(texts)}")


@script
def main(
    source: str = argument(f"{', '.join(REPOSITORIES)}; a folder in the hub's layout; or a checkpoint to --export"),
    out: str | None = flag(None, "checkpoint to write (default: data/weights/NAME.pt)"),
    export: str | None = flag(None, "folder to write a fine-tuned RoBERTa, BERT or GPT-2 to, in the hub's layout"),
):
    name, folder, home = source.lower(), Path(source), DATA / "weights"
    known = name in REPOSITORIES
    if export:
        return write_model(home / f"{name}.pt" if known else folder, Path(export))
    if not known and not folder.is_dir():
        raise Mistake(f"{folder}: no such folder, and no model of that name; we know {', '.join(REPOSITORIES)}")
    try:
        if known:
            folder = home / name
            hub.fetch(REPOSITORIES[name], folder)
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
