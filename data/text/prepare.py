"""Any UTF-8 file, or a folder of them, as a corpus; the last 10% of the bytes are for validation.

The text is read a megabyte at a time, so a file may be larger than memory.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.lib.corpus import check_name, read_pieces, split_at, tokenizer_by_name, write_corpus
from data.lib.errors import Mistake, command
from data.lib.flags import argument, flag, parse

VAL_SHARE = 0.1


@dataclass
class PrepareConfig:
    path: str = argument("a text file, or a folder whose texts are all taken, in order of their paths")
    name: str | None = flag(None, "folder of data/ to write (default: the name of the path)")
    tokenizer: str = flag("bytes", "bytes, gpt2, or a checkpoint's path")


def texts_of(files):
    """Those of the files that are UTF-8; the others are said. They are read for that, and then once more,
    because all sizes must be known before the first byte is written.
    """
    for file in files:
        try:
            for _ in read_pieces(file):
                pass
            yield file
        except Mistake as mistake:
            print(f"left out: {mistake}", file=sys.stderr)


def prepare(path, name, tokenizer):
    """Write the corpus data/NAME from the file or folder `path`; the same as the command."""
    path = Path(path)
    if not path.exists():
        raise Mistake(f"{path}: there is no such file or folder")
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    files = list(texts_of(files)) if path.is_dir() else files
    size = sum(file.stat().st_size for file in files)
    if size == 0:
        raise Mistake(f"{path}: there is no text in it")
    pieces = (text for file in files for text in read_pieces(file))
    return write_corpus(name, split_at(pieces, int(size * (1 - VAL_SHARE))), tokenizer, path.name)


def main():
    config = PrepareConfig(**parse(PrepareConfig, __doc__.splitlines()[0]))
    name = Path(config.path).resolve().stem if config.name is None else config.name
    check_name(name, own="")
    prepare(config.path, name, tokenizer_by_name(config.tokenizer))
    command = shlex.join(["python", "train.py", "--data", name, "--out_dir", f"out-{name}"])
    print(f"`{command}` trains on it")


if __name__ == "__main__":
    command(main)
