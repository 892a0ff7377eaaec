"""The terminal while a canvas fills (`--watch`)."""

import fcntl
import json
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios

import pytest
import torch
from world import ROOT, sample_text

from data.lib.checkpoint import save_checkpoint
from data.lib.escape import inert
from data.lib.history import HOLE, History
from data.lib.layout import columns
from data.lib.terminal import Watch
from data.lib.tokenizer import ByteTokenizer
from model import ModelConfig, Transformer


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("watch") / "ckpt.pt"
    save_checkpoint(path, Transformer(ModelConfig(n_embd=16, n_layer=1, context=64)), ByteTokenizer())
    return path


def in_terminal(checkpoint, *flags, width=40, height=10, interrupt=None):
    """What sample.py writes to a terminal of that size, and its exit code."""
    main, worker = pty.openpty()
    fcntl.ioctl(worker, termios.TIOCSWINSZ, struct.pack("HHHH", height, width, 0, 0))
    command = [sys.executable, ROOT / "sample.py", "--ckpt", checkpoint, "--watch", *map(str, flags)]
    process = subprocess.Popen(command, stdin=worker, stdout=worker, stderr=worker)
    os.close(worker)
    written = b""
    while True:
        try:
            data = os.read(main, 4096)
        except OSError:  # how a terminal ends
            break
        if not data:
            break
        written += data
        if interrupt and interrupt in written:
            process.send_signal(signal.SIGINT)
            interrupt = None
    os.close(main)
    return written.decode(), process.wait()


def screen(written, width, height):
    """The lines that a terminal shows after what was written, of the codes that we use."""
    lines, row, column = [""], 0, 0
    for code, c in re.findall("\x1b\\[([?0-9;]*[a-zA-Z])|([^\x1b])", written):
        if code.endswith("F"):
            row, column = max(0, row - int(code[:-1])), 0
        elif code == "K":
            lines[row] = lines[row][:column]
        elif code == "J":
            lines[row:] = [lines[row][:column]]
        elif c == "\r":
            column = 0
        elif c == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif c:
            lines[row] = lines[row][:column] + c + lines[row][column + 1 :]
            column += 1
    return lines


def test_watch_draws_in_place_and_leaves_the_text(checkpoint):
    written, code = in_terminal(checkpoint, "--prompt", "a<b\t日\x1b[5m", "--steps", 6)
    alone = subprocess.run(
        [
            sys.executable,
            ROOT / "sample.py",
            "--ckpt",
            checkpoint,
            "--prompt",
            "a<b\t日\x1b[5m",
            "--steps",
            "6",
        ],
        capture_output=True,
    )
    assert code == 0
    assert written.startswith("\x1b[?25l\x1b[?7l")
    assert written.count("\x1b[?7h\x1b[?25h") == 1
    assert "\x1b[5m" not in written
    assert re.search("100% filled, [\\d,]+ tokens/s, step 6", written)
    for frame in written.split("\x1b[J")[:-1]:
        rows = re.sub("\x1b\\[[?0-9;]*[a-zA-Z]", "", frame).replace("\r", "").strip("\n").split("\n")
        assert len(rows) <= 9
        assert all(sum(map(columns, row)) <= 40 for row in rows)
    text = inert(alone.stdout.decode()).rstrip("\n")
    shown = "\n".join(screen(written, 40, 10))
    assert text.replace("\t", "") in shown.replace("\t", "")
    assert "filled" not in shown  # the text has taken the place of the canvas
    assert b"\x1b[5m" in alone.stdout  # into a file it goes as it is


def test_two_models_fill_a_pane_each_at_the_same_time(checkpoint):
    written, code = in_terminal(
        checkpoint, "--ckpt", checkpoint, "--prompt", "a<b", "--steps", 3, "--length", 30, width=60
    )
    assert code == 0
    # Each pane is drawn at its column.
    written = re.sub(r"\x1b\[[?0-9;]*[A-FHK-Za-z]|\r", "", written.replace("\x1b[J", "\f"))
    written = re.sub("([^\n\f]*)\x1b\\[29G", lambda row: row[1].ljust(28), written)
    frames = written.split("\f")
    rows = [frame.strip("\n").split("\n") for frame in frames if " | " in frame]
    assert len(rows) == 6
    for frame in rows:
        assert {row[28:31] for row in frame} == {" | "}
        assert all(sum(map(columns, row)) <= 60 for row in frame)
    panes = [[row[:28] + "|" + row[31:] for row in frame] for frame in rows]
    assert panes[0][-1].partition("|")[2].strip() == ""
    assert all(re.search(r"33% filled, [\d,]+ tokens/s", side) for side in panes[1][-1].split("|"))  # each after a step
    assert [pane[0].count("ckpt.pt") for pane in panes] == [1, 2, 2, 2, 2, 2]  # by the names of their models
    assert all(re.search(r"100% filled, [\d,]+ tokens/s", side) for side in panes[5][-1].split("|"))


