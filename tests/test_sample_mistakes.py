"""Mistakes in sample.py's flags: one sentence and exit code 2."""

import os
import subprocess
import sys

import pytest
from world import ROOT, mistake

import sample
import train
from data.lib.errors import command

pytestmark = pytest.mark.usefixtures("in_world")


MISTAKES = {
    "--steps 0": "at least 1",
    "--temperature -1": "at least 0",
    "--top_p 2": "at most 1",
    "--top_p 0": "above 0",
    "--length 9999999": "at most",
    "--order upward": "confidence",
    "--order left upward": "confidence",
    f"--prompt {'x' * 33}": "33 tokens with its holes; the canvas has 32",
    "--prompt hello --length 4": "the canvas has 4",
    "--prompt <mask*9> --length 8": "9 tokens with its holes; the canvas has 8",
    "--prompt <mask*999999999>": "<mask*999999999>: a hole is",
    "--prompt <Mask*3>": "a hole is <mask>",
    "--prompt <mask*9:3>": "<mask*9:3>: a hole is",
    "--prompt \udcff": "UTF-8",
    "--prompt a --suffix <mask>": "--suffix",
    "--prompt_file none.txt": "none.txt: No such file",
    "--prompt_file data": "data: Is a directory",
    "--prompt_file out/ckpt.pt": "not UTF-8",
    "--save run.png": ".html",
    "--save ": "--save",
    "--save data/.svg": ".html",
    "--page --prompt a --top_k 3": "--page: not with --prompt",
    "--race --chat": "--race: not with --chat",
    "--score book.txt --order random": "no one probability",
    "--score book.txt --order remask": "no one probability",
    "--score book.txt --order left --temperature 1": "--temperature",
    "--score book.txt --order left margin": "and one --order",
    "--score book.txt --ckpt gpt/ckpt.pt out/ckpt.pt": "one --ckpt and",
    "--score none.txt --order left": "none.txt: No such file",
    f"--score {os.devnull} --order left": "it is empty",
    "--block 32 --length 64": "sees 32 tokens",
    "--ckpt blocks/ckpt.pt --block 3": "--block 3: it must divide",
    "--ckpt gpt/ckpt.pt --suffix x": "--suffix: the model in gpt/ckpt.pt",
    "--ckpt blocks/ckpt.pt --suffix x": "--suffix: the model in blocks/ckpt.pt",
    "--ckpt gpt/ckpt.pt --order confidence": "--order: the model in gpt/ckpt.pt is causal",
    "--ckpt gpt/ckpt.pt --order left margin": "--order: the model in gpt/ckpt.pt",
    "--ckpt gpt/ckpt.pt --steps 3": "--steps: the model in gpt/ckpt.pt is causal",
    "--ckpt gpt/ckpt.pt --block 4": "--block: ",
    "--ckpt gpt/ckpt.pt --gamma 1": "--gamma: the model in gpt/ckpt.pt is causal",
    "--ckpt gpt/ckpt.pt --prompt a --guidance 2": "--guidance: ",
    "--ckpt gpt/ckpt.pt gpt/ckpt.pt --order left --steps 3": "--steps: ",
    "--judge nope.pt": "nope.pt: No such file",
    "--ckpt nope.pt": "No such file",
    "--ckpt book.txt": "not a checkpoint",
    "--ckpt data": "data",
}


@pytest.mark.parametrize("flags", MISTAKES)
def test_sample_mistakes(flags, monkeypatch, capsys):
    assert MISTAKES[flags] in mistake(sample.main, flags.split(" "), monkeypatch, capsys)


def test_help_shows_every_flag_with_its_default_unless_that_is_nothing(monkeypatch, capsys):
    for main, config in ((train.main, train.TrainConfig), (sample.main, sample.SampleConfig)):
        monkeypatch.setattr(sys, "argv", ["script.py", "--help"])
        with pytest.raises(SystemExit) as ended:
            command(main)
        text = " ".join(capsys.readouterr().out.split())
        assert ended.value.code == 0
        for name, value in vars(config()).items():
            assert f"--{name}" in text
            shown = " ".join(value) if name == "order" else value
            assert value is False or value in (None, (), "") or f"default: {shown}" in text


def test_a_reader_that_leaves_is_no_mistake(world):
    script = f"{sys.executable} {ROOT}/sample.py --num_samples 2 --length 30 | head -c 1"
    result = subprocess.run(["bash", "-c", f"set -o pipefail; {script}"], capture_output=True, cwd=world)
    assert b"Traceback" not in result.stderr
