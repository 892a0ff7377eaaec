"""RoBERTa's or BERT's weights and tokenizer as one checkpoint of ours, and back.

    python data/roberta/prepare.py                          # roberta-base, downloaded once
    python data/roberta/prepare.py DIR --out bert.pt        # files that are already there
    python data/roberta/prepare.py out/ckpt.pt --export DIR # for the rest of the world to load

The network is in data/weights/bert.py. This file is only about names: of files, of settings, and of tensors.
"""

import functools
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.lib.corpus import DATA
from data.lib.errors import Mistake, command
from data.lib.tokenizer import BPETokenizer, WordPieceTokenizer
from data.weights import hub
from data.weights.bert import BertConfig, Network
from model import load_checkpoint

FILES = "config.json", *hub.BPE_FILES, "pytorch_model.bin"
REPOSITORIES = {
    "roberta-base": hub.files("FacebookAI/roberta-base", *FILES),
    "roberta-large": hub.files("FacebookAI/roberta-large", *FILES),
    "distilroberta-base": hub.files("distilbert/distilroberta-base", *FILES),
}


# --- settings ------------------------------------------------------------------------------------

# What the files leave out when it is this.
DEFAULTS = {
    "hidden_size": 768,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "intermediate_size": 3072,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "tie_word_embeddings": True,
}
KIND_DEFAULTS = {
    "roberta": {"vocab_size": 50265, "pad_token_id": 1},
    "bert": {"vocab_size": 30522, "pad_token_id": 0},
}
# What our model cannot be, besides these.
REQUIRED = {"position_embedding_type": "absolute", "is_decoder": False, "add_cross_attention": False}


def read_config(path):
    """config.json as a dict, with the defaults of what it leaves out. Mistake if we have no such model."""
    theirs = hub.read_kind(path, ("roberta", "bert"))
    defaults = DEFAULTS | KIND_DEFAULTS[theirs["model_type"]]
    theirs = hub.with_defaults(theirs, defaults, REQUIRED, "hidden_act", path, may_be_0=("pad_token_id",))
    if theirs["hidden_size"] % theirs["num_attention_heads"]:
        raise Mistake(f"{path}: hidden_size is not a multiple of num_attention_heads")
    return theirs


def our_config(theirs, tokenizer, tied):
    """The BertConfig of their config."""
    roberta = theirs["model_type"] == "roberta"
    first_position = theirs["pad_token_id"] + 1 if roberta else 0
    activation = hub.OUR_ACTIVATION[theirs["hidden_act"]]
    return BertConfig(
        vocab_size=theirs["vocab_size"],
        mask_id=tokenizer.mask_id,
        special_ids=tokenizer.special_ids,
        context=theirs["max_position_embeddings"] - first_position,
        n_layer=theirs["num_hidden_layers"],
        n_head=theirs["num_attention_heads"],
        n_embd=theirs["hidden_size"],
        dropout=theirs["hidden_dropout_prob"],
        mlp_width=theirs["intermediate_size"],
        activation=activation,
        norm_eps=theirs["layer_norm_eps"],
        token_types=theirs["type_vocab_size"],
        first_position=first_position,
        head_activation="gelu" if roberta else activation,  # RoBERTa's head has it whatever its layers have
        tied=tied,
    )


def their_config(config, tokenizer):
    """The inverse of our_config, for RoBERTa."""
    return {
        "architectures": ["RobertaForMaskedLM"],
        "model_type": "roberta",
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "intermediate_size": config.mlp_width,
        "hidden_act": hub.their_activation(config),
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "max_position_embeddings": config.first_position + config.context,
        "type_vocab_size": config.token_types,
        "layer_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tied,
        "pad_token_id": tokenizer.first("<pad>"),
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_id,
    }


# --- tensors -------------------------------------------------------------------------------------

NAMES = {
    "token_embedding": "embeddings.word_embeddings",
    "position_embedding": "embeddings.position_embeddings",
    "type_embedding": "embeddings.token_type_embeddings",
    "embedding_norm": "embeddings.LayerNorm",
    "attention.query": "attention.self.query",
    "attention.key": "attention.self.key",
    "attention.value": "attention.self.value",
    "attention.out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "mlp.up": "intermediate.dense",
    "mlp.down": "output.dense",
    "mlp_norm": "output.LayerNorm",
}
HEADS = {
    "roberta": {
        "transform": "lm_head.dense",
        "transform_norm": "lm_head.layer_norm",
        "head.weight": "lm_head.decoder.weight",
        "head.bias": "lm_head.bias",
    },
    "bert": {
        "transform": "cls.predictions.transform.dense",
        "transform_norm": "cls.predictions.transform.LayerNorm",
        "head.weight": "cls.predictions.decoder.weight",
        "head.bias": "cls.predictions.bias",
    },
}
# Parts of a file that masked-language modelling does not use: other heads, and a table of 0, 1, 2...
UNUSED = re.compile(r"pooler\.|cls\.(?!predictions\.)|classifier\.|qa_outputs\.|embeddings\.position_ids")


