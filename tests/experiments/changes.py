"""What are the five changes of changes.md worth? Makes each in a copy of the project, trains the copy, and scores it.

python tests/experiments/changes.py     # 4 minutes of a GPU; half an hour or so on two cores
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from common import QUICK_MODEL, ROOT, context_of, main, windows

import data.lib.corpus


def readme_changes():
    """The diffs in changes.md, as text."""
    text = Path(__file__).with_suffix(".md").read_text(encoding="utf-8")
    return re.findall(r"```diff\n(.*?)```", text, re.DOTALL)


def apply(change, folder):
    """Make a diff's change to its file in folder. The lines that it replaces must stand there exactly once."""
    name, hunks = change.split("\n", 1)
    path = folder / name.split()[1]
    code = path.read_text(encoding="utf-8")
    for hunk in hunks.split("@@\n"):
        old, new = ("".join(line[1:] for line in hunk.splitlines(True) if line[0] != sign) for sign in "+-")
        assert code.count(old) == 1, f"{path.name} has this {code.count(old)} times:\n{old}"
        code = code.replace(old, new)
    path.write_text(code, encoding="utf-8")


def changes(config, device):
    T = context_of(config)
    training = (
        f"--data shakespeare --evals 1 --widen 0 --max_iters 2000 {f'--context {T} {QUICK_MODEL}' * config.quick}"
    )

    def run(folder, script, flags):
        arguments = [sys.executable, script, *flags.split(), "--device", str(device)]
        printed = subprocess.run(arguments, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
        print(f"| {folder.name} | `{script} {flags}` | {printed.stdout.splitlines()[-1]} |", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        plain = Path(folder, "as it is")
        shutil.copytree(ROOT, plain, ignore=shutil.ignore_patterns("out*", ".*", "*.pt"))
        shutil.copytree(data.lib.corpus.DATA / "shakespeare", plain / "data" / "shakespeare", dirs_exist_ok=True)
        (plain / "text.txt").write_bytes(bytes(windows("shakespeare", T, 8192).flatten().tolist()))
        projects = [plain]
        for number, change in enumerate(readme_changes(), 1):
            projects.append(Path(shutil.copytree(plain, Path(folder, f"change {number}"))))
            apply(change, projects[-1])
        _, right, vowels, spread, near, levels = projects
        for project in (plain, vowels, near, levels)[: 1 if config.quick else None]:
            run(project, "train.py", training)
            run(project, "train.py", "--eval_only --init_from out/ckpt.pt")
        for project in right, spread:  # these two change how the model writes, and not how it is trained
            shutil.copytree(plain / "out", project / "out")
        for project in (right, plain)[: 1 if config.quick else None]:
            run(project, "sample.py", "--ckpt out/ckpt.pt --score text.txt --order left --steps 256")
        for steps in (16, 64, 256)[: 1 if config.quick else None]:
            # The likelihood of a random order is only known by its bound in that many steps.
            run(plain, "train.py", f"--eval_only --init_from out/ckpt.pt --eval_tokens 8192 --level grid:{steps}")
            run(spread, "sample.py", f"--ckpt out/ckpt.pt --score text.txt --order spread --steps {steps}")


if __name__ == "__main__":
    main(changes)
