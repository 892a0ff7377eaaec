"""Files that appear only when they are complete: writes that replace, and checked downloads."""

import hashlib
import http.client
import os
import shutil
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from data.run.errors import Mistake


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


def check_sha256(path, sha256):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if (found := digest.hexdigest()) != sha256:
        raise Mistake(f"{path}: its sha256 is {found}, but {sha256} was expected; get another copy")


def download(url, path, sha256=None, instead="--file takes a copy of it"):
    """Fetch url to path with a progress bar; what arrives has the sha256 given or is not kept.

    An interrupted download stays beside path as NAME.part, and the next one goes on from there.
    instead: what else can be done, for the sentence that says why it failed.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    done = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "setitem"}  # some servers refuse Python's own
    if done:
        headers["Range"] = f"bytes={done}-"
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=60) as response:
            done = done if response.status == 206 else 0  # a server may send it all again
            total = int(response.headers.get("Content-Length", 0)) + done or None
            bar = tqdm(total=total, initial=done, unit="B", unit_scale=True, desc=path.name)
            with open(part, "ab" if done else "wb") as file, bar:
                while chunk := response.read(1 << 16):
                    file.write(chunk)
                    bar.update(len(chunk))
        if part.stat().st_size < (total or 0):
            raise http.client.IncompleteRead(b"")
    except urllib.error.HTTPError as error:
        if error.headers.get("Content-Range") != f"bytes */{done}":  # it is not that nothing is left to fetch
            if error.code == 416:  # there is less of it than we have: ours is of another file
                part.unlink()
            raise Mistake(f"{url}: no download ({error.reason}); {instead}") from None
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", type(error).__name__)
        raise Mistake(
            f"{url}: no download ({reason}); the same command goes on from here, or {instead}"
        ) from None
    if sha256:
        try:
            check_sha256(part, sha256)
        except Mistake:
            part.unlink()
            raise
    os.replace(part, path)
