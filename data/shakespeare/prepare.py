"""Tiny Shakespeare, 1.1 MB of plays. The last 10% validates, as everywhere in the field."""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from data.lib.corpus import DATA, tokenizer_by_name
from data.lib.download import check_sha256, download
from data.lib.errors import command
from data.lib.flags import flag, parse
from data.text.prepare import prepare

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


@dataclass
class PrepareConfig:
    file: str | None = flag(None, "a copy that is already there, instead of the download")
    name: str = flag("shakespeare", "folder of data/ to write")
    tokenizer: str = flag("bytes", "bytes, gpt2, or a checkpoint's path")


def main():
    config = PrepareConfig(**parse(PrepareConfig, __doc__.splitlines()[0]))
    path = config.file or DATA / "shakespeare" / "input.txt"
    if config.file is None:
        download(URL, path, SHA256)
    check_sha256(path, SHA256)
    prepare(path, config.name, tokenizer_by_name(config.tokenizer))


if __name__ == "__main__":
    command(main)
