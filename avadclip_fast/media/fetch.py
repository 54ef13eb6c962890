"""Weights from a path, or from a URL with a pinned SHA-256."""

import hashlib
import os
import re
import urllib.request
from http.client import HTTPException
from pathlib import Path

from ..data.atomic import atomic_write, sha256_of
from .errors import MediaError

_PINNED = re.compile(r"(https://\S+?/([\w.-]+))#sha256=([0-9a-f]{64})")


def fetch(source: str | Path) -> Path:
    """Returns a path; downloads "https://HOST/NAME#sha256=<64 hex digits>" once and verifies its hash.

    Raises MediaError if the file does not exist, or the URL has no hash, cannot be fetched, or has another hash.
    """
    if "://" not in str(source):
        path = Path(source)
        if not path.is_file():
            raise MediaError(f"{path}: no such file; give the path of the weights")
        return path
    match = _PINNED.fullmatch(str(source))
    if match is None:
        raise MediaError(
            f"{source}: weights are fetched from https:// addresses that end in #sha256=<64 hex digits> only"
        )
    url, name, digest = match.groups()
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:  # a container's user may have none
        raise MediaError(f"{url}: no home folder to keep it in; set XDG_CACHE_HOME, or give a path") from error
    path = Path(base, "avadclip_fast", f"{digest[:16]}-{name}")
    if path.is_file() and sha256_of(path) == digest:
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(url, timeout=60) as response, atomic_write(path) as file:
            found = hashlib.sha256()
            while block := response.read(2**20):
                found.update(block)
                file.write(block)
            if found.hexdigest() != digest:
                raise MediaError(f"{url}: its SHA-256 is {found.hexdigest()}, not {digest}; nothing was kept")
    except (OSError, HTTPException) as error:  # such as a connection that ends in the middle
        raise MediaError(f"{url}: cannot be fetched: {error}; download it elsewhere, and give its path") from error
    return path
