"""Writes small files of every kind that a reader of ours takes: checkpoints, corpora, models, archives, pictures."""

import contextlib
import io
import shutil
from unittest import mock

import numpy as np

import data.chat.prepare
import data.lib.corpus
import data.text.prepare
import train
from data.lib.chat import BYTES
from data.lib.checkpoint import FAMILIES, published_network, save_checkpoint
from data.lib.tokenizer import BPETokenizer, ByteTokenizer, PictureTokenizer
from model import ModelConfig, Transformer

MERGES = ["t h", "th e", "Ġ a", "i n"]


def write_shard(path, ids):
    """Write a shard as FineWeb's are: 256 numbers, of which three are used, and 16 bits for each token."""
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(ids)
    path.write_bytes(header.tobytes() + np.array(ids, "<u2").tobytes())


LINES = "".join(f"the line {i} in a book\n" for i in range(400))
TOKENS, PATTERN = [chr(i) for i in range(256)] + ["in", "the"], r" ?\w+|\s+|[^\s\w]+"
SHAPE = {"n_layer": 1, "n_head": 1, "n_embd": 16, "context": 16}


def make_good(good):
    """Write good files of every kind into a folder."""
    quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with quiet[0], quiet[1], mock.patch("data.lib.corpus.DATA", good / "data"):
        make_corpora(good)
        make_checkpoints(good)
    make_published_models(good)
    make_archives(good)


def make_corpora(good):
    """Corpora of text, of conversations and of pictures, and a checkpoint of a run."""
    (good / "book.txt").write_text(LINES)
    data.text.prepare.prepare(good / "book.txt", "book", ByteTokenizer())
    flags = "--data book --n_layer 1 --n_head 1 --n_embd 16 --context 16 --batch_size 2 --max_iters 2"
    flags += f" --eval_tokens 64 --evals 1 --prompt_len 0 --dtype float32 --out_dir {good}/out"
    with mock.patch("sys.argv", ["train.py", *flags.split()]):
        train.main()
    shutil.copy(good / "out" / "ckpt.pt", good / "small.pt")
    turn = '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "So"}]'
    (good / "talk.jsonl").write_text(f'{{"messages": {turn}}}\n{turn}\n' * 10)
    data.chat.prepare.prepare(good / "talk.jsonl", None, "talk", ByteTokenizer())
    canvas = PictureTokenizer(4, 3, 2, 5)
    pictures = [("train", canvas.canvas("ab", [i % 5] * 6), 10) for i in range(20)]
    data.lib.corpus.write_tokens("pictures", [*pictures, ("val", *pictures[0][1:])], canvas, "made")
    config = ModelConfig(262, 256, **{**SHAPE, "context": 10}, kinds=canvas.kinds)
    save_checkpoint(good / "pictures.pt", Transformer(config), canvas)


def make_checkpoints(good):
    """A checkpoint of every network and tokenizer."""
    save_checkpoint(good / "blocks.pt", Transformer(ModelConfig(**SHAPE, block=4)), ByteTokenizer())
    config = ModelConfig(**{**SHAPE, "context": 48}, special_ids=(256,), end_ids=(3,))
    save_checkpoint(good / "talk.pt", Transformer(config), ByteTokenizer(), chat=BYTES)
    bpe = BPETokenizer(TOKENS, PATTERN)
    save_checkpoint(good / "bpe.pt", Transformer(ModelConfig(bpe.vocab_size, bpe.mask_id, **SHAPE)), bpe)
    special = {"<|endoftext|>": len(TOKENS), "<mask>": len(TOKENS) + 1}
    config = ModelConfig(len(TOKENS) + 2, len(TOKENS) + 1, **SHAPE)
    save_checkpoint(good / "start.pt", Transformer(config), BPETokenizer(TOKENS, PATTERN, special=special))
    for family in FAMILIES:
        network, causal = published_network(family), {"block": 1, "shift_id": 0} if family in ("gpt2", "llama") else {}
        save_checkpoint(good / f"{family}.pt", network(network.Config(**SHAPE, **causal, tied=True)), ByteTokenizer())


def make_published_models(good):
    """The files of published models, with random weights."""
    from model_files import (
        make_tokenizer,
        mdlm_settings,
        save_weights,
        write_bert,
        write_gpt2,
        write_llada,
        write_mdlm,
        write_roberta,
    )

    for kind, write in (("gpt2", write_gpt2), ("roberta", write_roberta), ("bert", write_bert)):
        model = write(good / kind) if kind == "bert" else write(good / kind, MERGES)
        save_weights(good / kind, model.state_dict())
    small = {"width": 16, "layers": 1, "heads": 2}
    write_mdlm(good / "mdlm", mdlm_settings(**small), None, MERGES)
    write_llada(good / "llada", make_tokenizer(LINES, 20), **small, inside=16)


def make_archives(good):
    """The files that corpora are prepared from."""
    (good / "shards").mkdir()
    ids = BPETokenizer(TOKENS, PATTERN).encode(LINES[:600])
    for name in ("val_000000", "train_000001"):
        write_shard(good / "shards" / f"fineweb_{name}.bin", [len(TOKENS), *ids])
