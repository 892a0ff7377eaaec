"""WikiText-2, raw (1609.07843): 11 MB of Wikipedia's good articles, split by article by its makers.

Blank lines are dropped. With a tokenizer that has tokens for it, RoBERTa's above all, each line is
opened by `<s>` and closed by `</s>`; with the others it ends in a newline.
"""

import io
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.lib.corpus import DATA, tokenizer_by_name, write_corpus
from data.lib.download import download, open_zipped
from data.lib.errors import Mistake, command
from data.lib.flags import flag, parse

URL = "https://wikitext.smerity.com/wikitext-2-raw-v1.zip"
SHA256 = "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11"
LONGEST = 2**20  # characters of a line: an archive of a few bytes can hold one without end
FILES = {"train": "wiki.train.raw", "val": "wiki.valid.raw"}


@dataclass
class PrepareConfig:
    file: str | None = flag(None, "a copy of the zip, or a folder with the raw files, instead of the download")
    name: str | None = flag(None, "folder of data/ to write (default: that of this script)")
    tokenizer: str = flag("bytes", "bytes, gpt2, or a checkpoint's path")


def open_split(path, name):
    """The raw file `name`, binary, of a zip, a folder, or the folder that the file `path` is in."""
    if zipfile.is_zipfile(path):
        return open_zipped(path, name)
    folder = path if path.is_dir() else path.parent
    if path.is_file() and path.name not in FILES.values():
        raise Mistake(f"{path}: neither a zip nor {' or '.join(FILES.values())}")
    if not (folder / name).exists():
        raise Mistake(f"{folder}: there is no {name} in it")
    return open(folder / name, "rb")


def lines(path):
    """(split, line) of all lines that are not blank."""
    for split, name in FILES.items():
        try:
            with (
                open_split(path, name) as file,
                io.TextIOWrapper(file, encoding="utf-8", newline="\n") as text,
            ):
                while line := text.readline(LONGEST):
                    if len(line) == LONGEST:
                        raise Mistake(f"{path}: {name} in it has a line of {LONGEST:,} characters or more")
                    if line.strip():
                        yield split, line
        except (Mistake, OSError):
            raise
        except Exception as error:  # zipfile raises a different one for every way to be damaged
            raise Mistake(f"{path}: {name} in it is damaged ({error})") from None


def main(name="wikitext2", url=URL, sha256=SHA256, description=__doc__):
    config = PrepareConfig(**parse(PrepareConfig, description.splitlines()[0]))
    tokenizer = tokenizer_by_name(config.tokenizer)
    path = Path(config.file or DATA / name / url.rpartition("/")[2])
    if not path.exists():
        if config.file:
            raise Mistake(f"{path}: there is no such file or folder")
        download(url, path, sha256)
    write_corpus(config.name or name, lines(path), tokenizer, path.name, encode=tokenizer.encode_line)


if __name__ == "__main__":
    command(main)
