"""Damages good files, and writes bad ones, and has every reader read them.

    python tests/fuzz.py --cases 100000      # 20 minutes

A case must end with a correct read or with one sentence and exit code 2: no traceback, no hang, and no memory
that the file does not hold. test_fuzz.py runs some of them. A case is known by its reader and its number.
"""

import contextlib
import functools
import gzip
import hashlib
import io
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from tqdm import tqdm

import data.chat.prepare
import data.fineweb.prepare
import data.gpt2.prepare
import data.lib.corpus
import data.llada.prepare
import data.mdlm.prepare
import data.mnist.prepare
import data.roberta.prepare
import data.text.prepare
import data.text8.prepare
import data.wikitext2.prepare
import sample
import train
from data.lib.chat import BYTES
from data.lib.checkpoint import FAMILIES, byte_sum, published_network, save_checkpoint, tensors
from data.lib.errors import command
from data.lib.flags import flag, parse
from data.lib.tokenizer import BPETokenizer, ByteTokenizer, PictureTokenizer
from model import ModelConfig, Transformer, load_checkpoint

SECONDS = 20  # that a case may take
MEGABYTES = 300  # that all cases together may add to the memory of the process

MERGES = ["t h", "th e", "Ġ a", "i n"]
VALUES = [None, True, 0, 1, -1, 2, 3, 7, 255, 256, 257, 2**31, 2**63, 10**30, 0.5, -1.0, 1e308, float("nan")]
VALUES += [float("inf"), "", "x", "bytes", "bpe", "wordpiece", "\ud800", "(", "(a+)+$"]
VALUES += ["setitem", *FAMILIES, "gelu_tanh"]
VALUES += [[], {}, [1], [[0, 1]], {"a": 1}, ["a", "a"], ["\u1234"], [0] * 300, "y" * 10_000]


# --- how a file is damaged -----------------------------------------------------------------------


def damage(content, rng):
    """Bytes with some of them changed, left out or put in."""
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
    """Something else that might stand there."""
    if torch.is_tensor(old):
        shapes = [(), (0,), (1,), (3, 5), (*old.shape, 1), tuple(old.shape[::-1])]
        others = [torch.zeros(shape) for shape in shapes] + [
            old.double(),
            old.long(),
            old * torch.nan,
            old.flatten()[:1],
        ]
        others += [
            torch.zeros(1).expand(10**9),
            torch.zeros(1).expand(old.shape or 1),
            old.to_sparse(),
            None,
            3,
            "x",
        ]
        return rng.choice(others)
    if isinstance(old, int) and rng.random() < 0.5:
        return old + rng.choice([-1, 1, 2, 10**6])
    return rng.choice(VALUES)


def change(content, rng):
    """A copy of nested dicts and lists in which one value, somewhere, is another, or is gone."""
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
    """A file of safetensors with one value of its header changed."""
    n = int.from_bytes(content[:8], "little")
    header = json.dumps(change(json.loads(content[8 : 8 + n]), rng)).encode()
    return len(header).to_bytes(8, "little") + header + content[8 + n :]


def damage_one(folder, rng, names=None):
    """Damage a file of a folder, or change a value of its JSON."""
    path = folder / rng.choice(names or sorted(path.name for path in folder.iterdir()))
    if path.suffix == ".json" and rng.random() < 0.7:
        with contextlib.suppress(ValueError, RecursionError):  # it is damaged already
            path.write_text(json.dumps(change(json.loads(path.read_text()), rng)))
    elif path.suffix == ".safetensors" and rng.random() < 0.5:
        with contextlib.suppress(ValueError, RecursionError):
            path.write_bytes(with_other_header(path.read_bytes(), rng))
    elif path.suffix == ".bin" and path.name == "pytorch_model.bin" and rng.random() < 0.5:
        with contextlib.suppress(Exception):
            torch.save(change(torch.load(path), rng), path)
    else:
        path.write_bytes(damage(path.read_bytes(), rng))


def save_with_sums(content, path):
    """Save a changed checkpoint with the sums of its tensors, unless they are too large or have none."""
    with contextlib.suppress(Exception):
        if sum(tensor.numel() for tensor in tensors(content)) < 10**7:
            content["sums"] = [byte_sum(tensor) for tensor in tensors(content)]
    torch.save(content, path)


