"""Any UTF-8 file, or a folder of them, as a corpus. The last tenth validates.

The text is read a megabyte at a time, so it may be larger than memory.
"""

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.lib.corpus import check_name, read_pieces, split_at, tokenizer_by_name, write_corpus
from data.lib.errors import Mistake, command
from data.lib.flags import argument, flag, parse


@dataclass
class PrepareConfig:
    path: str = argument("a text file, or a folder whose texts are all taken, in order of their paths")
    name: str | None = flag(None, "folder of data/ to write (default: the name of the path)")
    tokenizer: str = flag("bytes", "bytes, gpt2, or a checkpoint's path")


def texts_in(folder):
    """Yield the files below a folder, in order, but not hidden ones or, with a note on stderr, those without UTF-8."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        if any(part.startswith(".") for part in file.relative_to(folder).parts):
            continue
        try:
            all(read_pieces(file))  # the sizes of all texts must be known before the first is written
            yield file
        except Mistake as mistake:
            print(f"left out: {mistake}", file=sys.stderr)


def prepare(path, name, tokenizer):
    """Write the corpus data/NAME from the file or folder `path`."""
    path = Path(path)
    files = list(texts_in(path)) if path.is_dir() else [path]
    size = sum(file.stat().st_size for file in files)
    if size == 0:
        raise Mistake(f"{path}: there is no text in it")
    pieces = (text for file in files for text in read_pieces(file))
    return write_corpus(name, split_at(pieces, size * 9 // 10), tokenizer, path.name)


def main():
    config = PrepareConfig(**parse(PrepareConfig, __doc__.splitlines()[0]))
    name = Path(config.path).resolve().stem if config.name is None else config.name
    check_name(name, own="")
    prepare(config.path, name, tokenizer_by_name(config.tokenizer))
    print(f"`python train.py --data {shlex.quote(name)} --out_dir {shlex.quote(f'out-{name}')}` trains on it")


if __name__ == "__main__":
    command(main)
