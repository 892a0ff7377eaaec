"""FineWeb (2406.17557) as GPT-2's tokens, from the shards that speedruns of GPT-2 train on.

A shard has 100 million tokens, and <|endoftext|> opens each document. --shards of them train, and one more validates.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from data.lib.corpus import DATA, tokenizer_by_name, write_tokens
from data.lib.download import download
from data.lib.errors import Mistake, command
from data.lib.flags import flag, parse
from data.lib.tokenizer import BPETokenizer
from data.weights import hub
from data.weights.gpt2 import START

REPOSITORY = "datasets/kjj0/fineweb10B-gpt2"
MAGIC, VERSION = 20240520, 1
HEADER = 1024  # bytes: 256 numbers of 32 bits. The third is how many tokens of 16 bits follow.


@dataclass
class PrepareConfig:
    shards: int = flag(1, "how many to train on, 0.2 GB each", least=1, most=103)
    dir: str | None = flag(None, "a folder that has the shards, instead of the download")
    name: str = flag("fineweb", "folder of data/ to write")
    tokenizer: str = flag("gpt2", "gpt2, or the path of a checkpoint with GPT-2's tokens")


def gpt2_tokenizer():
    """The tokenizer that a published GPT-2's checkpoint has, made from tiktoken's copy of it."""
    place = {token: i for i, token in enumerate(tokenizer_by_name("gpt2").state["tokens"])}
    tokens = [*map(chr, range(256)), *[*place][256:]]  # the 256 bytes come first in both, but sorted here
    special = {START: len(tokens), "<mask>": len(tokens) + 1}
    return BPETokenizer(tokens, hub.GPT2_PATTERN, [place[token] for token in tokens], special)


def read_shard(path, tokenizer):
    """Yield (ids, number of bytes of their text) for a part of the shard at a time. Mistake if it is no shard."""
    lengths = np.array([len(tokenizer.bytes_of[i]) for i in range(tokenizer.vocab_size)])
    lengths[list(tokenizer.special_ids)] = 0
    with open(path, "rb") as file:
        start = np.frombuffer(file.read(HEADER).ljust(HEADER, b"\0"), "<i4")
        if tuple(start[:2]) != (MAGIC, VERSION) or path.stat().st_size != HEADER + 2 * int(start[2]):
            raise Mistake(f"{path}: not a whole shard of GPT-2's tokens; get another copy")
        while piece := file.read(2**21):
            ids = np.frombuffer(piece, "<u2")
            if ids.max() >= tokenizer.mask_id:
                raise Mistake(f"{path}: it has a token {ids.max()}, and the last is {tokenizer.mask_id - 1}")
            yield ids, int(lengths[ids].sum())


def main():
    config = PrepareConfig(**parse(PrepareConfig, __doc__.splitlines()[0]))
    tokenizer = gpt2_tokenizer() if config.tokenizer == "gpt2" else tokenizer_by_name(config.tokenizer)
    if tokenizer.first(START) is None:
        raise Mistake(f"--tokenizer {config.tokenizer}: it has no {START}, so it is not GPT-2's")
    folder = Path(config.dir or DATA / "fineweb")
    shards = {"fineweb_val_000000.bin": "val"}
    shards |= {f"fineweb_train_{i:06}.bin": "train" for i in range(1, config.shards + 1)}
    for name in shards:
        if config.dir is None:
            url = f"{hub.HUB}/{REPOSITORY}/resolve/main/{name}"
            download(url, folder / name, instead="--dir takes a folder with a copy", most=2**28)
    pieces = ((split, *piece) for name, split in shards.items() for piece in read_shard(folder / name, tokenizer))
    write_tokens(config.name, pieces, tokenizer, f"{REPOSITORY}, {config.shards} of its shards")


if __name__ == "__main__":
    command(main)