# --- the readers ---------------------------------------------------------------------------------
#
# A reader(good, folder, rng) puts a case into an empty folder, with the help of the good files, and returns
# the command that reads it, its arguments, and what is to hold if it succeeds.


def damaged_checkpoint(good, folder, rng):
    """Bytes that differ: whatever is read is what was written."""
    (folder / "x.pt").write_bytes(damage((good / "small.pt").read_bytes(), rng))

    def correct():
        ours, theirs = (load_checkpoint(path) for path in (good / "small.pt", folder / "x.pt"))
        assert ours[0].config == theirs[0].config
        assert ours[1].state == theirs[1].state
        assert all(map(torch.equal, tensors(ours[2]), tensors(theirs[2])))

    return (
        sample.main,
        ["--ckpt", folder / "x.pt", "--length", "8", "--steps", "2", "--dtype", "float32"],
        correct,
    )


def bad_checkpoint(good, folder, rng):
    """A whole file with a value of a stranger's choice."""
    names = ["small.pt", "blocks.pt", "bpe.pt", "pictures.pt", *(f"{family}.pt" for family in FAMILIES)]
    name = rng.choice(names)
    content = torch.load(good / name, weights_only=True)
    del content["sums"]
    save_with_sums(change(content, rng), folder / "last.pt")
    flags = ["--prompt", "in"] if name == "pictures.pt" else ["--prompt", "in the", "--length", "8"]
    flags += ["--dtype", "float32"] if name == "gpt2.pt" else ["--dtype", "float32", "--steps", "2"]
    if rng.random() < 0.6:
        flags += rng.choice([[], ["--order", "entropy"], ["--save", folder / "x.html"]])
        return sample.main, ["--ckpt", folder / "last.pt", *flags], None
    flags = ["--out_dir", folder, "--init_from", "resume", "--data", "book", "--max_iters", "3"]
    return train.main, [*flags, "--eval_tokens", "64", "--evals", "1"], None


def corpus(good, folder, rng):
    name = rng.choice(["book", "pictures"])
    name = "wide" if rng.random() < 0.05 else name  # with ids of 32 bits; it takes a while
    shutil.copytree(good / "data" / name, folder / "data" / "book")
    damage_one(folder / "data" / "book", rng, ["train.bin", "val.bin", "meta.json", "meta.json"])
    data.lib.corpus.DATA = folder / "data"
    model = good / ("pictures.pt" if name == "pictures" else "small.pt")
    flags = ["--eval_only", "--init_from", model, "--data", "book", "--eval_tokens", "64"]
    return train.main, flags, None


