"""text8: 100 million characters of Wikipedia, a to z and the space, cut where all papers cut them.

The first 90 million train and the next 5 validate. The last 5, which papers report, are kept out, and with
--test validate instead: a corpus for `train.py --eval_only` alone. A character is a byte, and a byte a token.
"""

import hashlib
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np

from data.lib.corpus import DATA, write_tokens
from data.lib.download import download, open_zipped
from data.lib.errors import Mistake, command
from data.lib.flags import flag, parse
from data.lib.tokenizer import ByteTokenizer

URL = "https://mattmahoney.net/dc/text8.zip"
ZIP_SHA256 = "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232"
SHA256 = "6e890197040d37d85beb962ae1f041ff1d9a9ca8d20c7d99c85027eebf51dca7"  # of the text in it
SIZES = {"train": 90_000_000, "val": 5_000_000, "test": 5_000_000}  # bytes


@dataclass
class PrepareConfig:
    file: str | None = flag(None, "a copy of the zip, or of the text in it, instead of the download")
    test: bool = flag(False, "the test split validates; for train.py --eval_only")
    name: str | None = flag(None, "folder of data/ to write (default: the text's name, and -test)")


def splits(path, name, sha256, sizes):
    """(split, ids, how many) of the bytes of a text, a piece at a time. path: of the text, or of a zip with
    `name`. Mistake, at the end, if it is another text.
    """
    digest = hashlib.sha256()
    try:
        with open_zipped(path, name) if zipfile.is_zipfile(path) else open(path, "rb") as file:
            for split, size in sizes.items():
                while size and (piece := file.read(min(size, 2**20))):
                    size -= len(piece)
                    digest.update(piece)
                    yield split, np.frombuffer(piece, np.uint8), len(piece)
            if size or file.read(1):  # a few bytes of a zip can be a text without end
                found = "fewer" if size else "more"
                raise Mistake(f"{path}: {name} has {sum(sizes.values()):,} bytes, and this has {found}")
    except (Mistake, OSError):
        raise
    except Exception as error:  # zipfile raises a different one for every way to be damaged
        raise Mistake(f"{path}: {name} in it is damaged ({error})") from None
    if (found := digest.hexdigest()) != sha256:
        raise Mistake(f"{path}: the sha256 of its text is {found}, and not {sha256}; get another copy")


def main(name="text8", url=URL, zip_sha256=ZIP_SHA256, sha256=SHA256, sizes=SIZES, description=__doc__):
    config = PrepareConfig(**parse(PrepareConfig, description.splitlines()[0]))
    path = Path(config.file or DATA / name / url.rpartition("/")[2])
    if config.file is None and not path.exists():
        download(url, path, zip_sha256)
    held_out, folder = ("test", f"{name}-test") if config.test else ("val", name)
    roles = {"train": "train", held_out: "val"}
    pieces = splits(path, name, sha256, sizes)
    pieces = ((roles[split], *piece) for split, *piece in pieces if split in roles)
    write_tokens(folder if config.name is None else config.name, pieces, ByteTokenizer(), path.name)


if __name__ == "__main__":
    command(main)
