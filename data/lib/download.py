"""Downloads files over https, with a bound on their size, and checks their sha256."""

import hashlib
import http.client
import os
import urllib.request
from pathlib import Path

from tqdm import tqdm

from data.lib.errors import Mistake


def check_sha256(path, sha256):
    """Raise Mistake unless a file has this sha256."""
    if (found := hashlib.sha256(Path(path).read_bytes()).hexdigest()) != sha256:
        raise Mistake(f"{path}: its sha256 is {found}, but {sha256} was expected; get another copy")


class HttpsRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirections to https only."""

    def redirect_request(self, request, file, code, message, headers, url):
        if not url.startswith("https://"):
            raise Mistake(f"{url}: no download, because it is not https")
        return super().redirect_request(request, file, code, message, headers, url)


def download(url, path, sha256=None, instead="--file takes a copy of it", most=2**30):
    """Download at most `most` bytes to path, unless it exists. If it fails, NAME.part stays, and the next call resumes.

    instead: what else the user can do, for the sentence that says why the download failed.
    """
    path = Path(path)
    part = path.with_name(f"{path.name}.part")
    if path.exists():
        return
    part.parent.mkdir(parents=True, exist_ok=True)
    if not url.startswith(("https://", "http://127.0.0.1:")):  # the second is for the tests
        raise Mistake(f"{url}: no download, because it is not https")
    done = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "setitem"}  # some servers refuse Python's own
    headers |= {"Range": f"bytes={done}-"} if done else {}
    try:
        opener = urllib.request.build_opener(HttpsRedirects)
        with opener.open(urllib.request.Request(url, headers=headers), timeout=60) as response:
            done = done if response.status == 206 else 0  # a server that knows no Range sends everything
            total = None if response.length is None else done + response.length
            bar = tqdm(total=total, initial=done, unit="B", unit_scale=True, desc=path.name)
            with open(part, "ab" if done else "wb") as file, bar:
                while (chunk := response.read(1 << 16)) and file.tell() <= most:
                    file.write(chunk)
                    bar.update(len(chunk))
        if total and part.stat().st_size < total <= most:
            raise http.client.IncompleteRead(b"")
    except (OSError, http.client.HTTPException) as error:
        if getattr(error, "code", None) == 416 and done:  # .part is at least as long as the file
            part.unlink()
            return download(url, path, sha256, instead, most)
        reason = getattr(error, "reason", type(error).__name__)
        raise Mistake(f"{url}: no download ({reason}); try again, or {instead}") from None
    try:
        if part.stat().st_size > most:
            raise Mistake(f"{url}: it has more than {most:,} bytes")
        if sha256:
            check_sha256(part, sha256)
    except Mistake:
        part.unlink()
        raise
    os.replace(part, path)
