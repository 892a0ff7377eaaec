"""Downloads, checked: from https alone, of a size that is known, resumed where one was interrupted."""

import hashlib
import http.client
import os
import urllib.error
import urllib.parse
import urllib.request
import zipfile
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from data.lib.errors import Mistake


@contextmanager
def open_zipped(path, name):
    """Context of the file of a zip whose name there ends so, binary. Mistake if there is none."""
    with zipfile.ZipFile(path) as archive:
        member = next((m for m in archive.infolist() if m.filename.endswith(name)), None)
        if member is None:
            raise Mistake(f"{path}: there is no {name} in it")
        # The others zipfile unpacks 4 KB at a time, of which a hostile one makes any amount.
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise Mistake(f"{path}: {name} in it is not packed by deflate, as a zip's files usually are")
        with archive.open(member) as file:
            yield file


def check_sha256(path, sha256):
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if (found := digest.hexdigest()) != sha256:
        raise Mistake(f"{path}: its sha256 is {found}, but {sha256} was expected; get another copy")


class Secure(urllib.request.HTTPRedirectHandler):
    """Follows no redirection from https to anything else."""

    def redirect_request(self, request, file, code, message, headers, url):
        check_secure(url, from_here=request.type == "http")
        return super().redirect_request(request, file, code, message, headers, url)


def check_secure(url, from_here=True):
    """Raise Mistake unless a URL is https, or of this machine and asked for from it (from_here)."""
    address = urllib.parse.urlsplit(url)
    if address.scheme != "https" and not (from_here and address.hostname == "127.0.0.1"):
        raise Mistake(f"{url}: no download, because it is not https")


def download(url, path, sha256=None, instead="--file takes a copy of it", most=2**30):
    """Fetch url to path with a progress bar, `most` bytes; what arrives has the sha256 given or is not kept.

    An interrupted download stays beside path as NAME.part, and the next one goes on from there if the file is
    still the same, by its ETag, which is in NAME.part.etag. instead: what else can be done, for the sentence
    that says why it failed.
    """
    path = Path(path)
    part, etag_file = (path.with_name(f"{path.name}.part{ending}") for ending in ("", ".etag"))
    path.parent.mkdir(parents=True, exist_ok=True)
    done = part.stat().st_size if part.exists() else 0
    etag = etag_file.read_text() if etag_file.exists() else None
    headers = {"User-Agent": "setitem"}  # some servers refuse Python's own
    if done:
        headers["Range"] = f"bytes={done}-"
        if etag:
            headers["If-Range"] = etag
    check_secure(url)
    try:
        request = urllib.request.Request(url, headers=headers)
        with urllib.request.build_opener(Secure).open(request, timeout=60) as response:
            found = response.headers.get("ETag")
            if response.status == 206 and found != etag:  # of another file, and its beginning is not here
                part.unlink()
                raise http.client.IncompleteRead(b"")
            done = done if response.status == 206 else 0  # a server may send it all again
            total = int(response.headers.get("Content-Length", 0)) + done or None
            if (total or 0) > most:
                raise Mistake(f"{url}: {total:,} bytes, and it should have {most:,} at most")
            etag_file.write_text(found) if found else etag_file.unlink(missing_ok=True)
            bar = tqdm(total=total, initial=done, unit="B", unit_scale=True, desc=path.name)
            with open(part, "ab" if done else "wb") as file, bar:
                while chunk := response.read(1 << 16):
                    file.write(chunk)
                    bar.update(len(chunk))
                    if file.tell() > most:
                        raise Mistake(f"{url}: more than {most:,} bytes came")
        if part.stat().st_size < (total or 0):
            raise http.client.IncompleteRead(b"")
        etag_file.unlink(missing_ok=True)
    except urllib.error.HTTPError as error:
        if error.headers.get("Content-Range") != f"bytes */{done}":  # it is not that nothing is left to fetch
            if error.code == 416:  # there is less of it than we have: ours is of another file
                part.unlink()
            raise Mistake(f"{url}: no download ({error.reason}); {instead}") from None
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        reason = getattr(error, "reason", type(error).__name__)
        raise Mistake(f"{url}: no download ({reason}); the same command goes on from here, or {instead}") from None
    if sha256:
        try:
            check_sha256(part, sha256)
        except Mistake:
            part.unlink()
            raise
    os.replace(part, path)
