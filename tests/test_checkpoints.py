"""Checkpoints: whole or absent, and refused in a sentence when they are damaged."""

import math
import os
import pickle
import resource
import shutil
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from world import ROOT, SMALL, assert_same, mistake, run_process, run_train, sample_text, weights

import sample
import train
from data.lib import slim
from data.lib.checkpoint import byte_sum, read_checkpoint, tensors
from data.lib.corpus import write_corpus
from data.lib.errors import Mistake, command
from data.lib.tokenizer import BPETokenizer
from model import load_checkpoint

pytestmark = pytest.mark.usefixtures("in_world")


def store(checkpoint, path):
    """Write the dict of a checkpoint as it is, with the sums that belong to its tensors."""
    sums = [byte_sum(tensor) for tensor in tensors({**checkpoint, "sums": []})]
    torch.save({**checkpoint, "sums": sums}, path)


def test_a_checkpoint_needs_nothing_beside_it(world, tmp_path):
    alone = tmp_path / "alone.pt"
    alone.write_bytes((world / "out" / "ckpt.pt").read_bytes())
    result = run_process(ROOT / "sample.py", "--ckpt", alone, "--length", 20, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_a_slim_checkpoint_is_the_model_in_bfloat16(world, tmp_path, monkeypatch, capsys):
    """It writes, it scores, and training goes on from it; but does not resume."""
    monkeypatch.setattr(sys, "argv", ["slim.py", "out/ckpt.pt", str(tmp_path / "slim.pt")])
    slim.main()
    model, tokenizer, checkpoint = load_checkpoint("out/ckpt.pt")
    small, same_tokenizer, rest = load_checkpoint(tmp_path / "slim.pt")
    assert same_tokenizer.state == tokenizer.state
    assert small.config == model.config
    assert {**rest["train"], "out_dir": "out"} == {**checkpoint["train"], "out_dir": "out"}
    assert "out_dir" not in rest["train"]
    stored = torch.load(tmp_path / "slim.pt", weights_only=True)["model"]
    for (name, p), q in zip(model.state_dict().items(), small.state_dict().values()):
        assert stored[name].dtype == torch.bfloat16
        assert q.dtype == torch.float32
        assert_same(q, p.bfloat16().float())
    assert "optimizers" not in rest
    go_on = f"--init_from {tmp_path}/slim.pt --data book --out_dir {tmp_path}/on --max_iters 2 --context 32"
    run_train(monkeypatch, go_on)
    written = sample_text(["--ckpt", tmp_path / "slim.pt", "--length", 9], monkeypatch, capsys)
    assert "slim.pt: 9 tokens in" in written.err
    (tmp_path / "on" / "last.pt").write_bytes((tmp_path / "slim.pt").read_bytes())
    again = f"--init_from resume --out_dir {tmp_path}/on --max_iters 9".split()
    assert "not with these flags" in mistake(train.main, again, monkeypatch, capsys)


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("executed"),)


