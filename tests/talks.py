"""Small conversations, the corpus made of them, and what it takes to run the commands on it."""

import io
import json
import sys
from types import SimpleNamespace

import pytest

import data.lib.corpus
import data.sums.prepare
from data.chat.prepare import prepare
from data.lib.tokenizer import ByteTokenizer

SMALL = "--n_layer 1 --n_head 1 --n_embd 16 --context 48 --batch_size 4 --eval_tokens 512 --dtype float32"


def said(*contents):
    """A conversation, the user first."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def write_jsonl(path, conversations):
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))
    return path


QUESTIONS = [said(f"{'long ' * (i % 5)}{i}?", f"{i * i}") for i in range(60)]


@pytest.fixture
def talk_folder(tmp_path, monkeypatch):
    """Corpora are written to a folder of the test's own, in which it stands."""
    for module in (data.lib.corpus, data.sums.prepare):
        monkeypatch.setattr(module, "DATA", tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "data"


@pytest.fixture
def squares(talk_folder, tmp_path):
    """A corpus of questions with answers."""
    prepare(write_jsonl(tmp_path / "q.jsonl", QUESTIONS), None, "squares", ByteTokenizer())


def call(monkeypatch, main, flags, stdin=b""):
    monkeypatch.setattr(sys, "argv", ["script.py", *map(str, flags)])
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(stdin), isatty=lambda: False))
    main()
