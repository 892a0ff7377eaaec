"""GPT-2's weights and tokenizer as one checkpoint of ours, and back; and DiffuGPT's.

    python data/gpt2/prepare.py                             # gpt2, downloaded once
    python data/gpt2/prepare.py diffugpt-s                  # the same, opened (2410.17891)
    python data/gpt2/prepare.py DIR --out mine.pt           # files that are already there
    python data/gpt2/prepare.py out/ckpt.pt --export DIR    # for the rest of the world to load

The network is in data/weights/gpt2.py. This file is only about names: of settings, and of tensors. And about
`<mask>`, which GPT-2 does not have.
DiffuGPT is one block, with a mask of its own; its files are known by the names of their tensors.
"""

import functools
import re
import sys
from collections import defaultdict
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.lib.corpus import DATA
from data.lib.errors import Mistake, command
from data.lib.tokenizer import BPETokenizer
from data.weights import hub
from data.weights.gpt2 import Network
from model import load_checkpoint

FILES = "config.json", *hub.BPE_FILES
REPOSITORIES = {
    "gpt2": hub.files("openai-community/gpt2", *FILES, "pytorch_model.bin"),
    "gpt2-medium": hub.files("openai-community/gpt2-medium", *FILES, "pytorch_model.bin"),
    "gpt2-large": hub.files("openai-community/gpt2-large", *FILES, "pytorch_model.bin"),
    "gpt2-xl": hub.files("openai-community/gpt2-xl", *FILES, "pytorch_model.bin"),
    "distilgpt2": hub.files("distilbert/distilgpt2", *FILES, "pytorch_model.bin"),
    "diffugpt-s": hub.files("diffusionfamily/diffugpt-s", *FILES, "model.safetensors"),
    "diffugpt-m": hub.files("diffusionfamily/diffugpt-m", *FILES, "model.safetensors"),
}
START = "<|endoftext|>"  # ends one text and begins the next
SMALL_MASK = 10541  # diffugpt-s took a token of GPT-2's for its mask, twelve dashes


# --- settings ------------------------------------------------------------------------------------

# What the files leave out when it is this.
DEFAULTS = {
    "vocab_size": 50257,
    "n_positions": 1024,
    "n_embd": 768,
    "n_layer": 12,
    "n_head": 12,
    "n_inner": 3072,  # the files have null: 4 * n_embd
    "activation_function": "gelu_new",
    "resid_pdrop": 0.1,
    "embd_pdrop": 0.1,
    "attn_pdrop": 0.1,
    "layer_norm_epsilon": 1e-5,
    "tie_word_embeddings": True,
}
# What our model cannot be, besides these.
REQUIRED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
}


def read_config(path):
    """config.json as a dict, with the defaults of what it leaves out. Mistake if we have no such model."""
    theirs = hub.read_kind(path, ("gpt2",))
    given = {name: value for name, value in theirs.items() if value is not None}
    theirs = hub.with_defaults(given, DEFAULTS, REQUIRED, "activation_function", path, may_be_0=())
    theirs["n_inner"] = given.get("n_inner", 0)
    if theirs["n_embd"] % theirs["n_head"]:
        raise Mistake(f"{path}: n_embd is not a multiple of n_head")
    if theirs["n_positions"] < 2:
        raise Mistake(f"{path}: n_positions cannot be 1; a GPT of one position reads no text")
    return theirs


def our_config(theirs, tokenizer, tied, opened=False):
    """Our config of their config. opened: of a DiffuGPT, which reads a position more than it writes."""
    return Network.Config(
        vocab_size=tokenizer.vocab_size,
        mask_id=tokenizer.mask_id,
        special_ids=tokenizer.special_ids,
        context=theirs["n_positions"] - opened,
        n_layer=theirs["n_layer"],
        n_head=theirs["n_head"],
        n_embd=theirs["n_embd"],
        dropout=theirs["resid_pdrop"],
        block=None if opened else 1,
        shift_id=tokenizer.first(START),
        mlp_width=theirs["n_inner"] or 0,
        activation=hub.OUR_ACTIVATION[theirs["activation_function"]],
        norm_eps=theirs["layer_norm_epsilon"],
        tied=tied,
    )


