"""RoBERTa's or BERT's weights and tokenizer as one checkpoint of ours, and back.

    python data/roberta/prepare.py                          # roberta-base, downloaded once
    python data/roberta/prepare.py DIR --out bert.pt        # files that are already there
    python data/roberta/prepare.py out/ckpt.pt --export DIR # for the rest of the world to load

The network is ours with `norm="post"`, `position="learned"` and a few settings more (ModelConfig
has them all), so this file is only about names: of files, of settings, and of tensors.
"""

import importlib.util
import json
import re
import sys
import warnings
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.corpus import DATA
from data.run.checkpoint import save, save_checkpoint
from data.run.errors import Mistake, command
from data.run.files import download, replacing
from data.run.flags import argument, flag, parse
from data.tokenizer import BPETokenizer, WordPieceTokenizer
from model import ModelConfig, Transformer, load_checkpoint

HUB = "https://huggingface.co"
REPOSITORIES = {
    "roberta-base": "FacebookAI/roberta-base",
    "roberta-large": "FacebookAI/roberta-large",
    "distilroberta-base": "distilbert/distilroberta-base",
}


@dataclass
class PrepareConfig:
    source: str = argument(
        f"{', '.join(REPOSITORIES)}; a folder with the files of a RoBERTa or BERT; a checkpoint to --export",
        default="roberta-base",
    )
    out: str | None = flag(None, "checkpoint to write (default: data/roberta/NAME.pt)")
    export: str | None = flag(None, "folder to write the checkpoint's model to, in the files of RoBERTa")


# --- settings ------------------------------------------------------------------------------------

# Their names of an activation, and ours; the first of several is the one that is exported.
OUR_ACTIVATION = {"gelu": "gelu", "gelu_new": "gelu_tanh", "relu": "relu", "silu": "silu"}
OUR_ACTIVATION |= {"gelu_python": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "swish": "silu"}
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
    theirs = read_json(path)
    kind = theirs.get("model_type")
    if kind is None:  # the oldest files do not say
        kind = next(
            (kind for kind in ("roberta", "bert") if kind in str(theirs.get("architectures")).lower()), None
        )
    if kind not in ("roberta", "bert"):
        raise Mistake(f"{path}: model_type {kind}; roberta and bert are what can be converted")
    for name, value in REQUIRED.items():
        if theirs.get(name, value) != value:
            raise Mistake(f"{path}: {name} {theirs[name]} cannot be represented, only {value}")
    defaults = DEFAULTS | KIND_DEFAULTS[kind]
    theirs = {**defaults, **theirs, "model_type": kind}
    for name, default in defaults.items():
        value = theirs[name]
        if isinstance(default, float):
            fits = type(value) in (int, float) and value >= 0
        elif type(default) is int:
            fits = type(value) is int and value >= (0 if name == "pad_token_id" else 1)
        else:
            fits = type(value) is type(default)
        if not fits:
            raise Mistake(f"{path}: {name} cannot be {value}; {default} is usual")
    if theirs["hidden_act"] not in OUR_ACTIVATION:
        known = ", ".join(OUR_ACTIVATION)
        raise Mistake(f"{path}: hidden_act {theirs['hidden_act']} cannot be represented; {known} can")
    if theirs["hidden_size"] % theirs["num_attention_heads"]:
        raise Mistake(f"{path}: hidden_size is not a multiple of num_attention_heads")
    return theirs


