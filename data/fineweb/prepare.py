"""FineWeb (2406.17557), ready as GPT-2's tokens: the shards that speedruns of GPT-2 train on.

A shard has 100 million tokens, in which <|endoftext|> opens each document. --shards of them train, and one
more validates. Those that are there are not fetched again.
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
HEADER = 1024  # bytes: 256 numbers of 32 bits, of which the third is how many tokens of 16 bits follow


@dataclass
class PrepareConfig:
    shards: int = flag(1, "how many to train on, 0.2 GB each", least=1, most=103)
    dir: str | None = flag(None, "a folder that has the shards, instead of the download")
    name: str = flag("fineweb", "folder of data/ to write")
    tokenizer: str = flag("gpt2", "gpt2, or the path of a checkpoint with GPT-2's tokens")


def gpt2_tokenizer():
    """The tokenizer that data/gpt2 makes of GPT-2's files, so that its checkpoints go on with this corpus;
    made of tiktoken's, in which the id of a token is its place.
    """
    place = {token: i for i, token in enumerate(tokenizer_by_name("gpt2").state["tokens"])}
    tokens = [*map(chr, range(256)), *[*place][256:]]  # the first 256 are the bytes in both, here in order
    special = {START: len(tokens), "<mask>": len(tokens) + 1}
    return BPETokenizer(tokens, hub.GPT2_PATTERN, [place[token] for token in tokens], special)


def check_header(path):
    """Raise Mistake unless a file begins as a shard, and has as many tokens as it says."""
    with open(path, "rb") as file:
        start = file.read(12).ljust(12, b"\0")
    magic, version, n = np.frombuffer(start, "<i4").tolist()
    if (magic, version) != (MAGIC, VERSION):
        raise Mistake(f"{path}: not a shard of GPT-2's tokens, which begins with {MAGIC}, {VERSION}")
    size = path.stat().st_size
    if n < 0 or size != HEADER + 2 * n:
        counts = f"it says that it has {n:,} tokens, and it is {size:,} bytes and not {HEADER + 2 * n:,}"
        raise Mistake(f"{path}: {counts}; get another copy")


def read_shard(path, tokenizer):
    """(ids, bytes of their text) of a shard, a piece at a time."""
    lengths = np.array([len(tokenizer.bytes_of[i]) for i in range(tokenizer.vocab_size)])
    lengths[list(tokenizer.special_ids)] = 0  # whatever is shown for them
    with open(path, "rb") as file:
        file.seek(HEADER)
        while piece := file.read(2**21):
            ids = np.frombuffer(piece, "<u2")
            if ids.max() >= tokenizer.mask_id:
                raise Mistake(f"{path}: it has a token {ids.max()}, and the last is {tokenizer.mask_id - 1}")
            yield ids, int(lengths[ids].sum())


def main():
    config = PrepareConfig(**parse(PrepareConfig, __doc__.splitlines()[0]))
    tokenizer = gpt2_tokenizer() if config.tokenizer == "gpt2" else tokenizer_by_name(config.tokenizer)
    if tokenizer.first(START) is None:
        raise Mistake(f"--tokenizer {config.tokenizer}: it has no {START}, and so it is not GPT-2's")
    folder = Path(config.dir or DATA / "fineweb")
    shards = [("val", folder / "fineweb_val_000000.bin")]
    shards += [("train", folder / f"fineweb_train_{i:06}.bin") for i in range(1, config.shards + 1)]
    for _, path in shards:
        if not path.exists():
            if config.dir:
                raise Mistake(f"{folder}: there is no {path.name} in it")
            url = f"{hub.HUB}/{REPOSITORY}/resolve/main/{path.name}"
            download(url, path, instead="--dir takes a folder with a copy", most=2**28)
        check_header(path)
    pieces = ((split, *piece) for split, path in shards for piece in read_shard(path, tokenizer))
    write_tokens(config.name, pieces, tokenizer, f"{REPOSITORY}, {config.shards} of its shards")


if __name__ == "__main__":
    command(main)