def test_files_that_are_no_checkpoints(world, tmp_path, monkeypatch, capsys):
    """Truncated, empty, of another program, or a pickle that would run code: which it does not."""
    monkeypatch.chdir(tmp_path)
    good = (world / "out" / "ckpt.pt").read_bytes()
    config = load_checkpoint(world / "out" / "ckpt.pt")[2]["config"]
    ours = {"family": "setitem", "config": config, "model": {}, "tokenizer": {"kind": "bytes"}, "sums": []}
    files = {
        "empty.pt": b"",
        "truncated.pt": good[: len(good) // 2],
        "nearly_whole.pt": good[:-100],
        "pickle.pt": pickle.dumps(Malicious()),
        **{f"text_{letter}.pt": f"{letter}ext\n".encode() for letter in ".GKQRabeqrstu"},
    }
    for name, content in files.items():
        Path(name).write_bytes(content)
    for name, content in {
        "malicious.pt": {"config": Malicious()},
        "tensor.pt": torch.zeros(3),
        "other_keys.pt": {"state_dict": {}},
        "other_config.pt": {**ours, "config": {"width": 3}},
        "other_weights.pt": ours,
        "other_family.pt": {**ours, "family": "mamba"},
    }.items():
        torch.save(content, name)
    with zipfile.ZipFile("zip.pt", "w") as archive:
        archive.writestr("hello", "world")
    for path in sorted(Path().glob("*.pt")):
        assert path.name in mistake(sample.main, ["--ckpt", path.name], monkeypatch, capsys)
        for flags in (f"--init_from {path} --data book", f"--eval_only --init_from {path} --data book"):
            flags += " --out_dir new"
            assert path.name in mistake(train.main, flags.split(), monkeypatch, capsys)
    assert not Path("executed").exists()
    with pytest.raises(Mistake):
        load_checkpoint("malicious.pt")


def test_a_checkpoint_of_another_tokenizer(monkeypatch, capsys):
    tokenizer = BPETokenizer([chr(i) for i in range(256)], r"\S+|\s+")
    write_corpus("bpe", [("train", "some text " * 50), ("val", "more text " * 50)], tokenizer, "test")
    capsys.readouterr()
    flags = "--init_from out/ckpt.pt --data bpe --out_dir new"
    assert "tokenizer" in mistake(train.main, flags.split(), monkeypatch, capsys)


@contextmanager
def no_space_beyond(size):
    """A limit on the size of files stands in for a full disk: a write fails half-way."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
def test_no_space_left_keeps_the_checkpoint_that_was_there(share, world, tmp_path, monkeypatch, capsys):
    flags = f"--data book --out_dir {tmp_path} --max_iters 2 {SMALL} --n_embd 128"
    run_train(monkeypatch, flags)
    before = {name: (tmp_path / name).read_bytes() for name in ("last.pt", "ckpt.pt")}
    again = f"{flags} --init_from resume --max_iters 4 --evals 4".split()
    monkeypatch.setattr(sys, "argv", ["train.py", *again])
    with no_space_beyond(int(len(before["last.pt"]) * share)), pytest.raises(SystemExit) as ended:
        command(train.main)
    assert ended.value.code == 2
    sentences = capsys.readouterr().err.strip().splitlines()
    assert any("step 3: no checkpoint (File too large); the earlier one stays" in line for line in sentences)
    assert "File too large" in sentences[-1]
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert len(list(tmp_path.iterdir())) == 3


def test_the_last_checkpoints_stay_under_the_number_of_their_step(tmp_path, monkeypatch):
    flags = f"--data book --max_iters 8 --evals 4 --keep 2 {SMALL} --out_dir {tmp_path}"
    run_train(monkeypatch, flags)
    numbered = sorted(path.name for path in tmp_path.glob("step*"))
    assert numbered == ["step-00000006.pt", "step-00000008.pt"]
    assert [weights(tmp_path / name)[0] for name in numbered] == [6, 8]
    assert_same(weights(tmp_path / numbered[1]), weights(tmp_path / "last.pt"))


def test_a_checkpoint_that_a_run_replaces_while_it_is_read_is_read_again(world, tmp_path, monkeypatch):
    """torch opens it by its name twice, and has the weights of one file in the places of the other."""
    path, new = shutil.copy(world / "gpt" / "last.pt", tmp_path / "last.pt"), world / "out" / "last.pt"
    opened, times = torch.UntypedStorage.from_file, []

    def open_late(*arguments):
        if not times:
            os.replace(shutil.copy(new, tmp_path / "new.pt"), path)
        times.append(1)
        return opened(*arguments)

    monkeypatch.setattr(torch.UntypedStorage, "from_file", open_late)
    assert_same(read_checkpoint(path)["model"], read_checkpoint(new)["model"])
    assert len(times) == 3


def test_a_bit_that_flips_in_any_tensor_is_found(world, tmp_path):
    """In the weights and in what resuming needs; and a file without sums is not read at all."""
    content = (world / "out" / "last.pt").read_bytes()
    stored = torch.load(world / "out" / "last.pt", weights_only=True)
    there = [tensor for tensor in tensors(stored) if tensor.ndim]
    assert len(there) > 20
    for tensor in there:
        data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        for offset in (0, len(data) - 1):
            damaged = bytearray(content)
            damaged[content.find(data) + offset] ^= 1
            (tmp_path / "damaged.pt").write_bytes(damaged)
            with pytest.raises(Mistake, match="damaged"):
                read_checkpoint(tmp_path / "damaged.pt")
    stored.pop("sums")
    torch.save(stored, tmp_path / "without.pt")
    with pytest.raises(Mistake, match="damaged"):
        read_checkpoint(tmp_path / "without.pt")


def test_weights_that_are_not_finite_are_said(world, tmp_path, monkeypatch, capsys):
    stored = torch.load(world / "out" / "ckpt.pt", weights_only=True)
    stored["model"]["head.weight"][0, 0] = torch.nan
    store(stored, tmp_path / "nan.pt")
    flags = ["--ckpt", str(tmp_path / "nan.pt")]
    assert "head.weight has values that are not finite" in mistake(sample.main, flags, monkeypatch, capsys)


def test_what_no_run_writes_is_refused(world, tmp_path, monkeypatch, capsys):
    stored = torch.load(world / "out" / "last.pt", weights_only=True)
    weight = stored["model"]["head.weight"]
    bad = weight.clone()
    bad[0, 0] = torch.nan
    adamw, muon = (dict(saved) for saved in stored["optimizers"])
    muon["state"] = {i: {name: torch.zeros(()) for name in kept} for i, kept in muon["state"].items()}
    strange = [
        ({"model": {**stored["model"], "head.weight": weight[:1].expand_as(weight)}}, "damaged"),  # one row
        ({"model": {**stored["model"], "head.weight": bad}, "more": bad.detach()}, "not finite"),
        ({"config": {**stored["config"], "conv_right": 99}}, "not of the size"),
        ({"config": {**stored["config"], "n_head": 16}}, "not of the size"),
        ({"config": {**stored["config"], "dropout": math.nan}}, "dropout is no value"),
        ({"config": {**stored["config"], "position": "learned"}}, "not a checkpoint of setitem"),
        ({"family": "mamba"}, "its family 'mamba' is unknown"),
        ({"family": "gpt2"}, "not a checkpoint of setitem"),
        ({"train": "x"}, "its flags are none of a run's"),
        ({"train": {**stored["train"], "context": "x"}}, "its flags are none of a run's"),
        *[({"step": step}, "not with these flags") for step in (-1, math.inf, 10**400)],
        ({"best": math.nan}, "not with these flags"),
        ({"optimizers": [adamw, muon]}, "not with these flags"),
    ]
    for change, words in strange:
        store({**stored, **change}, tmp_path / "last.pt")
        flags = f"--init_from resume --out_dir {tmp_path} --max_iters 9".split()
        assert words in mistake(train.main, flags, monkeypatch, capsys)
    store({**stored, "model": {**stored["model"], "head.weight": weight.T.clone().T}}, tmp_path / "last.pt")
    read_checkpoint(tmp_path / "last.pt")  # in another order, but each number once
    stored = torch.load(world / "bert.pt", weights_only=True)
    strange = [({"norm_eps": math.nan}, "norm_eps is no value"), ({"activation": "x"}, "not a checkpoint of setitem")]
    for change, words in strange:
        store({**stored, "config": {**stored["config"], **change}}, tmp_path / "bert.pt")
        assert words in mistake(sample.main, ["--ckpt", str(tmp_path / "bert.pt")], monkeypatch, capsys)
