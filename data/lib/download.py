"""Downloads files over https, with a bound on their size, and checks their sha256."""

import hashlib
import http.client
import urllib.request
from pathlib import Path

from tqdm import tqdm

from data.lib.errors import Mistake


def check_sha256(path, sha256):
    """Raise Mistake unless a file has this sha256, or sha256 is None."""
    if sha256 and (found := hashlib.sha256(Path(path).read_bytes()).hexdigest()) != sha256:
        raise Mistake(f"{path}: its sha256 is {found}, but {sha256} was expected; get another copy")


def download(url, path, sha256=None, copy=None, instead="--file takes a copy of it", most=2**30):
    """Return the path of the user's copy or, without one, download at most `most` bytes, resuming from NAME.part."""
    path, part = Path(copy or path), Path(f"{path}.part")
    if copy or path.exists():
        check_sha256(path, sha256)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    done = part.stat().st_size if part.exists() else 0
    # Some servers refuse Python's own User-Agent.
    request = urllib.request.Request(url, headers={"User-Agent": "setitem", "Range": f"bytes={done}-"})
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            if not response.url.startswith(("https://", "http://127.0.0.1:")):  # the second is for the tests
                raise Mistake(f"{url}: no download, because {response.url} is not https")
            done = done if response.status == 206 else 0  # a server that doesn't support Range sends everything
            total = response.length and done + response.length
            bar = tqdm.wrapattr(response, "read", total, initial=done, desc=path.name)
            with open(part, "ab" if done else "wb") as file, bar as body:
                while (chunk := body.read(1 << 16)) and file.tell() <= most:
                    file.write(chunk)
        if part.stat().st_size > most:
            raise Mistake(f"{url}: it has more than {most:,} bytes")
        if response.length:
            raise http.client.IncompleteRead(b"")
        check_sha256(part, sha256)
    except Mistake:
        part.unlink(missing_ok=True)
        raise
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "code", None) == 416:  # .part is at least as long as the file
            part.unlink(missing_ok=True)
        reason = getattr(error, "reason", type(error).__name__)
        raise Mistake(f"{url}: no download ({reason}); try again, or {instead}") from None
    return part.replace(path)
