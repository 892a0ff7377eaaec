"""text8 and enwik8: 100 million characters or bytes of Wikipedia, cut where all papers cut them.

    python data/text8/prepare.py            # data/text8: letters from a to z, and spaces
    python data/text8/prepare.py enwik8     # data/enwik8: with the markup

The first 90 million train, the next 5 validate, and the last 5 are the test that papers report. With --test the last 5
validate instead, which is meant for `train.py --eval_only` alone. A token is a byte.
"""

import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from data.lib.corpus import DATA, write_tokens
from data.lib.download import check_sha256, download
from data.lib.errors import command
from data.lib.flags import argument, flag, parse
from data.lib.tokenizer import ByteTokenizer

URL = "https://mattmahoney.net/dc/{}.zip"
SHA256 = {
    "text8": "6e890197040d37d85beb962ae1f041ff1d9a9ca8d20c7d99c85027eebf51dca7",
    "text8.zip": "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232",
    "enwik8": "2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
    "enwik8.zip": "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
}
SIZES = {"train": 90_000_000, "val": 5_000_000, "test": 5_000_000}  # bytes


@dataclass
class PrepareConfig:
    corpus: Literal["text8", "enwik8"] = argument("which of the two", "text8")
    file: str | None = flag(None, "a copy of the zip, or of the text in it, instead of the download")
    test: bool = flag(False, "the test split validates; for train.py --eval_only")
    name: str | None = flag(None, "folder of data/ to write (default: the corpus, and -test)")


def pieces(file, sizes, held_out):
    """Yield (split, ids, number of bytes) for a megabyte of the file at a time. The held_out split validates."""
    for split, size in sizes.items():
        while size and (piece := file.read(min(size, 2**20))):
            size -= len(piece)
            if split in ("train", held_out):
                yield "train" if split == "train" else "val", np.frombuffer(piece, np.uint8), len(piece)


def main(sha256=SHA256, sizes=SIZES, url=URL):
    config = PrepareConfig(**parse(PrepareConfig, __doc__.splitlines()[0]))
    name, zipped = config.corpus, f"{config.corpus}.zip"
    path = Path(config.file or DATA / name / zipped)
    if config.file is None:
        download(url.format(name), path, sha256[zipped])
    is_zip = zipfile.is_zipfile(path)
    check_sha256(path, sha256[zipped if is_zip else name])
    with zipfile.ZipFile(path).open(name) if is_zip else open(path, "rb") as file:
        held_out, folder = ("test", f"{name}-test") if config.test else ("val", name)
        write_tokens(config.name or folder, pieces(file, sizes, held_out), ByteTokenizer(), path.name)


if __name__ == "__main__":
    command(main)
