"""Writes files that appear under their name only when they are complete, and locks a folder."""

import os
import shutil
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from data.lib.errors import Mistake


@contextmanager
def replacing(path):
    """Open a binary file that replaces path when the block ends, unless it raises. A missing folder is created."""
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # otherwise a crash could leave the new name with no content
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
        with suppress(OSError):  # a folder that isn't empty stays
            path.parent.rmdir()


def link(source, path):
    """Give the file `source` a second name, path, replacing any file that has it. Copies where links don't work."""
    temporary = Path(path).with_name(f"{Path(path).name}.{os.getpid()}.tmp")
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    os.replace(temporary, path)
    temporary.unlink(missing_ok=True)  # os.replace does nothing if both names already were the same file


@contextmanager
def alone_in(folder):
    """Lock a folder for this process, and delete half-written checkpoints in it. Mistake if another process has it."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        try:
            import fcntl

            lock = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, lock)
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise Mistake(f"{folder}: another run is writing there") from None
        except (ImportError, OSError):  # Windows and some network file systems have no such locks
            pass
        for path in folder.glob("*.pt.*.tmp"):
            path.unlink()
        yield
