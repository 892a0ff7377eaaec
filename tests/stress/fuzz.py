"""Gives every reader of files damaged and hostile ones. Each must end in a correct read or in one sentence.

    python tests/stress/fuzz.py --cases 1000                         # of each reader: 5 minutes on one core
    python tests/stress/fuzz.py --only corpus --first 17 --cases 1    # repeat one case

A case must exit with code 0, or with code 2 and one sentence: no traceback, no hang, and little memory.
tests/test_fuzz.py runs some cases of each reader. A case is known by its reader and its number.
"""

import contextlib
import io
import json
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest import mock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
import torch
from good_files import make_good
from tqdm import tqdm

import data.chat.prepare
import data.fineweb.prepare
import data.lib.corpus
import data.text.prepare
import data.weights.prepare
import sample
import train
from data.lib.checkpoint import FAMILIES
from data.lib.errors import command
from data.lib.flags import flag, parse
from model import load_checkpoint

SECONDS = 20  # that a case may take
MEGABYTES = 300  # that all cases of a reader together may add to the memory of the process

VALUES = [None, True, 0, 1, -1, 2, 3, 7, 255, 256, 257, 2**31, 2**63, 10**30, 0.5, -1.0, 1e308, float("nan")]
VALUES += [float("inf"), "", "x", "bytes", "bpe", "wordpiece", "\ud800", "(", "(a+)+$"]
VALUES += ["setitem", *FAMILIES, "gelu_tanh"]
VALUES += [[], {}, [1], [[0, 1]], {"a": 1}, ["a", "a"], ["\u1234"], [0] * 300, "y" * 10_000]


# --- how a file is damaged -----------------------------------------------------------------------


def damage(content, rng):
    """Change, remove or insert some bytes."""
    content = bytearray(content)
    at = rng.randrange(len(content) + 1)
    kind = rng.choice(["flip", "flip", "flip", "cut", "zero", "insert", "drop", "repeat", "text"])
    if kind == "flip":
        for _ in range(rng.choice([1, 1, 1, 8, 100])):
            if content:
                content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        del content[at:]
    elif kind == "zero":
        size = rng.choice([1, 8, 512, 4096])
        content[at : at + size] = bytes(len(content[at : at + size]))
    elif kind == "insert":
        content[at:at] = rng.randbytes(rng.choice([1, 4, 100]))
    elif kind == "drop":
        del content[at : at + rng.choice([1, 4, 1000])]
    elif kind == "repeat":
        content[at:at] = content[at : at + rng.choice([1, 64, 5000])]
    else:
        content[at:at] = rng.choice([b"\xff\xfe", b"\x00", b"null", b"-1", b"9" * 30, b"[" * 3000, b'"'])
    return bytes(content)


def other_value(old, rng):
    """A value that a stranger might have put in place of this one."""
    if torch.is_tensor(old):
        shapes = [(), (0,), (1,), (3, 5), (*old.shape, 1), tuple(old.shape[::-1])]
        others = [old.double(), old.long(), old * torch.nan, old.flatten()[:1], old.to_sparse(), None, 3, "x"]
        return rng.choice([*map(torch.zeros, shapes), *others])
    if isinstance(old, int) and rng.random() < 0.5:
        return old + rng.choice([-1, 1, 2, 10**6])
    return rng.choice(VALUES)


def change(content, rng):
    """Copy nested dicts and lists with one value, somewhere, replaced or removed."""
    content = type(content)(content)
    keys = list(content) if isinstance(content, dict) else list(range(len(content)))
    if not keys:
        return content
    key = rng.choice(keys)
    if isinstance(content[key], (dict, list)) and content[key] and rng.random() < 0.85:
        content[key] = change(content[key], rng)
    elif rng.random() < 0.2:
        del content[key]
    else:
        content[key] = other_value(content[key], rng)
    return content


def with_other_header(content, rng):
    """Change one value in the header of a safetensors file."""
    n = int.from_bytes(content[:8], "little")
    header = json.dumps(change(json.loads(content[8 : 8 + n]), rng)).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + n :]


def damage_one(folder, rng, names=None):
    """Damage a file of a folder, or change one of its values."""
    path = folder / rng.choice(names or sorted(path.name for path in folder.iterdir()))
    if path.suffix == ".json" and rng.random() < 0.7:
        with contextlib.suppress(ValueError, RecursionError):  # if it is damaged already
            path.write_text(json.dumps(change(json.loads(path.read_text()), rng)))
    elif path.suffix == ".safetensors" and rng.random() < 0.5:
        with contextlib.suppress(ValueError, RecursionError):
            path.write_bytes(with_other_header(path.read_bytes(), rng))
    elif path.suffix == ".bin" and path.name == "pytorch_model.bin" and rng.random() < 0.5:
        with contextlib.suppress(Exception):
            torch.save(change(torch.load(path), rng), path)
    else:
        path.write_bytes(damage(path.read_bytes(), rng))


# --- the readers ---------------------------------------------------------------------------------
#
# A reader(good, folder, rng) puts a case into an empty folder, with the help of the good files. It returns the command
# that reads the case, its arguments, and a function that checks what was read, or None.