def their_config(config, tokenizer):
    """The inverse of our_config."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size - 1,
        "n_positions": config.context,
        "n_embd": config.n_embd,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": config.mlp_width or None,
        "activation_function": hub.their_activation(config),
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": config.dropout,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "bos_token_id": tokenizer.first(START),
        "eos_token_id": tokenizer.first(START),
    }


# --- tensors -------------------------------------------------------------------------------------

NAMES = {
    "token_embedding": "wte",
    "position_embedding": "wpe",
    "attention_norm": "ln_1",
    "attention.query": "attn.c_attn",  # three of ours, one below the other, are one of theirs
    "attention.key": "attn.c_attn",
    "attention.value": "attn.c_attn",
    "attention.out": "attn.c_proj",
    "mlp_norm": "ln_2",
    "mlp.up": "mlp.c_fc",
    "mlp.down": "mlp.c_proj",
    "final_norm": "ln_f",
    "head": "lm_head",
}
TABLES = ("wte.weight", "lm_head.weight")  # a row for each token
# Parts of a file that are no weights: who sees whom, and what a score that is not seen becomes.
BUFFERS = re.compile(r"h\.\d+\.attn\.(masked_)?bias")
# Heads that writing text does not use.
UNUSED = re.compile(r"score\.|classifier\.|multiple_choice_head\.|qa_outputs\.")


def their_name(name):
    """What a tensor of our state_dict is called in the files, without the leading `transformer.`."""
    return hub.their_name(name, NAMES, "h")


def plain_name(name):
    """A key of a file in the spelling of their_name."""
    name = name.removeprefix("transformer.").removeprefix("denoise_model.")
    return "wte.weight" if name == "embed_tokens.weight" else name


def is_opened(tensors):
    """Whether a file's tensors are a DiffuGPT's."""
    return any(name.startswith("denoise_model.") for name in tensors)


def transposed(name, tensor):
    """A layer's matrix the other way round: theirs are (in, out), and ours (out, in)."""
    return tensor.T.contiguous() if name.startswith("h.") and tensor.ndim == 2 else tensor


def their_tensors(ours, opened=False):
    """Tensors of our state_dict with GPT-2's names and shapes: without the row of `<mask>`, unless opened."""
    parts = defaultdict(list)
    for name, tensor in ours.items():
        their = their_name(name)
        parts[their].append(tensor[:-1] if their in TABLES and not opened else tensor)
    return {name: transposed(name, torch.cat(tensors)) for name, tensors in parts.items()}


def our_tensors(found, names, opened=False):
    """The inverse: tensors by our names, of those found by theirs."""
    parts = defaultdict(list)
    for name in names:
        parts[their_name(name)].append(name)
    ours = {}
    for their, several in parts.items():
        tensor = transposed(their, found[their])
        if their in TABLES and not opened:
            tensor = with_mask(tensor)
        ours |= zip(several, (part.clone() for part in tensor.chunk(len(several))))
    return ours


def with_mask(table):
    """A table (V, C) with one row more, for `<mask>`.

    A GPT never reads one, since a position sees only what is written, so the row is needed only once the
    attention is opened. The mean of all tokens is then where training begins: it favours none of them.
    """
    return torch.cat((table, table.float().mean(0, keepdim=True).type_as(table)))


def convert(theirs, tokenizer, path, tensors):
    """Our model with their tensors, and the names of those that it has no use for."""
    opened = is_opened(tensors)
    spelling = hub.Spelling(
        plain_name,
        TABLES,
        UNUSED,
        functools.partial(their_tensors, opened=opened),
        functools.partial(our_tensors, opened=opened),
    )
    config = functools.partial(our_config, theirs, tokenizer, opened=opened)
    tensors = {name: tensor for name, tensor in tensors.items() if not BUFFERS.fullmatch(plain_name(name))}
    return hub.convert(tensors, path, spelling, Network, config, theirs["tie_word_embeddings"])


