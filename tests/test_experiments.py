"""Every experiment runs: on tiny models, in a temporary folder, without the network."""

import runpy
import sys

import pytest
from world import ROOT

EXPERIMENTS = ROOT / "tests" / "experiments"
SLOW = dict.fromkeys(("changes", "post", "speed"), pytest.mark.slow)  # each takes several seconds
SCRIPTS = sorted(path for path in EXPERIMENTS.glob("*.py") if path.stem not in ("common", "hmm"))


@pytest.mark.filterwarnings("default")  # of matplotlib and of transformers, which not everybody has
@pytest.mark.parametrize(
    "script", [pytest.param(path, marks=SLOW.get(path.stem, ())) for path in SCRIPTS], ids=lambda path: path.stem
)
def test_an_experiment_runs_and_leaves_nothing_behind(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), "--quick", "--device", "cpu"])
    if script.stem == "post":
        pytest.importorskip("transformers")
    figures = {path: path.read_bytes() for path in (ROOT / ".github").glob("*.svg")}
    runpy.run_path(str(script), run_name="__main__")
    assert "| " in capsys.readouterr().out  # a row of its table
    assert not list(tmp_path.iterdir())
    assert figures == {path: path.read_bytes() for path in (ROOT / ".github").glob("*.svg")}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_an_experiment_says_how_it_is_run_and_where_its_results_are(script):
    opening = script.read_text().split('"""')[1]
    assert f"python tests/experiments/{script.name}" in opening
    assert f"experiments/{script.name}" in (ROOT / "tests" / "README.md").read_text()