def damaged_checkpoint(good, folder, rng):
    """A checkpoint with damaged bytes. What is read must be what was written."""
    (folder / "small.pt").write_bytes(damage((good / "small.pt").read_bytes(), rng))

    def correct():
        (model, tokenizer, _), (ours, our_tokenizer, _) = (load_checkpoint(p / "small.pt") for p in (folder, good))
        assert (model.config, tokenizer.state) == (ours.config, our_tokenizer.state)
        assert all(map(torch.equal, model.state_dict().values(), ours.state_dict().values()))

    return sample.main, ["--ckpt", folder / "small.pt", "--length", "8", "--steps", "2", "--dtype", "float32"], correct


def bad_checkpoint(good, folder, rng):
    """A whole checkpoint in which one value is a stranger's."""
    name = rng.choice(["small.pt", "blocks.pt", "bpe.pt", "pictures.pt", *(f"{family}.pt" for family in FAMILIES)])
    torch.save(change(torch.load(good / name, weights_only=True), rng), folder / "last.pt")
    if rng.random() < 0.6:
        flags = ["--prompt", "in"] if name == "pictures.pt" else ["--prompt", "in the", "--length", "8"]
        flags += ["--dtype", "float32"] if name == "gpt2.pt" else ["--dtype", "float32", "--steps", "2"]
        flags += rng.choice([[], ["--order", "entropy"], ["--save", folder / "x.html"]])
        return sample.main, ["--ckpt", folder / "last.pt", *flags], None
    (folder / "data").symlink_to(good / "data")
    flags = ["--out_dir", folder, "--init_from", "resume", "--data", "book", "--max_iters", "3"]
    return train.main, [*flags, "--eval_tokens", "64", "--evals", "1"], None


def corpus(good, folder, rng):
    name = rng.choice(["book", "pictures"])
    shutil.copytree(good / "data" / name, folder / "data" / "book")
    damage_one(folder / "data" / "book", rng, ["train.bin", "val.bin", "meta.json", "meta.json"])
    model = good / ("pictures.pt" if name == "pictures" else "small.pt")
    flags = ["--eval_only", "--init_from", model, "--data", "book", "--eval_tokens", "64"]
    return train.main, flags, None


def examples(good, folder, rng):
    """A corpus of prompts and answers."""
    talk = Path(shutil.copytree(good / "data" / "talk", folder / "data" / "talk"))
    damage_one(talk, rng, ["train.bin", "val.rows", "train.rows", "meta.json", "meta.json"])
    flags = ["--eval_only", "--init_from", good / "talk.pt", "--data", "talk", "--eval_tokens", "64"]
    return train.main, flags, None


def jsonl(good, folder, rng):
    content = (good / "talk.jsonl").read_bytes()
    if rng.random() < 0.5:
        lines = content.splitlines()
        number = rng.randrange(len(lines))
        lines[number] = json.dumps(change(json.loads(lines[number]), rng)).encode()
        content = b"\n".join(lines)
    else:
        content = damage(content, rng)
    (folder / "x.jsonl").write_bytes(content)
    more = rng.choice([[], ["--tokenizer", good / "talk.pt"], ["--val", folder / "x.jsonl"]])
    return data.chat.prepare.main, [folder / "x.jsonl", "--name", "t", *more], None


def chat(good, folder, rng):
    """A checkpoint with a stranger's chat template, and a stranger's message."""
    content = torch.load(good / "talk.pt", weights_only=True)
    part = rng.choice(["chat", "chat", "config", None])
    if part:
        content[part] = change(content[part], rng)
    torch.save(content, folder / "x.pt")
    parts = ["Hi", " ", "\x03", "\x01user\x02", "{role}", "{content}", "<mask>", "<mask*9>", "\udcff", "\n"]
    said = "".join(rng.choices(parts, k=rng.randrange(5)))
    (folder / "x.txt").write_bytes(said.encode("utf-8", "surrogateescape"))
    given = rng.choice([["--prompt", said], ["--prompt_file", folder / "x.txt"]])
    flags = ["--ckpt", folder / "x.pt", "--chat", "--length", "48", "--dtype", "float32"]
    return sample.main, [*flags, *rng.choice([["--steps", "2"], ["--order", "threshold"]]), *given], None


def weights(kind, module):
    """The reader of a folder with a published model's files."""

    def reader(good, folder, rng):
        shutil.copytree(good / kind, folder / kind)
        for _ in range(rng.choice([1, 1, 2])):
            damage_one(folder / kind, rng)
        return module.main, [folder / kind, "--out", folder / "out.pt"], None

    return reader