def test_captions_fit_a_terminal_of_80_columns(monkeypatch, capfd):
    """Two orders side by side, each for several texts."""
    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((80, 24)))
    watch = Watch(2)
    for pane, name in enumerate(("confidence", "entropy-bound")):
        history = History(ByteTokenizer(), [256] * 9999, name)
        history.add([97] * 9999, [1.0] * 9999, 1.0)
        history.steps *= 128
        watch.show(pane, history, 16)
    lines = [re.sub("\x1b\\[[?0-9;]*[a-zA-Z]", "", line) for line in capfd.readouterr().err.split("\n")]
    assert "confidence, the first of 16 | entropy-bound, the first of 16" in lines
    assert "100% filled, 9,999 tokens/s, step 128 | 100% filled, 9,999 tokens/s, step 128" in lines


def test_watch_shows_drafts_and_counts_only_what_is_certain(monkeypatch, capfd):
    """Of two drafts, one becomes certain and one is replaced; a third becomes a hole again."""
    monkeypatch.setattr(os, "get_terminal_size", lambda _: os.terminal_size((60, 10)))
    history, watch = History(ByteTokenizer(), [*b">", *[256] * 4]), Watch(1)

    def shown(canvas, *row):
        history.add([*canvas, *[256] * (5 - len(canvas))], *row)
        watch.show(0, history, 1)
        return re.findall("\x1b\\[K(.*)\n", capfd.readouterr().err)  # the canvas and the status

    def coloured(code, text):
        return f"\x1b[{code}m{text}\x1b[0m"

    first = shown(b">abc", [1.0] * 5, 0.5, [False, True, True, True, False])
    assert first == [">" + coloured("4;35", "abc") + coloured(2, HOLE), coloured(7, "0% filled, 0 tokens/s, step 1")]
    second = shown(b">ax", [1.0] * 5, 1.0)
    assert second == [
        ">" + coloured("1;32", "ax") + coloured(2, HOLE * 2),
        coloured(7, "50% filled, 2 tokens/s, step 2"),
    ]
    third = shown(b">axyz", [1.0] * 5, 2.0, [False, False, False, False, True])
    assert third == [
        ">ax" + coloured("1;32", "y") + coloured("4;35", "z"),
        coloured(7, "75% filled, 2 tokens/s, step 3"),
    ]


def test_each_text_has_its_own_drafts(checkpoint, tmp_path, monkeypatch, capsys):
    """With a sampler that drafts one letter in the second of two texts."""

    def denoise(model, canvas, log_p, drafts, **_):
        canvas[1, 2] = ord("b")
        drafts[1, 2] = True
        yield canvas
        canvas[:], log_p[:], drafts[:] = ord("c"), -0.5, False
        yield canvas

    monkeypatch.setattr("sample.denoise", denoise)
    flags = "--ckpt", checkpoint, "--prompt", "<mask*4>", "--num_samples", 2, "--save", tmp_path / "run.html"
    text, _ = sample_text(flags, monkeypatch, capsys)
    assert text == "--- 1 of 2\ncccc\n--- 2 of 2\ncccc\n"
    page = (tmp_path / "run.html").read_text(encoding="utf-8")
    certain = [[i, "c", 0.607] for i in range(4)]
    steps = [run["steps"] for (run,) in json.loads(page.partition(' id="data">')[2].partition("</script>")[0])["texts"]]
    assert steps == [[[], certain], [[[2, "b", "draft"]], certain]]


def test_ctrl_c_gives_the_cursor_back(checkpoint):
    written, code = in_terminal(checkpoint, "--steps", 10**6, "--length", 10**4, interrupt=b"step 3\x1b")
    assert code == 130
    assert written.rindex("\x1b[?25h") > written.rindex("step ")
    assert "Traceback" not in written


def test_watch_and_save_change_nothing_without_a_terminal(checkpoint, tmp_path, monkeypatch, capsys):
    def run(*flags):
        return sample_text(["--ckpt", checkpoint, "--steps", 5, "--length", 60, *flags], monkeypatch, capsys)

    text, _ = run()
    watched, said = run("--watch")
    assert watched == text
    assert "\x1b[?25l" not in said
    for name in ("run.html", "run.svg"):
        saved, _ = run("--save", tmp_path / name)
        assert saved == text
        assert (tmp_path / name).stat().st_size > 1000
