"""What the README prints runs, and does what it says."""

import ast
import csv
import inspect
import re
import runpy
import shlex
import shutil
import subprocess
import sys

import pytest
import torch
from changes import apply, readme_changes
from world import ROOT, SMALL, copy_project, run_process, run_train, sample_text

import data.lib.corpus
from data.lib.corpus import tokenizer_by_name
from data.lib.errors import Mistake
from data.lib.flags import parse
from data.lib.session import SHIPPED, SHIPPED_DRAFT
from data.text.prepare import prepare
from model import load_checkpoint

pytestmark = pytest.mark.usefixtures("in_world")


def test_from_a_text_to_samples_as_a_user_would(tmp_path):
    (tmp_path / "poem.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 300)
    copy_project(tmp_path)
    prepared = run_process("data/text/prepare.py", "poem.txt", cwd=tmp_path)
    assert prepared.returncode == 0, prepared.stderr
    flags = f"--data poem --max_iters 60 --evals 2 {SMALL}".split()
    trained = run_process("train.py", *flags, cwd=tmp_path)
    assert trained.returncode == 0, trained.stderr
    assert "nats per token" in trained.stdout
    assert "bits per byte" in trained.stdout
    assert "tokens/s" in trained.stderr
    with open(tmp_path / "out" / "log.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [10, 20, 30, 40, 50, 60]
    assert float(rows[-1]["val_nats_per_token"]) < float(rows[0]["loss"]) < 5.5
    ckpt = tmp_path / "out" / "ckpt.pt"
    sampled = run_process(
        ROOT / "sample.py", "--ckpt", ckpt, "--prompt", "the <mask*5> fox", "--num_samples", 2, cwd="/"
    )
    assert sampled.returncode == 0, sampled.stderr
    assert "tokens/s" in sampled.stderr
    assert sampled.stdout.count("the ") >= 2
    assert "<mask>" not in sampled.stdout
    assert "--- 2 of 2" in sampled.stdout


def test_the_loop_of_the_readme_runs_as_printed(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    exec(re.search(r"```python\n(.*?)```", readme, re.DOTALL)[1], {})
    assert len(capsys.readouterr().out) > 8


def test_the_example_in_python_runs_as_printed(monkeypatch, capsys):
    """Its numbers are what the commands print."""
    monkeypatch.chdir(ROOT)
    text = (ROOT / "data" / "README.md").read_text(encoding="utf-8")
    exec(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], {})
    *canvases, exact, bound = capsys.readouterr().out.splitlines()
    assert len(canvases) == 4
    assert [text.count("<mask>") for text in canvases] == [3, 2, 1, 0]
    assert 0.5 < float(exact.split()[0]) < 6
    assert 0.5 < float(bound.split()[0]) < 6


def printed_commands():
    """(page, words) of every command in the documentation that calls train.py, sample.py or a script in data/."""
    for page in [ROOT / "README.md", *(ROOT / "data").rglob("*.md"), *(ROOT / "tests").rglob("*.md")]:
        text = page.read_text(encoding="utf-8")
        for line in text.split("\n") + re.findall(r"`((?:python|torchrun) [^`]+)`", text):
            for command in line.split(" && "):
                words = shlex.split(command, comments=True) if re.match("python |torchrun ", command) else []
                script = next((i for i, word in enumerate(words) if re.fullmatch(r"(data/.*/)?\w+\.py", word)), None)
                if script is not None:
                    yield page.relative_to(ROOT), words[script:]


def test_every_command_in_the_documentation_has_flags_that_exist():
    commands = [*printed_commands()]
    assert len(commands) > 100
    for page, (script, *words) in commands:
        if "spread" in words:  # an order that the reader adds
            continue
        variables = runpy.run_path(str(ROOT / script))
        configs = [x for name, x in variables.items() if re.fullmatch("(Train|Sample|Prepare|Slim)Config", name)]
        (config,) = configs or [inspect.getclosurevars(variables["main"]).nonlocals["config_class"]]
        try:
            parse(config, words=words)
        except Mistake as mistake:
            pytest.fail(f"{page}: {script} {shlex.join(words)}: {mistake}")


CHANGED = """
import torch
from sample import ORDERS, highest

holes, place = torch.ones(1, 8, dtype=torch.bool), torch.arange(8)
for order in "left", "spread":
    chosen = highest(ORDERS[order](None, None, place)[None], holes, torch.tensor([[3]]))
    print(*chosen[0].nonzero().flatten().tolist())
"""


def test_the_five_changes_can_be_made_and_do_what_their_page_says(world, tmp_path):
    """All five in one copy: `left` begins at the right, `spread` leaves gaps, and a model learns and writes."""
    copy_project(tmp_path)
    assert len(readme_changes()) == 5
    shutil.copytree(world / "data" / "book", tmp_path / "data" / "book")
    for change in readme_changes():
        apply(change, tmp_path)
    chosen = run_process("-c", CHANGED, cwd=tmp_path)
    assert chosen.stdout.splitlines() == ["5 6 7", "2 5 7"], chosen.stderr
    trained = run_process(
        "train.py", *f"--data book --out_dir out --max_iters 2 --evals 1 {SMALL}".split(), cwd=tmp_path
    )
    assert trained.returncode == 0, trained.stderr
    written = run_process("sample.py", "--ckpt", "out/ckpt.pt", "--order", "left", "spread", "--steps", 8, cwd=tmp_path)
    assert written.returncode == 0, written.stderr


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("Once upon a <mask> there <mask> a king.", "Once upon a time there was a king."),
        (
            "Once upon a <mask> there <mask> a king who had three <mask>.",
            "Once upon a time there was a king who had three sons.",
        ),
    ],
)
def test_the_shipped_model_knows_its_tales(prompt, text, monkeypatch, capsys):
    """Of one checkpoint and its likeliest text, which another may not share: these are easy."""
    flags = ["--ckpt", SHIPPED, "--prompt", prompt, "--order", "confidence", "--temperature", 0]
    written = sample_text(flags, monkeypatch, capsys)
    assert written.out == text + "\n"