def examples(good, folder, rng):
    """A corpus of prompts and answers; half of those whose index differs say that it should."""
    talk = Path(shutil.copytree(good / "data" / "talk", folder / "data" / "talk"))
    damage_one(talk, rng, ["train.bin", "val.rows", "train.rows", "meta.json", "meta.json"])
    if rng.random() < 0.5:
        with contextlib.suppress(Exception):
            meta = json.loads((talk / "meta.json").read_text())
            for split in ("train", "val"):
                rows = (talk / f"{split}.rows").read_bytes()
                meta[split] |= {"examples": len(rows) // 16, "rows_sha256": hashlib.sha256(rows).hexdigest()}
            (talk / "meta.json").write_text(json.dumps(meta))
    data.lib.corpus.DATA = folder / "data"
    flags = ["--eval_only", "--init_from", good / "talk.pt", "--data", "talk", "--eval_tokens", "64"]
    return train.main, flags, None


def jsonl(good, folder, rng):
    data.lib.corpus.DATA = folder / "data"
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
    """A checkpoint with a template of a stranger's choice, and what is said to it."""
    content = torch.load(good / "talk.pt", weights_only=True)
    del content["sums"]
    part = rng.choice(["chat", "chat", "config", None])
    if part:
        content[part] = change(content[part], rng)
    save_with_sums(content, folder / "x.pt")
    parts = ["Hi", " ", "\x03", "\x01user\x02", "{role}", "{content}", "<mask>", "<mask*9>", "\udcff", "\n"]
    said = "".join(rng.choices(parts, k=rng.randrange(5)))
    (folder / "x.txt").write_bytes(said.encode("utf-8", "surrogateescape"))
    given = rng.choice([["--prompt", said], ["--prompt_file", folder / "x.txt"]])
    flags = ["--ckpt", folder / "x.pt", "--chat", "--length", "48", "--dtype", "float32"]
    return sample.main, [*flags, *rng.choice([["--steps", "2"], ["--order", "threshold"]]), *given], None


def weights(kind, module):
    """The reader of a folder with the files of a model."""

    def reader(good, folder, rng):
        shutil.copytree(good / kind, folder / kind)
        for _ in range(rng.choice([1, 1, 2])):
            damage_one(folder / kind, rng)
        return module.main, [folder / kind, "--out", folder / "out.pt"], None

    return reader


def prompt(good, folder, rng):
    parts = [
        "<mask>",
        "<mask*3>",
        "<mask*2:4>",
        "<mask*0>",
        "<mask*",
        ">",
        "<mask*9999999999>",
    ]
    parts += [
        "in",
        " ",
        "\n",
        "é",
        "\U0001f600",
        "\x00",
        "\x1b[2J",
        "</script>",
        "<s>",
        "\udcff",
        "<mask:3>",
        "<MASK>",
        "⓪④",
        "㊿",
        "P2 3 2 4 0 1 2 3 4 0",
        "P2 3 2 0 0",
    ]
    text = "".join(rng.choices(parts, k=rng.randrange(6)))
    (folder / "p.txt").write_bytes(text.encode("utf-8", "surrogateescape"))
    given = rng.choice([["--prompt", text], ["--prompt_file", folder / "p.txt"], ["--score", folder / "p.txt"]])
    more = ["--order", "left"] if given[0] == "--score" else rng.choice([[], ["--save", folder / "x.html"]])
    more += [] if given[0] == "--score" else rng.choice([["--length", "20"], [], ["--suffix", text]])
    name = rng.choice(["small.pt", "blocks.pt", "bpe.pt", "pictures.pt"])
    return sample.main, ["--ckpt", good / name, "--dtype", "float32", *more, *given], None


def archive(good, folder, rng):
    data.lib.corpus.DATA = folder / "data"
    (folder / "x.zip").write_bytes(damage((good / "wiki.zip").read_bytes(), rng))
    return data.wikitext2.prepare.main, ["--file", folder / "x.zip", "--name", "w"], None


def text8(good, folder, rng):
    """A text of which the sum is known: what is not refused is all of it."""
    data.lib.corpus.DATA = folder / "data"
    whole, name = (good / "book.txt").read_bytes(), rng.choice(["text8", "text8.zip"])
    (folder / name).write_bytes(damage((good / name).read_bytes(), rng))

    def correct():
        train_split, val, _, _ = data.lib.corpus.load_corpus("t")
        assert bytes([*train_split, *val]) == whole[:-100]

    sizes = {"train": len(whole) - 200, "val": 100, "test": 100}
    main = functools.partial(data.text8.prepare.main, sha256=hashlib.sha256(whole).hexdigest(), sizes=sizes)
    return main, ["--file", folder / name, "--name", "t"], correct


def mnist(good, folder, rng):
    """Files whose sums are as expected, and what is in them is not."""
    data.lib.corpus.DATA, sums = folder / "data", {}
    for split, names in data.mnist.prepare.FILES.items():
        sums[split] = {}
        for name in names:
            content = (good / "mnist" / name).read_bytes()
            if rng.random() < 0.3:
                content = gzip.compress(damage(gzip.decompress(content), rng))
            content = damage(content, rng) if rng.random() < 0.2 else content
            (folder / name).write_bytes(content)
            sums[split][name] = hashlib.sha256(content).hexdigest()
    main = functools.partial(data.mnist.prepare.main, files=sums)
    return main, ["--dir", folder, "--name", "m"], lambda: data.lib.corpus.load_corpus("m")


def shard(good, folder, rng):
    data.lib.corpus.DATA = folder / "data"
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

    flags = ["--dir", folder / "shards", "--name", "f", "--tokenizer", good / "start.pt"]
    return data.fineweb.prepare.main, flags, correct


def text(good, folder, rng):
    data.lib.corpus.DATA = folder / "data"
    (folder / "x.txt").write_bytes(damage((good / "book.txt").read_bytes(), rng))
    return data.text.prepare.main, [folder / "x.txt", "--name", "t"], None


READERS = {
    "damaged_checkpoint": damaged_checkpoint,
    "bad_checkpoint": bad_checkpoint,
    "corpus": corpus,
    "examples": examples,
    "jsonl": jsonl,
    "chat": chat,
    "gpt2": weights("gpt2", data.gpt2.prepare),
    "roberta": weights("roberta", data.roberta.prepare),
    "bert": weights("bert", data.roberta.prepare),
    "mdlm": weights("mdlm", data.mdlm.prepare),
    "llada": weights("llada", data.llada.prepare),
    "prompt": prompt,
    "archive": archive,
    "text8": text8,
    "mnist": mnist,
    "shard": shard,
    "text": text,
}


# --- cases ---------------------------------------------------------------------------------------


def write_shard(path, ids):
    """A file of FineWeb's form: 256 numbers, of which three say what it is, and 16 bits for each token."""
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(ids)
    path.write_bytes(header.tobytes() + np.array(ids, "<u2").tobytes())


def write_mnist(folder, n):
    """Four files of MNIST's form, of n random pictures each; the arrays of each split."""
    folder.mkdir(exist_ok=True)
    rng, content = np.random.default_rng(0), {}
    for split, names in data.mnist.prepare.FILES.items():
        content[split] = rng.integers(0, 256, (n, 28, 28), np.uint8), rng.integers(0, 10, n, np.uint8)
        for name, array in zip(names, content[split]):
            (folder / name).write_bytes(idx(array))
    return content


def idx(array):
    """An array as a gzipped IDX file."""
    header = np.array([0x800 + array.ndim, *array.shape], ">u4")
    return gzip.compress(header.tobytes() + array.tobytes(), mtime=0)


def make_good(good):
    """The good files, of every kind, in a folder."""
    from model_files import save_weights, write_bert, write_roberta
    from test_gpt2 import write_gpt2
    from test_llada import make_tokenizer, write_llada
    from test_mdlm import settings_of, write_files

    data.lib.corpus.DATA = good / "data"
    lines = "".join(f"the line {i} in a book\n" for i in range(400))
    (good / "book.txt").write_text(lines)
    with contextlib.redirect_stdout(None):
        data.text.prepare.prepare(good / "book.txt", "book", ByteTokenizer())
        flags = "--data book --n_layer 1 --n_head 1 --n_embd 16 --context 16 --batch_size 2 --max_iters 2"
        flags += f" --eval_tokens 64 --evals 1 --prompt_len 0 --dtype float32 --out_dir {good}/out"
        assert run(train.main, flags.split()) == (0, "")
        turn = '[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "So"}]'
        (good / "talk.jsonl").write_text(f'{{"messages": {turn}}}\n{turn}\n' * 10)
        data.chat.prepare.prepare(good / "talk.jsonl", None, "talk", ByteTokenizer())
    shutil.copy(good / "out" / "ckpt.pt", good / "small.pt")
    shape = {"n_layer": 1, "n_head": 1, "n_embd": 16, "context": 16}
    save_checkpoint(good / "blocks.pt", Transformer(ModelConfig(**shape, block=4)), ByteTokenizer())
    talks = {**shape, "context": 48, "special_ids": (256,), "end_ids": (3,)}
    save_checkpoint(good / "talk.pt", Transformer(ModelConfig(**talks)), ByteTokenizer(), chat=BYTES)
    tokens, pattern = [chr(i) for i in range(256)] + ["in", "the"], r" ?\w+|\s+|[^\s\w]+"
    bpe = BPETokenizer(tokens, pattern)
    config = ModelConfig(bpe.vocab_size, bpe.mask_id, **shape)
    save_checkpoint(good / "bpe.pt", Transformer(config), bpe)
    for family in FAMILIES:
        network, causal = published_network(family), {"block": 1, "shift_id": 0} if family == "gpt2" else {}
        save_checkpoint(good / f"{family}.pt", network(network.Config(**shape, **causal, tied=True)), ByteTokenizer())
    special = {"<|endoftext|>": len(tokens), "<mask>": len(tokens) + 1}
    config = ModelConfig(len(tokens) + 2, len(tokens) + 1, **shape)
    save_checkpoint(good / "start.pt", Transformer(config), BPETokenizer(tokens, pattern, special=special))
    canvas = PictureTokenizer(4, 3, 2, 5)
    config = ModelConfig(262, 256, **{**shape, "context": 10}, kinds=canvas.kinds)
    save_checkpoint(good / "pictures.pt", Transformer(config), canvas)
    pictures = [("train", canvas.canvas("ab", [i % 5] * 6), 10) for i in range(20)]
    with contextlib.redirect_stdout(None):
        data.lib.corpus.write_tokens("pictures", [*pictures, ("val", *pictures[0][1:])], canvas, "made")
    write_mnist(good / "mnist", 3)
    (good / "shards").mkdir()
    for name in ("val_000000", "train_000001"):
        write_shard(good / "shards" / f"fineweb_{name}.bin", [len(tokens), *bpe.encode(lines[:600])])
    wide = BPETokenizer([*tokens, *(f"\xff{i}" for i in range(2**16))], pattern)
    with contextlib.redirect_stdout(None):
        data.lib.corpus.write_corpus("wide", [("train", lines), ("val", lines)], wide, "book.txt")
    for kind, write in (("gpt2", write_gpt2), ("roberta", write_roberta), ("bert", write_bert)):
        model = write(good / kind) if kind == "bert" else write(good / kind, MERGES)
        save_weights(good / kind, model.state_dict())
    small = {"width": 16, "layers": 1, "heads": 2}
    write_files(good / "mdlm", settings_of(**small), None, MERGES)
    write_llada(good / "llada", make_tokenizer(lines, 20), **small, inside=16)
    with zipfile.ZipFile(good / "wiki.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for name in ("wiki.train.raw", "wiki.valid.raw"):
            file.writestr(name, lines)
    shutil.copy(good / "book.txt", good / "text8")
    with zipfile.ZipFile(good / "text8.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("text8", lines)


def run(main, arguments):
    """The exit code of a command and what it said on stderr; what is no sentence of ours is raised."""
    sys.argv = ["script.py", *map(str, arguments)]
    err = io.StringIO()
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())):
            command(main)
    except SystemExit as ended:
        return ended.code, err.getvalue()
    return 0, ""


class Hang(BaseException):
    """A case took too long, which is no refusal of the system (OSError) and no damage (Exception)."""


def too_long(*_):
    raise Hang(f"more than {SECONDS} seconds")


def random_of(name, number):
    """What a case is made by, to be made again."""
    return random.Random(f"{name} {number}")


def case(name, rng, good):
    """Raise AssertionError, or whatever it raises, if a case of a reader does not end as it must."""
    before = data.lib.corpus.DATA
    with tempfile.TemporaryDirectory() as folder:
        main, arguments, correct = READERS[name](good, Path(folder), rng)
        signal.signal(signal.SIGALRM, too_long)
        signal.alarm(SECONDS)
        try:
            code, said = run(main, arguments)
            if code == 0 and correct:
                correct()
        finally:
            signal.alarm(0)
            data.lib.corpus.DATA = before
    assert code in (0, 2), said
    sentences = [line for line in said.splitlines() if line.startswith("script.py: ")]
    assert code == 0 or (len(sentences) == 1 and said.rstrip().endswith(sentences[0])), said


def grown():
    """Megabytes of memory that the process has had at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@dataclass
class FuzzConfig:
    cases: int = flag(2000, "how many", least=1)
    first: int = flag(0, "number of the first", least=0)
    only: str | None = flag(None, "of this reader alone")


def main():
    config = FuzzConfig(**parse(FuzzConfig, __doc__.splitlines()[0]))
    names, failed = [config.only] if config.only else list(READERS), 0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as good:
        make_good(Path(good))
        start = grown()
        for number in tqdm(range(config.first, config.first + config.cases), unit="case", mininterval=10):
            name = names[number % len(names)]
            try:
                case(name, random_of(name, number), Path(good))
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                failed += 1
                tqdm.write(f"{name} {number}: {type(error).__name__}: {str(error)[:300]}")
    print(f"{config.cases:,} cases, {failed} failed, {grown() - start:.0f} MB more memory at most")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
