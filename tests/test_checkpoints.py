"""Checkpoints: whole or absent, and refused in a sentence when they are damaged."""

import math
import os
import pickle
import shutil
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from world import ROOT, SMALL, assert_same, mistake, no_space_beyond, run_process, run_train, sample_text, weights

import sample
import train
from data.lib import slim
from data.lib.checkpoint import read_checkpoint
from data.lib.corpus import write_corpus
from data.lib.errors import Mistake, command
from data.lib.tokenizer import BPETokenizer
from model import load_checkpoint

pytestmark = pytest.mark.usefixtures("in_world")


def test_a_checkpoint_needs_nothing_beside_it(world, tmp_path):
    alone = tmp_path / "alone.pt"
    alone.write_bytes((world / "out" / "ckpt.pt").read_bytes())
    result = run_process(ROOT / "sample.py", "--ckpt", alone, "--length", 20, cwd=tmp_path)
    assert result.returncode == 0, result.stderr


def test_reading_a_checkpoint_does_not_load_torch_s_compiler():
    """It takes more than a second, and `python sample.py` shall begin to write at once."""
    loads = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import model; model.load_checkpoint('out/ckpt.pt'); "
    assert run_process("-c", loads + "print('torch._dynamo' in sys.modules)").stdout == "False\n"


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
    ours = {"family": "setitem", "config": config, "model": {}, "tokenizer": {"kind": "bytes"}}
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
    assert any("step 3: no checkpoint (File too large); the next evaluation tries again" in line for line in sentences)
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
    """torch opens it by its name twice, and would take the weights of one file from the places of the other."""
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
    """In the weights and in what resuming needs."""
    content = (world / "out" / "last.pt").read_bytes()
    with zipfile.ZipFile(world / "out" / "last.pt") as archive:
        data = [archive.read(name) for name in archive.namelist() if "/data/" in name]
    assert len(data) > 20
    for tensor in data:
        for offset in (0, len(tensor) - 1):
            damaged = bytearray(content)
            damaged[content.find(tensor) + offset] ^= 1
            (tmp_path / "damaged.pt").write_bytes(damaged)
            with pytest.raises(Mistake, match="damaged"):
                read_checkpoint(tmp_path / "damaged.pt")


def test_a_small_file_takes_little_memory(world, tmp_path):
    """It can be neither compressed nor full of tensors that repeat a number."""
    stored = torch.load(world / "out" / "ckpt.pt", weights_only=True)
    torch.save({**stored, "model": {"head.weight": torch.zeros(1).expand(10**6, 10**6)}}, tmp_path / "wide.pt")
    with zipfile.ZipFile(world / "out" / "ckpt.pt") as archive, zipfile.ZipFile(tmp_path / "zip.pt", "w", 8) as packed:
        for name in archive.namelist():
            packed.writestr(name, archive.read(name))
    for name, words in (("wide.pt", "larger than the file"), ("zip.pt", "compressed")):
        with pytest.raises(Mistake, match=words):
            read_checkpoint(tmp_path / name)


def test_what_no_run_writes_is_refused(world, tmp_path, monkeypatch, capsys):
    stored = torch.load(world / "out" / "last.pt", weights_only=True)
    model, config = stored["model"], stored["config"]
    adamw, muon = stored["optimizers"]
    muon = {i: {name: torch.zeros(()) for name in kept} for i, kept in muon.items()}
    strange = [
        ({"model": {**model, "head.weight": model["head.weight"].to_sparse()}}, "damaged"),
        ({"model": {**model, "head.weight": model["head.weight"].to("meta")}}, "not plain tensors"),
        ({"model": {**model, "head.weight": model["head.weight"].to(torch.complex64)}}, "not plain tensors"),
        ({"config": {**config, "conv_right": 99}}, "its convolution can't be"),
        ({"config": {**config, "n_head": 16}}, "another shape"),
        ({"config": {**config, "mask_id": 999}}, "its tokenizer belongs to another model"),
        ({"config": {**config, "end_ids": (999,)}}, "end_ids or shift_id is not in the vocabulary"),
        ({"config": {**config, "dropout": math.nan}}, "its dropout is nan"),
        ({"config": {**config, "position": "learned"}}, "not a checkpoint of setitem"),
        ({"family": "mamba"}, "its family 'mamba' is unknown"),
        ({"family": "gpt2"}, "not a checkpoint of setitem"),
        ({"train": "x"}, "not a checkpoint of setitem"),
        ({"train": {**stored["train"], "context": "x"}}, "not a checkpoint of setitem"),
        ({"train": {**stored["train"], "batch_size": -1}}, "at least 1, not -1"),
        *[({"step": step}, "not with these flags") for step in (-1, math.inf, 10**400)],
        ({"optimizers": [adamw, muon]}, "not with these flags"),
        ({"optimizers": [adamw, {}, {}]}, "not with these flags"),
    ]
    for change, words in strange:
        torch.save({**stored, **change}, tmp_path / "last.pt")
        flags = f"--init_from resume --out_dir {tmp_path} --max_iters 9".split()
        assert words in mistake(train.main, flags, monkeypatch, capsys)
    stored = torch.load(world / "bert.pt", weights_only=True)
    strange = [({"norm_eps": math.nan}, "its norm_eps is nan"), ({"activation": "x"}, "not a checkpoint of setitem")]
    for change, words in strange:
        torch.save({**stored, "config": {**stored["config"], **change}}, tmp_path / "bert.pt")
        assert words in mistake(sample.main, ["--ckpt", str(tmp_path / "bert.pt")], monkeypatch, capsys)