def test_the_readme_s_texts_are_those_of_its_command(monkeypatch, capsys):
    """On any processor, because they are drawn in float32."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"`python sample.py ([^`]*--num_samples 3[^`]*)`", readme)
    written = sample_text([*shlex.split(command), "--ckpt", SHIPPED], monkeypatch, capsys)
    texts = re.split(r"--- \d of 3\n", written.out)[1:]
    assert re.findall(r"^\| [012] \| (Once upon a time.*) \|$", readme, re.M) == [text.strip() for text in texts]


@pytest.mark.parametrize("path", [SHIPPED, SHIPPED_DRAFT], ids=lambda path: path.stem)
def test_a_shipped_model_is_small_and_can_be_trained_on(path, tmp_path, monkeypatch):
    """12 MB at most, in bfloat16, without what only resuming needs."""
    assert path.stat().st_size <= 12e6
    stored = torch.load(path, weights_only=True)
    assert {tensor.dtype for tensor in stored["model"].values()} == {torch.bfloat16}
    assert "optimizers" not in stored
    monkeypatch.setattr(data.lib.corpus, "DATA", tmp_path / "data")
    (tmp_path / "tale.txt").write_text("Once upon a time there was a king who had three sons. " * 400)
    prepare(tmp_path / "tale.txt", "tale", tokenizer_by_name(str(path)))
    run_train(monkeypatch, f"--init_from {path} --data tale --out_dir {tmp_path / 'on'} --max_iters 1 --evals 1")
    assert load_checkpoint(tmp_path / "on" / "ckpt.pt")[0].config == load_checkpoint(path)[0].config


PARSE = "import ast, sys; [ast.parse(open(path, encoding='utf-8').read()) for path in sys.argv[1:]]\n"


def own_imports(paths):
    """The lines that import something of Python's own library."""
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                module = getattr(node, "module", node.names[0].name)
                if module.partition(".")[0] in sys.stdlib_module_names:
                    yield ast.unparse(node)


@pytest.mark.parametrize("minor", range(10, 15))
def test_each_python_parses_it_and_has_what_it_imports(minor):
    """Each that is on this machine; of earlier ones than this one at least the grammar is known."""
    paths = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0][0] != "."]
    python = shutil.which(f"python3.{minor}")
    there = python is not None and subprocess.run([python, "-c", ""], capture_output=True).returncode == 0
    if (3, minor) <= sys.version_info:
        for path in paths:
            ast.parse(path.read_text(encoding="utf-8"), feature_version=(3, minor))
    elif not there:
        pytest.skip(f"no Python 3.{minor} on this machine")
    if there:
        script = PARSE + "\n".join({*own_imports(paths)})
        result = subprocess.run([python, "-c", script, *paths], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
