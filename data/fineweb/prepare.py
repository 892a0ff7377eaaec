"""FineWeb (2406.17557) as GPT-2's tokens, from the shards that speedruns of GPT-2 train on."""

import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.lib.corpus import DATA, tokenizer_by_name, write_tokens
from data.lib.download import download
from data.lib.errors import Mistake
from data.lib.flags import flag, script
from data.lib.tokenizer import BPETokenizer
from data.weights import hub
from data.weights.gpt2 import START

REPOSITORY = "datasets/kjj0/fineweb10B-gpt2"
HEADER = 1024  # bytes, which are 256 32-bit numbers. The third is the number of 16-bit tokens, 100 million.


def gpt2_tokenizer():
    """GPT-2's tokenizer as our published checkpoint has it, built from tiktoken's copy."""
    place = {token: i for i, token in enumerate(tokenizer_by_name("gpt2").state["tokens"])}
    tokens = [*map(chr, range(256)), *[*place][256:]]  # the 256 bytes come first in both, but sorted here
    special = {START: len(tokens), "<mask>": len(tokens) + 1}
    return BPETokenizer(tokens, hub.GPT2_PATTERN, [place[token] for token in tokens], special)


def read_shard(path, tokenizer):
    """Yield (ids, number of bytes of their text), a part of the shard at a time. Raises Mistake if it isn't a shard."""
    special = tokenizer.special_ids
    lengths = np.array([0 if i in special else len(tokenizer.bytes_of[i]) for i in range(tokenizer.vocab_size)])
    n = (path.stat().st_size - HEADER) / 2
    with open(path, "rb") as file:
        if np.fromfile(file, "<i4", HEADER // 4)[:3].tolist() != [20240520, 1, n]:  # format and version
            raise Mistake(f"{path}: not a whole shard of GPT-2's tokens; get another copy")
        while len(ids := np.fromfile(file, "<u2", 2**20)):
            if ids.max() >= tokenizer.mask_id:
                raise Mistake(f"{path}: it has a token {ids.max()}, and the last is {tokenizer.mask_id - 1}")
            yield ids, int(lengths[ids].sum())


@script
def main(
    shards: int = flag(1, "how many to train on, 0.2 GB each", least=1, most=103),
    dir: str | None = flag(None, "a folder that has the shards, instead of the download"),
    name: str = flag("fineweb", "folder of data/ to write"),
):
    folder, tokenizer = Path(dir or DATA / "fineweb"), gpt2_tokenizer()
    files = ["fineweb_val_000000.bin", *(f"fineweb_train_{i:06}.bin" for i in range(1, shards + 1))]
    for file in [] if dir else files:
        url = f"{hub.HUB}/{REPOSITORY}/resolve/main/{file}"
        download(url, folder / file, instead="--dir takes a folder with a copy", most=2**28)
    pieces = ((file.split("_")[1], *piece) for file in files for piece in read_shard(folder / file, tokenizer))
    write_tokens(name, pieces, tokenizer, f"{REPOSITORY}, {shards} of its shards")
