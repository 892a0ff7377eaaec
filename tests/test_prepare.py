"""The commands that prepare corpora: streamed, and every mistake in one sentence."""

import sys

import numpy as np
import pytest
from world import ROOT, copy_project, run_process, state_of

import data.lib.corpus
import data.lib.report
import data.lib.training

pytestmark = pytest.mark.usefixtures("in_world")


PREPARE_MISTAKES = [
    ("text", ["good", "--nonsense"], "--nonsense"),
    ("text", ["good", "--tokenizer", "klingon"], "bytes, gpt2"),
    ("text", ["good", "--name", "{here}/new"], "one folder of data/"),
    ("text", ["good", "--name", "../new"], "--name ../new"),
    ("text", ["good", "--name", "text/new"], "--name text/new"),
    ("text", ["good", "--name", ".."], "--name .."),
    ("python", ["--name", "../new"], "--name ../new"),
    ("text", ["good", "--name", "prepare.py/.."], "one folder of data/"),
    ("text", ["good", "--name", "python"], "data/python is this project's own folder"),
    ("text", [], "path"),
    ("text", ["none"], "No such file"),
    ("text", ["latin", "--name", "never-written"], "not UTF-8"),
    ("text", ["empty", "--name", "never-written"], "too little text"),
    ("python", ["--tokenizer", "klingon"], "bytes, gpt2"),
    ("shakespeare", ["--file", "good"], "sha256"),
    ("shakespeare", ["--file", "none"], "No such file"),
    ("fairytales", ["--dir", "none"], "No such file"),
    ("text", ["good", "--val", "none"], "No such file"),
    ("text8", ["--file", "none"], "No such file"),
    ("text8", ["--file", "good", "--name", "new"], "sha256"),
    ("text8", ["enwik8", "--file", "good", "--test"], "sha256"),
    ("text8", ["enwik9"], "invalid choice: 'enwik9'"),
    ("wikitext", ["--file", "good"], "sha256"),
    ("wikitext", ["wikitext103", "--file", "none"], "none"),
    ("digits", ["mnist", "--dir", "none"], "No such file"),
    ("digits", ["--name", "python"], "data/python is this project's own folder"),
    ("python", ["--tokenizer", "bytes", "--name", "digits"], "data/digits is this project's own folder"),
    ("fineweb", ["--shards", "0"], "at least 1"),
]


def test_prepare_mistakes(tmp_path):
    (tmp_path / "latin").write_bytes(b"caf\xe9" * 100)
    (tmp_path / "empty").touch()
    (tmp_path / "good").write_text("text " * 100)
    before = state_of(tmp_path), sorted((ROOT / "data").iterdir())
    for corpus, arguments, reason in PREPARE_MISTAKES:
        script = ROOT / "data" / corpus / "prepare.py"
        result = run_process(script, *(a.format(here=tmp_path) for a in arguments), cwd=tmp_path)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith("prepare.py: ")
        assert len(result.stderr.strip().splitlines()) == 1, result.stderr
        assert reason in result.stderr
    assert (state_of(tmp_path), sorted((ROOT / "data").iterdir())) == before


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory is read as Linux tells it")
def test_a_corpus_is_streamed(tmp_path):
    """Ten times the text takes no more memory."""
    script = (
        "import runpy, sys; sys.argv[:] = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__'); "
        "print(*(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    peaks = []
    for megabytes in (6, 60):
        (tmp_path / "text").write_text("A line of text that comes again and again.\n" * (megabytes * 23_000))
        copy_project(tmp_path)
        prepare_text = tmp_path / "data/text/prepare.py", tmp_path / "text", "--name", "corpus"
        peaks.append(int(run_process("-c", script, *prepare_text).stdout.split()[-1]) / 1024)
    assert peaks[1] < peaks[0] + 10


def test_corpora_larger_than_memory_are_mapped(world):
    train_split, val_split, _, _ = data.lib.corpus.load_corpus("book")
    assert isinstance(train_split, np.memmap)
    assert isinstance(val_split, np.memmap)
