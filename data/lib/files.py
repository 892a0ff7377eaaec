"""Files that appear only when they are complete: writes that replace, and checked downloads."""

import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from data.lib.errors import Mistake


@contextmanager
def replacing(path):
    """Open a binary file that takes path's place when the block ends and the disk has it.

    If the block fails, path stays as it was, and a folder that was made for it goes again.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    made = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # or after a crash of the machine the name may be there, and no content
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        if made:
            with suppress(OSError):  # something else has been put there since
                path.parent.rmdir()
        raise


def link(source, path):
    """Give the file `source` another name, path, which may be another file's until then."""
    temporary = Path(path).with_name(f"{Path(path).name}.{os.getpid()}.tmp")
    try:
        os.link(source, temporary)
    except OSError:  # not every file system has two names for one file
        shutil.copyfile(source, temporary)
    os.replace(temporary, path)
    temporary.unlink(missing_ok=True)  # where both were names of one file already, nothing was replaced


@contextmanager
def alone_in(folder):
    """Context in which a process writes into a folder alone; Mistake if another does. It ends with the
    process, however that dies; what one left half-written goes.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    lock = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise Mistake(f"{folder}: another run is writing there") from None
    except OSError:  # some file systems of a network have no locks
        pass
    for path in Path(folder).glob("*.pt.*.tmp"):
        path.unlink()
    try:
        yield
    finally:
        os.close(lock)