def their_name(name, kind):
    """What a tensor of our state_dict is called in the files, without the leading `roberta.`."""
    return hub.their_name(name, NAMES | HEADS[kind], "encoder.layer")


def plain_name(name, kind):
    """A key of a file in the one spelling that their_name gives, out of those that are around."""
    name = name.removeprefix(f"{kind}.")
    if name.endswith("LayerNorm.gamma"):  # as TensorFlow had it
        name = name.removesuffix("gamma") + "weight"
    if name.endswith("LayerNorm.beta"):
        name = name.removesuffix("beta") + "bias"
    return name.replace("lm_head.decoder.bias", "lm_head.bias").replace(
        "cls.predictions.decoder.bias", "cls.predictions.bias"
    )


def convert(theirs, tokenizer, path, tensors):
    """Our model with their tensors, and the names of those that it has no use for."""
    kind = theirs["model_type"]
    plain = functools.partial(plain_name, kind=kind)
    # The head's bias may be there under two names; where they differ the decoder's is the one in use.
    twice = {name.replace("decoder.bias", "bias") for name in tensors if name.endswith("decoder.bias")}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in twice}
    their = functools.partial(their_name, kind=kind)
    tables = their("token_embedding.weight"), their("head.weight")
    spelling = hub.only_names(plain, tables, UNUSED, their)
    config = functools.partial(our_config, theirs, tokenizer)
    return hub.convert(tensors, path, spelling, Network, config, theirs["tie_word_embeddings"])


# --- tokenizers ----------------------------------------------------------------------------------


def read_wordpiece(folder, vocab_size):
    """The tokenizer of vocab.txt, cased or not as tokenizer_config.json says or else as it shows itself."""
    text = hub.read_text(folder / "vocab.txt")
    tokens = text.rstrip("\n").split("\n")
    if len(tokens) < vocab_size and not text.endswith("\n"):
        raise Mistake(f"{folder / 'vocab.txt'}: truncated, it has {len(tokens)} of {vocab_size} tokens")
    tokens += [f"[unused{i}]" for i in hub.padding_ids(len(tokens), vocab_size)]
    path = folder / "tokenizer_config.json"
    settings = hub.read_json(path) if path.exists() else {}
    words = [token for token in tokens if not WordPieceTokenizer.special_pattern.fullmatch(token)]
    lowercase = settings.get("do_lower_case", all(word == word.lower() for word in words))
    strip_accents = settings.get("strip_accents")
    return WordPieceTokenizer(
        tokens,
        lowercase,
        lowercase if strip_accents is None else strip_accents,
        settings.get("tokenize_chinese_chars", True),
    )


def read_tokenizer(folder, theirs):
    read = hub.read_bpe if theirs["model_type"] == "roberta" else read_wordpiece
    tokenizer = read(folder, theirs["vocab_size"])
    if tokenizer.mask_id is None:
        raise Mistake(f"{folder}: its vocabulary has no <mask> or [MASK]")
    if read is read_wordpiece and tokenizer.unknown is None:
        raise Mistake(f"{folder}: its vocabulary has no [UNK]")
    hub.check_vocab_size(folder, tokenizer, theirs["vocab_size"])
    pad_id = tokenizer.first("<pad>", "[PAD]")
    if read is read_wordpiece:  # nothing else depends on it, and files leave it out
        theirs["pad_token_id"] = pad_id
    if theirs["pad_token_id"] != pad_id:
        raise Mistake(f"{folder}: pad_token_id {theirs['pad_token_id']}, but the vocabulary's <pad> is {pad_id}")
    return tokenizer


# --- the command ---------------------------------------------------------------------------------


def convert_folder(folder):
    """(model, tokenizer, what is not used, nothing besides) of the files in a folder."""
    theirs = read_config(folder / "config.json")
    tokenizer = read_tokenizer(folder, theirs)
    model, skipped = convert(theirs, tokenizer, *hub.read_weights(folder))
    unused = hub.not_used(skipped, theirs, "hidden_dropout_prob", "attention_probs_dropout_prob")
    return model, tokenizer, unused, {}


def export(path, folder):
    """Write the RoBERTa of our checkpoint to a folder in the layout of the hub's."""
    model, tokenizer, _ = load_checkpoint(path)
    config = model.config
    if model.family != "bert" or not isinstance(tokenizer, BPETokenizer) or not config.first_position:
        raise Mistake(f"{path}: it is not a RoBERTa, and only that can be exported")
    theirs = their_config(config, tokenizer)
    hub.check_kind(path, config, our_config(theirs, tokenizer, config.tied), "RoBERTa")
    tensors = {}
    for name, tensor in model.state_dict().items():
        their = their_name(name, "roberta")
        tensors[their if their.startswith("lm_head.") else f"roberta.{their}"] = tensor
    tensors["lm_head.decoder.bias"] = tensors["lm_head.bias"]  # readers differ in which they look for
    hub.write_model(folder, theirs, tokenizer, tensors)


def main():
    what = "the files of a RoBERTa or BERT"
    hub.main(__doc__.splitlines()[0], DATA / "roberta", REPOSITORIES, what, convert_folder, export)


if __name__ == "__main__":
    command(main)