def prompt(good, folder, rng):
    parts = ["<mask>", "<mask*3>", "<mask*2:4>", "<mask*0>", "<mask*", ">", "<mask*9999999999>", "<mask:3>", "<MASK>"]
    parts += ["in", " ", "\n", "é", "\U0001f600", "\x00", "\x1b[2J", "</script>", "<s>", "\udcff"]
    parts += ["⓪④", "㊿", "P2 3 2 4 0 1 2 3 4 0", "P2 3 2 0 0"]
    text = "".join(rng.choices(parts, k=rng.randrange(6)))
    (folder / "p.txt").write_bytes(text.encode("utf-8", "surrogateescape"))
    given = rng.choice([["--prompt", text], ["--prompt_file", folder / "p.txt"], ["--score", folder / "p.txt"]])
    more = ["--order", "left"] if given[0] == "--score" else rng.choice([[], ["--save", folder / "x.html"]])
    more += [] if given[0] == "--score" else rng.choice([["--length", "20"], [], ["--suffix", text]])
    name = rng.choice(["small.pt", "blocks.pt", "bpe.pt", "pictures.pt"])
    return sample.main, ["--ckpt", good / name, "--dtype", "float32", *more, *given], None


def shard(good, folder, rng):
    shutil.copytree(good / "shards", folder / "shards")
    path = folder / "shards" / rng.choice(["fineweb_val_000000.bin", "fineweb_train_000001.bin"])
    content = path.read_bytes()
    if rng.random() < 0.5:
        at = 4 * rng.randrange(3)
        number = rng.choice([rng.randrange(-(2**31), 2**31), rng.randrange(-9, 999), 2**31 - 1, -(2**31)])
        content = content[:at] + number.to_bytes(4, "little", signed=True) + content[at + 4 :]
    path.write_bytes(damage(content, rng) if rng.random() < 0.7 else content)

    def correct():
        for split, file in (("val", "fineweb_val_000000.bin"), ("train", "fineweb_train_000001.bin")):
            ids = np.fromfile(folder / "data" / "f" / f"{split}.bin", "<u2")
            assert ids.tobytes() == (folder / "shards" / file).read_bytes()[1024:]
        data.lib.corpus.load_corpus("f")

    def main():
        tokenizer = load_checkpoint(good / "start.pt")[1]
        with mock.patch("data.fineweb.prepare.gpt2_tokenizer", return_value=tokenizer):
            data.fineweb.prepare.main()

    return main, ["--dir", folder / "shards", "--name", "f"], correct


def text(good, folder, rng):
    (folder / "x.txt").write_bytes(damage((good / "book.txt").read_bytes(), rng))
    return data.text.prepare.main, [folder / "x.txt", "--name", "t"], None


READERS = {
    **{f.__name__: f for f in (damaged_checkpoint, bad_checkpoint, corpus, examples, jsonl, chat, prompt)},
    **{f.__name__: f for f in (shard, text)},
    **{kind: weights(kind, data.weights.prepare) for kind in ("roberta", "bert", "gpt2", "mdlm", "llada")},
}


# --- cases ---------------------------------------------------------------------------------------


def run(main, arguments):
    """Run a command: its exit code, and what it printed on stderr. Raises what isn't a sentence of ours."""
    sys.argv = ["script.py", *map(str, arguments)]
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())):
            command(main)
    except SystemExit as ended:
        return ended.code, err.getvalue()
    return 0, ""


class Hang(BaseException):
    """A case took too long. It isn't an Exception, so no reader can take it for one of its own."""


def too_long(*_):
    raise Hang(f"more than {SECONDS} seconds")


def random_of(name, number):
    """The random numbers that a case is made with, so that it can be made again."""
    return random.Random(f"{name} {number}")


def case(name, rng, good):
    """Run a case of a reader. Raises AssertionError, or what the command raises, if it doesn't end as it must."""
    with tempfile.TemporaryDirectory() as folder, mock.patch("data.lib.corpus.DATA", Path(folder, "data")):
        main, arguments, correct = READERS[name](good, Path(folder), rng)
        signal.signal(signal.SIGALRM, too_long)
        signal.alarm(SECONDS)
        try:
            code, said = run(main, arguments)
            if code == 0 and correct:
                correct()
        finally:
            signal.alarm(0)
    assert code in (0, 2), said
    lines = re.split(r"[\r\n]|\x1b\[A", said)  # a progress bar inside that of the cases moves the cursor
    sentences = [line for line in lines if line.startswith("script.py: ")]
    assert code == 0 or (len(sentences) == 1 and said.rstrip().endswith(sentences[0])), said


def grown():
    """The most memory that the process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@dataclass
class FuzzConfig:
    cases: int = flag(1000, "cases of each reader", least=1)
    first: int = flag(0, "number of the first case", least=0)
    only: Literal[tuple(READERS)] | None = flag(None, "the only reader to test")


def main():
    config = FuzzConfig(**parse(FuzzConfig, __doc__))
    torch.set_num_threads(1)
    numbers, failed = range(config.first, config.first + config.cases), 0
    with tempfile.TemporaryDirectory() as good:
        make_good(Path(good))
        start = grown()
        for name in [config.only] if config.only else READERS:
            for number in tqdm(numbers, desc=name, mininterval=10):
                try:
                    case(name, random_of(name, number), Path(good))
                except KeyboardInterrupt:
                    raise
                except BaseException as error:  # a Hang, and tiktoken's panics, are no Exception
                    failed += 1
                    tqdm.write(f"{name} {number}: {type(error).__name__}: {str(error)[:300]}")
    print(f"{failed} cases failed; {grown() - start:.0f} MB more memory at most")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
