"""The layout: imports point down, every module says what it does, and nothing outgrows its place."""

import ast
import re
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
THREE = {"train", "sample", "model"}
LIB = {path.stem: path for path in sorted((ROOT / "data" / "lib").glob("*.py"))}
# These modules of data/lib know one of the three files, or data/weights, which subclasses model.py.
EXCEPTIONS = {
    ("slim", "model"): "it is a command of its own, which loads a checkpoint",
    ("checkpoint", "data.weights"): "a published model's network is imported when a checkpoint names its family",
}


@cache
def imports(path):
    """The modules of this project that a file imports, anywhere in it, as dotted names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) == "import_module":
            names.add(ast.unparse(node.args[0]).strip("f'\"").split(".{")[0])
    return names


def graph():
    """Which modules of data/lib each of them imports."""
    return {name: {n for n in LIB if f"data.lib.{n}" in imports(path)} - {name} for name, path in LIB.items()}


def levels():
    """The modules of data/lib in levels; each imports only modules of the levels below, which come later."""
    sorter, rows = TopologicalSorter(graph()), []
    sorter.prepare()
    while sorter.is_active():
        rows.insert(0, sorted(ready := sorter.get_ready()))
        sorter.done(*ready)
    return rows


def test_imports_in_data_lib_have_no_cycle():
    try:
        print("\n".join(" ".join(row) for row in levels()))
    except CycleError as error:
        pytest.fail(f"{' imports '.join(reversed(error.args[1]))}")


def test_data_lib_imports_none_of_the_three_files():
    outside = {
        (name, "data.weights" if module.startswith("data.weights") else module)
        for name, path in LIB.items()
        for module in imports(path)
        if module in THREE or module.startswith("data.weights")
    }
    assert outside == EXCEPTIONS.keys()


def test_the_three_files_import_in_one_direction():
    assert not imports(ROOT / "model.py") & {"train", "sample"}
    assert "train" not in imports(ROOT / "sample.py")


def sentence(path):
    """The first paragraph of a module's docstring, on one line."""
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(docstring.split("\n\n")[0].split())


@pytest.mark.parametrize(
    "path", [*LIB.values(), *sorted((ROOT / "data" / "weights").glob("*.py"))], ids=lambda p: p.stem
)
def test_a_module_opens_with_a_sentence(path):
    assert re.match(r"[A-Z`].{15,}[.!]$", sentence(path))


def test_the_map_of_data_lib_is_what_its_modules_say():
    text = (ROOT / "data" / "lib" / "README.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| \[(\w+)\.py\]\(\1\.py\) \| (.*) \|$", text, re.MULTILINE))
    assert rows == {name: sentence(path) for name, path in LIB.items()}


def n_lines(path):
    return len(path.read_text(encoding="utf-8").splitlines())


def test_nothing_outgrows_its_place():
    python = sorted((ROOT / "data").rglob("*.py"))
    # Before fairy tales 3785, byte pairs 3850, mends 3930, the page 4040, a race 4280, TinyLlama 4320.
    assert sum(map(n_lines, python)) <= 4402
    assert not [path.name for path in LIB.values() if n_lines(path) > 250]
    assert not [path.name for path in (ROOT / "tests").glob("*.py") if n_lines(path) > 500]
    assert n_lines(ROOT / "README.md") <= 200


def test_every_link_in_the_documentation_leads_somewhere():
    broken = []
    for page in [ROOT / "README.md", *(ROOT / "data").rglob("*.md"), *(ROOT / "tests").rglob("*.md")]:
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            file, _, anchor = target.partition("#")
            if file.startswith("http"):
                continue
            path = (page.parent / file).resolve() if file else page
            there = path.exists() and (not anchor or anchor in anchors(path / "README.md" if path.is_dir() else path))
            broken += [] if there else [f"{page.relative_to(ROOT)}: {target}"]
    assert not broken


@cache
def anchors(path):
    """The names under which a page's headings can be linked."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
