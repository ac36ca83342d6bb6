"""A file by HTTP into a partial file that a later try continues. Knows no keys and no checksums."""

from __future__ import annotations

import contextlib
import http.client
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

from .. import files
from ..errors import ConfigError, ServiceError

__all__ = ["Progress", "fetch"]

Progress = Callable[[int, int | None], object]
"""Takes the bytes so far and, where it is known, in all."""
_CHUNK_BYTES = 1 << 18
_TIMEOUT_S = 60.0
_TRIES = 4
_RANGE = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")


def fetch(url: str, partial: Path, progress: Progress | None = None) -> None:
    """Completes `partial` with the bytes of `url`.

    A part is continued only where the server says that the file has not changed (its ETag or Last-Modified, kept beside the part).

    Raises:
        ConfigError: the address is not http:// or https://.
        ServiceError: the server refuses, or the connection breaks again and again. StorageFullError: no room. The part stays.
    """
    if not url.startswith(("http://", "https://")):
        raise ConfigError(f"{url!r} is no address to download from; expected http:// or https://.")
    for number in range(1, _TRIES + 1):
        try:
            if _attempt(url, partial, progress):
                return
            trouble: object = "the connection ended early"
        except urllib.error.HTTPError as error:
            with error:
                if error.code == 416:  # the part is longer than the file is now
                    partial.unlink(missing_ok=True)
                elif error.code < 500 and error.code != 429:
                    raise ServiceError(f"{url!r} answers {error.code} {error.reason}. Check the address and your rights.", status=error.code) from error
                trouble = f"{error.code} {error.reason}"
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            trouble = error
        if number == _TRIES:
            raise ServiceError(f"{url!r} cannot be fetched: {trouble}. Try again: what has come is kept.", retryable=True)


def _attempt(url: str, partial: Path, progress: Progress | None) -> bool:
    """One connection; whether the file is whole after it."""
    tag = partial.with_name(partial.name + ".etag")
    same = tag.read_text(encoding="latin-1") if tag.exists() else ""
    have = partial.stat().st_size if same and partial.exists() else 0
    headers = {"Range": f"bytes={have}-", "If-Range": same} if have else {}
    request = urllib.request.Request(url, headers=headers)  # noqa: S310 # the scheme was checked
    with contextlib.closing(urllib.request.urlopen(request, timeout=_TIMEOUT_S)) as answer:  # noqa: S310
        span = _RANGE.fullmatch(answer.headers.get("Content-Range", "")) if answer.status == 206 else None
        if span is None or int(span[1]) != have:
            have = 0
        length = answer.headers.get("Content-Length")
        total = have + int(length) if length else None
        with files.storage_errors(partial):
            partial.parent.mkdir(parents=True, exist_ok=True)
            tag.write_text(answer.headers.get("ETag") or answer.headers.get("Last-Modified") or "", encoding="latin-1")
        with files.storage_errors(partial), partial.open("ab" if have else "wb") as file:
            while chunk := _read(answer):
                file.write(chunk)
                have += len(chunk)
                if progress is not None:
                    progress(have, total)
        whole = total is None or have == total
    if whole or not tag.read_text(encoding="latin-1"):
        tag.unlink()
    return whole


def _read(answer: http.client.HTTPResponse) -> bytes:
    """Bytes as they come; b"" at the end, also where the connection broke: what is missing shows in the count."""
    try:
        return answer.read1(_CHUNK_BYTES)
    except (http.client.HTTPException, ConnectionError, TimeoutError):
        return b""