# --- the tokenizer -------------------------------------------------------------------------------


def with_special(tokenizer, special):
    """The same tokenizer with these special tokens, ids by name."""
    state = tokenizer.state
    return BPETokenizer(state["tokens"], state["pattern"], state["ids"], special)


def read_tokenizer(folder, theirs):
    """Their tokenizer, and `<mask>` after all others."""
    tokenizer, vocab_size = hub.read_bpe(folder, theirs["vocab_size"]), theirs["vocab_size"]
    hub.check_vocab_size(folder, tokenizer, vocab_size)
    check_start(folder, tokenizer)
    if tokenizer.mask_id is not None:
        raise Mistake(f"{folder}: its vocabulary has a <mask> already, and a GPT-2's has none")
    return with_special(tokenizer, {**tokenizer.special, "<mask>": vocab_size})


def read_opened_tokenizer(folder, n_rows):
    """The tokenizer of a DiffuGPT whose table has n_rows. Its mask is the first after GPT-2's tokens, in
    diffugpt-m, where rows were added to make their number even; or one of these, in diffugpt-s, which is then
    no text: what was written with it is written with the shorter ones that it was merged of.
    """
    state = hub.read_bpe(folder, 0).state
    tokens, ids = state["tokens"], state["ids"]
    special = {name: i for name, i in state["special"].items() if name == START}
    n = len(ids) + len(special)
    if not n <= n_rows < n + 8 or (n_rows == n and SMALL_MASK not in ids):
        raise Mistake(f"{folder}: {n_rows:,} rows of embeddings, but a DiffuGPT of {n:,} tokens has others")
    special["<mask>"] = n if n_rows > n else SMALL_MASK
    special |= {f"<unused {i}>": i for i in range(n + 1, n_rows)}
    kept = [(token, i) for token, i in zip(tokens, ids) if i != special["<mask>"]]
    tokenizer = BPETokenizer([token for token, _ in kept], state["pattern"], [i for _, i in kept], special)
    check_start(folder, tokenizer)
    return tokenizer


def check_start(folder, tokenizer):
    if START not in tokenizer.special:
        raise Mistake(f"{folder}: its vocabulary has no {START}, which stands before the text of a GPT-2")


# --- the command ---------------------------------------------------------------------------------


def convert_folder(folder):
    """(model, tokenizer, what is not used, nothing besides) of the files in a folder."""
    theirs = read_config(folder / "config.json")
    path, tensors = hub.read_weights(folder)
    if is_opened(tensors):
        table = next((tensor for name, tensor in tensors.items() if plain_name(name) == TABLES[0]), None)
        tokenizer = read_opened_tokenizer(folder, 0 if table is None else len(table))
    else:
        tokenizer = read_tokenizer(folder, theirs)
    model, skipped = convert(theirs, tokenizer, path, tensors)
    unused = hub.not_used(skipped, theirs, "resid_pdrop", "embd_pdrop", "attn_pdrop")
    return model, tokenizer, unused, {}


def export(path, folder):
    """Write the GPT-2 of our checkpoint to a folder in the layout of the hub's."""
    model, tokenizer, _ = load_checkpoint(path)
    config = model.config
    if model.family != "gpt2" or START not in tokenizer.special:
        raise Mistake(f"{path}: it is not a GPT-2, and only that can be exported")
    theirs = their_config(config, tokenizer)
    hub.check_kind(path, config, our_config(theirs, tokenizer, config.tied), "GPT-2")
    special = {name: i for name, i in tokenizer.special.items() if name != "<mask>"}
    tensors = their_tensors(model.state_dict())
    if config.tied:  # it is wte.weight again
        del tensors["lm_head.weight"]
    tensors = {name if name in TABLES[1:] else f"transformer.{name}": t for name, t in tensors.items()}
    hub.write_model(folder, theirs, with_special(tokenizer, special), tensors)


def main():
    what = "the files of a GPT-2 or DiffuGPT"
    hub.main(__doc__.splitlines()[0], DATA / "gpt2", REPOSITORIES, what, convert_folder, export)


if __name__ == "__main__":
    command(main)
