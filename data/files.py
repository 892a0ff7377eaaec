"""Files that appear only when they are complete: writes that replace, and checked downloads."""

import hashlib
import os
import urllib.error
import urllib.request
from contextlib import contextmanager, suppress
from pathlib import Path

from tqdm import tqdm

from data.flags import Mistake


@contextmanager
def replacing(path):
    """Open a binary file that takes path's place when the block ends.

    If the block fails, path stays as it was, and a folder that was made for it goes again.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    made = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary, "wb") as file:
            yield file
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        if made:
            with suppress(OSError):  # something else has been put there since
                path.parent.rmdir()
        raise


def check_sha256(path, sha256):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if (found := digest.hexdigest()) != sha256:
        raise Mistake(f"{path}: its sha256 is {found}, but {sha256} was expected; get another copy")


def download(url, path, sha256):
    """Fetch url to path with a progress bar; what arrives has the sha256 given or is not kept."""
    path = Path(path)
    try:
        with urllib.request.urlopen(url, timeout=60) as response, replacing(path) as file:
            total = int(response.headers.get("Content-Length", 0)) or None
            with tqdm(total=total, unit="B", unit_scale=True, desc=path.name) as bar:
                while chunk := response.read(1 << 16):
                    file.write(chunk)
                    bar.update(len(chunk))
            file.flush()
            check_sha256(file.name, sha256)
    except urllib.error.URLError as error:
        raise Mistake(f"{url}: no download ({error.reason}); --file takes a copy of it") from None