def our_config(theirs, tokenizer, tied):
    """The ModelConfig of their config."""
    roberta = theirs["model_type"] == "roberta"
    first_position = theirs["pad_token_id"] + 1 if roberta else 0
    activation = OUR_ACTIVATION[theirs["hidden_act"]]
    return ModelConfig(
        vocab_size=theirs["vocab_size"],
        mask_id=tokenizer.mask_id,
        special_ids=tokenizer.special_ids,
        block_size=theirs["max_position_embeddings"] - first_position,
        n_layer=theirs["num_hidden_layers"],
        n_head=theirs["num_attention_heads"],
        n_embd=theirs["hidden_size"],
        dropout=theirs["hidden_dropout_prob"],
        conv=0,
        norm="post",
        position="learned",
        mlp_width=theirs["intermediate_size"],
        activation=activation,
        bias=True,
        qk_norm=False,
        norm_eps=theirs["layer_norm_eps"],
        token_types=theirs["type_vocab_size"],
        first_position=first_position,
        head_activation="gelu" if roberta else activation,  # RoBERTa's head has it whatever its blocks have
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
        "hidden_act": next(name for name, ours in OUR_ACTIVATION.items() if ours == config.activation),
        "hidden_dropout_prob": config.dropout,
        "attention_probs_dropout_prob": config.dropout,
        "max_position_embeddings": config.block_size + config.first_position,
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
    names = NAMES | HEADS[kind]
    if name in names:
        return names[name]
    prefix = ""
    if name.startswith("blocks."):
        _, number, name = name.split(".", 2)
        prefix = f"encoder.layer.{number}."
    module, _, parameter = name.rpartition(".")
    return f"{prefix}{names[module]}.{parameter}"


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


def read_weights(folder):
    """(path, tensors by their names) of pytorch_model.bin, or else of model.safetensors."""
    path = folder / "pytorch_model.bin"
    other = folder / "model.safetensors"
    if not path.exists() and other.exists():
        path = other
        if importlib.util.find_spec("safetensors") is None:
            raise Mistake(f"{path}: reading it takes one package more, `pip install safetensors`")
    if not path.exists():
        raise Mistake(f"{folder}: no pytorch_model.bin in it, and no model.safetensors")
    try:
        if path == other:
            from safetensors.torch import load_file

            return path, load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is wrong is said below, in one sentence
            tensors = torch.load(path, map_location="cpu", weights_only=True)
        if not all(isinstance(name, str) and plain_tensor(tensor) for name, tensor in tensors.items()):
            raise TypeError("it holds more than dense tensors with names")
        return path, tensors
    except Exception as error:  # both raise a different one for every way to be broken
        reason = " ".join(str(error).split())[:120]
        raise Mistake(
            f"{path}: truncated, or no file of weights alone ({type(error).__name__}: {reason})"
        ) from None


def plain_tensor(tensor):
    return isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided and tensor.device.type == "cpu"


def by_plain_name(tensors, kind, path):
    """The tensors by their plain names; Mistake if two that differ share one."""
    found = {}
    # The head's bias may be there under two names; where they differ the decoder's is the one in use.
    for name, tensor in sorted(tensors.items(), key=lambda item: "decoder.bias" in item[0]):
        plain = plain_name(name, kind)
        twice = plain in found and plain != their_name("head.bias", kind)
        if twice and not torch.equal(found[plain], tensor):
            raise Mistake(f"{path}: {name} is there twice, with different values")
        found[plain] = tensor
    return found


def convert(theirs, tokenizer, path, tensors):
    """Our model with their tensors, and the names of those that it has no use for."""
    kind = theirs["model_type"]
    found = by_plain_name(tensors, kind, path)
    embedding, decoder = (
        found.get(their_name(name, kind)) for name in ("token_embedding.weight", "head.weight")
    )
    same = decoder is None or (embedding is not None and torch.equal(embedding, decoder))
    tied = theirs["tie_word_embeddings"] and same
    try:
        with torch.device("meta"):
            model = Transformer(our_config(theirs, tokenizer, tied))
    except (TypeError, ValueError, RuntimeError) as error:
        raise Mistake(f"{path.parent / 'config.json'}: no model can be made of it ({error})") from None
    ours = {}
    for name, parameter in model.state_dict().items():
        their = their_name("token_embedding.weight" if tied and name == "head.weight" else name, kind)
        if their not in found:
            raise Mistake(f"{path}: it has no {their}")
        if found[their].shape != parameter.shape:
            shapes = f"{tuple(found[their].shape)}, but config.json makes it {tuple(parameter.shape)}"
            raise Mistake(f"{path}: {their} is {shapes}")
        if not found[their].is_floating_point():
            raise Mistake(f"{path}: {their} is of {found[their].dtype}, and no weight is")
        ours[name] = found[their]
    used = {their_name(name, kind) for name in ours}
    skipped = [name for name in tensors if plain_name(name, kind) not in used]
    unknown = sorted(name for name in skipped if not UNUSED.match(plain_name(name, kind)))
    if unknown:
        raise Mistake(f"{path}: {', '.join(unknown[:3])} ({len(unknown)} in all) fit nowhere in this model")
    model.load_state_dict({name: tensor.float() for name, tensor in ours.items()}, assign=True)
    model.tie()
    return model.eval(), skipped


# --- tokenizers ----------------------------------------------------------------------------------


def byte_symbols():
    """The letter that GPT-2's files write for each of the 256 bytes: itself where it can be seen, and
    otherwise one from U+0100 on.
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in visible]
    return [chr(byte) if byte in visible else chr(0x100 + hidden.index(byte)) for byte in range(256)]


# How GPT-2 cuts text into words before it merges the bytes of each (encoder.py of its code, 2019).
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def padding_ids(n, vocab_size):
    """The ids after n tokens that a vocab_size has which was rounded up, for speed, to a multiple of 8."""
    return range(n, vocab_size) if vocab_size % 8 == 0 and vocab_size - n < 128 else range(0)


def read_bpe(folder, vocab_size):
    """The tokenizer of vocab.json and merges.txt."""
    vocab_path, merges_path = folder / "vocab.json", folder / "merges.txt"
    ids = read_json(vocab_path)
    lines = read_text(merges_path).split("\n")
    merges = [line for line in lines if line and not line.startswith("#version")]
    if not all(type(i) is int for i in ids.values()) or {*ids.values()} != {*range(len(ids))}:
        raise Mistake(f"{vocab_path}: its ids are not the numbers from 0 to {len(ids) - 1}")
    symbols = byte_symbols()
    tokens = list(dict.fromkeys([*symbols, *(merge.replace(" ", "") for merge in merges)]))
    missing = [token for token in tokens if token not in ids]
    if missing or any(merge.count(" ") != 1 for merge in merges) or not {*"".join(tokens)} <= {*symbols}:
        raise Mistake(
            f"{folder}: vocab.json and merges.txt do not belong together"
            + (f"; the first has no {missing[0]!r}, {len(missing)} such in all" if missing else "")
        )
    byte_of = {symbol: chr(byte) for byte, symbol in enumerate(symbols)}
    text = set(tokens)
    special = {name: i for name, i in ids.items() if name not in text}
    unmade = [name for name in special if not re.fullmatch(r"<.+>|madeupword\d+", name)]
    if unmade:
        count = f"no merge makes its {unmade[0]!r}, {len(unmade)} such in all"
        raise Mistake(f"{folder}: vocab.json and merges.txt do not belong together; {count}")
    special |= {f"<unused {i}>": i for i in padding_ids(len(ids), vocab_size)}
    latin = ["".join(map(byte_of.get, token)) for token in tokens]
    return BPETokenizer(latin, GPT2_PATTERN, [ids[token] for token in tokens], special)


def bpe_files(tokenizer):
    """The inverse of read_bpe: the texts of vocab.json and merges.txt.

    The merges are found by merging each token's bytes again.
    """
    symbols = byte_symbols()
    tokens = ["".join(symbols[ord(c)] for c in token) for token in tokenizer.state["tokens"]]
    rank = {token: i for i, token in enumerate(tokens)}
    lines = ["#version: 0.2"]
    for token in tokens[256:]:
        parts = list(token)
        while len(parts) > 2:
            pairs = [parts[i] + parts[i + 1] for i in range(len(parts) - 1)]
            best = min(range(len(pairs)), key=lambda i: rank.get(pairs[i], len(rank)))
            parts[best : best + 2] = [pairs[best]]
        lines.append(" ".join(parts))
    ids = dict(zip(tokens, tokenizer.ids)) | tokenizer.special
    ids = dict(sorted(ids.items(), key=lambda item: item[1]))
    return json.dumps(ids, ensure_ascii=False), "\n".join(lines) + "\n"


def read_wordpiece(folder, vocab_size):
    """The tokenizer of vocab.txt, cased or not as tokenizer_config.json says or else as it shows itself."""
    text = read_text(folder / "vocab.txt")
    tokens = text.rstrip("\n").split("\n")
    if len(tokens) < vocab_size and not text.endswith("\n"):
        raise Mistake(f"{folder / 'vocab.txt'}: truncated, it has {len(tokens)} of {vocab_size} tokens")
    tokens += [f"[unused{i}]" for i in padding_ids(len(tokens), vocab_size)]
    path = folder / "tokenizer_config.json"
    settings = read_json(path) if path.exists() else {}
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
    read = read_bpe if theirs["model_type"] == "roberta" else read_wordpiece
    tokenizer = read(folder, theirs["vocab_size"])
    if tokenizer.mask_id is None:
        raise Mistake(f"{folder}: its vocabulary has no <mask> or [MASK]")
    if read is read_wordpiece and tokenizer.unknown is None:
        raise Mistake(f"{folder}: its vocabulary has no [UNK]")
    if tokenizer.vocab_size != theirs["vocab_size"]:
        count = f"{tokenizer.vocab_size} tokens in the vocabulary, {theirs['vocab_size']} in config.json"
        raise Mistake(f"{folder}: {count}")
    pad_id = tokenizer.first("<pad>", "[PAD]")
    if read is read_wordpiece:  # nothing else depends on it, and files leave it out
        theirs["pad_token_id"] = pad_id
    if theirs["pad_token_id"] != pad_id:
        raise Mistake(
            f"{folder}: pad_token_id {theirs['pad_token_id']}, but the vocabulary's <pad> is {pad_id}"
        )
    return tokenizer


# --- files ---------------------------------------------------------------------------------------


def read_text(path):
    if not path.exists():
        raise Mistake(f"{path.parent}: no {path.name} in it")
    try:
        return path.read_bytes().decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError:
        raise Mistake(f"{path}: not UTF-8 text") from None


def read_json(path):
    """The dict in a JSON file."""
    try:
        content = json.loads(read_text(path))
        return {**content}
    except (json.JSONDecodeError, TypeError, RecursionError):
        raise Mistake(f"{path}: truncated, or not what JSON should hold here") from None


def fetch(name):
    """The folder with the files of a model of the hub, downloaded unless they are there."""
    folder = DATA / "roberta" / name
    for file in ("config.json", "vocab.json", "merges.txt", "pytorch_model.bin"):
        if not (folder / file).exists():
            url = f"{HUB}/{REPOSITORIES[name]}/resolve/main/{file}"
            download(url, folder / file, instead="the folder of a copy can be named instead")
    return folder


def export(path, folder):
    """Write the RoBERTa of our checkpoint to a folder in the layout of the hub's."""
    model, tokenizer, _ = load_checkpoint(path)
    config = model.config
    if not isinstance(tokenizer, BPETokenizer) or not config.first_position:
        raise Mistake(f"{path}: it is not a RoBERTa, and only that can be exported")
    vocab, merges = bpe_files(tokenizer)
    texts = {
        "config.json": json.dumps(their_config(config, tokenizer), indent=2),
        "vocab.json": vocab,
        "merges.txt": merges,
    }
    names = ["pytorch_model.bin", *texts]
    if there := [name for name in names if (Path(folder) / name).exists()]:
        raise Mistake(f"--export {folder}: there is a {there[0]} in it already")
    tensors = {}
    for name, tensor in model.state_dict().items():
        their = their_name(name, "roberta")
        tensors[their if their.startswith("lm_head.") else f"roberta.{their}"] = tensor
    tensors["lm_head.decoder.bias"] = tensors["lm_head.bias"]  # readers differ in which they look for
    with ExitStack() as stack:  # all of them or none
        weights, *files = [stack.enter_context(replacing(Path(folder) / name)) for name in names]
        save(tensors, weights)
        for file, text in zip(files, texts.values()):
            file.write(text.encode("utf-8"))
    print(f"{folder}: {', '.join(names)}")


def main():
    config = PrepareConfig(**parse(PrepareConfig, __doc__.splitlines()[0]))
    folder = Path(config.source)
    if config.export:
        if config.out:
            raise Mistake("--export: it writes a folder; --out is for a checkpoint")
        path = DATA / "roberta" / f"{config.source}.pt" if config.source in REPOSITORIES else folder
        return export(path, config.export)
    if config.source in REPOSITORIES:
        folder = fetch(config.source)
    elif not folder.is_dir():
        raise Mistake(f"{folder}: no such folder, and not one of {', '.join(REPOSITORIES)}")
    theirs = read_config(folder / "config.json")
    tokenizer = read_tokenizer(folder, theirs)
    model, skipped = convert(theirs, tokenizer, *read_weights(folder))
    out = Path(config.out or DATA / "roberta" / f"{folder.resolve().name}.pt")
    save_checkpoint(out, model, tokenizer)
    if skipped:
        print(f"not used: {', '.join(skipped)}")
    if theirs["attention_probs_dropout_prob"] != theirs["hidden_dropout_prob"]:
        print(
            f"not used: attention_probs_dropout_prob; dropout is {theirs['hidden_dropout_prob']} everywhere"
        )
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{out}: {parameters:,} parameters, {tokenizer.vocab_size:,} tokens")


if __name__ == "__main__":
    command(main)
