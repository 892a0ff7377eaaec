"""Any UTF-8 file, or a folder of them, as a corpus. The last tenth is for validation, unless --val names a file."""

import shlex
import sys
from itertools import chain, repeat
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.lib.corpus import check_name, read_pieces, split_at, tokenizer_by_name, write_corpus
from data.lib.errors import Mistake
from data.lib.flags import argument, flag, script


def texts_in(folder):
    """Yield the files below a folder in order, without hidden ones and those that aren't UTF-8, which it reports."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        if not any(part.startswith(".") for part in file.relative_to(folder).parts):
            try:
                all(read_pieces(file))  # the sizes of all texts must be known before the first is written
                yield file
            except Mistake as mistake:
                print(f"left out: {mistake}", file=sys.stderr)


def pieces_of(path):
    """The text of a file or folder, read a piece at a time, and its size in bytes."""
    files = [*texts_in(Path(path))] if Path(path).is_dir() else [Path(path)]
    return (text for file in files for text in read_pieces(file)), sum(file.stat().st_size for file in files)


def prepare(path, name, tokenizer, val=None):
    """Write the corpus data/NAME from a file or folder. val: another for the validation split, else the last tenth."""
    pieces, size = pieces_of(path)
    splits = split_at(pieces, size * 9 // 10)
    if val is not None:
        splits = chain(zip(repeat("train"), pieces), zip(repeat("val"), pieces_of(val)[0]))
    return write_corpus(name, splits, tokenizer, Path(path).name, least=256)  # a window, as train.py has by default


@script
def main(
    path: str = argument("a text file, or a folder whose texts are all taken, in order of their paths"),
    val: str | None = flag(None, "a file or folder for the validation split (default: the last tenth of the text)"),
    name: str | None = flag(None, "folder of data/ to write (default: the name of the path)"),
    tokenizer: str = flag("bytes", "bytes, gpt2, bpe:N to learn N tokens, or a checkpoint's path"),
):
    name = name or Path(path).resolve().stem
    check_name(name)
    prepare(path, name, tokenizer_by_name(tokenizer), val)
    print(f"`python train.py --data {shlex.quote(name)} --out_dir {shlex.quote(f'out-{name}')}` trains on it")
