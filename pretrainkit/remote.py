"""Remote storage by URL, with patience: what fails for a moment is tried again, what cannot be had is said in one line.

Comes in: a URL that fsspec knows (`s3://`, `gs://`, `hf://`, ...). Goes out: its file system, and files to read by
ranges. Guarantees: an answer that a dropped connection cut short is never taken for the whole; a failure of the network
or of the credentials is an `UnreachableError`, never a fault of the file that was asked for.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

from pretrainkit.errors import StorageError, UnreachableError

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
# s3fs and huggingface_hub retry by themselves too; these cover what outlasts them: about a minute in all.
_RETRY_PAUSES_S = (0.5, 1, 2, 4, 8, 16, 32)

# What clients raise for a failing network or store and is no OSError, by the module that has it once it is in use.
_CLIENT_ERRORS = {
    "aiohttp": "ClientError",
    "botocore.exceptions": "BotoCoreError",
    "gcsfs.retry": "HttpError",
    "google.auth.exceptions": "GoogleAuthError",
    "httpx": "TransportError",
}
# Names of errors that no waiting mends, with the way out.
_LASTING = {
    "NoCredentialsError": "give credentials, such as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "PartialCredentialsError": "give both AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
    "GoogleAuthError": "give credentials, such as GOOGLE_APPLICATION_CREDENTIALS",
    "DefaultCredentialsError": "give credentials, such as GOOGLE_APPLICATION_CREDENTIALS",
    "OfflineModeIsEnabled": "unset HF_HUB_OFFLINE",
}
_WORTH_WAITING = (408, 425, 429)
_MOST_WORDS = 300


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system for a URL and the path in it.

    Raises:
        StorageError: Its package is not installed, or it cannot be reached.
    """
    import fsspec

    try:
        # A process that writes needs to see what it wrote a moment ago.
        options = {"use_listings_cache": False} if url.startswith("s3://") else {}
        fs, path = fsspec.core.url_to_fs(url, **options)
        return fs, path
    except (ImportError, ValueError) as error:
        raise StorageError(f"{url}: {error}; pip install 'pretrainkit[remote]' brings s3:// and hf://") from error


def patiently(url: str, fs: Any, action: Callable[[], _T]) -> _T:
    """The result of `action`, which may be done again: tried anew, with growing pauses, while the network fails.

    Args:
        url: What it is about, for messages.
        fs: File system it uses; a listing that broke off half-way must not stay in its cache.
        action: What to do.

    Raises:
        FileNotFoundError: There is no such thing.
        UnreachableError: It cannot be had: the network or the store failed for a minute, or the credentials do not do.
    """
    for pause_s in (*_RETRY_PAUSES_S, None):
        try:
            return action()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise
        except _network_errors() as error:
            words = " ".join(str(error).split())[:_MOST_WORDS] or type(error).__name__
            remedy = _remedy(error)
            if remedy is not None or pause_s is None:
                way_out = remedy or "run the same command again when it can be reached, finished work is kept"
                raise UnreachableError(f"cannot reach {url}: {words}; {way_out}") from error
            logger.warning("%s: %s; trying again in %s s", url, words, pause_s)
            time.sleep(pause_s)
            fs.invalidate_cache()
    raise AssertionError("the last try returns or raises")


def _network_errors() -> tuple[type[BaseException], ...]:
    loaded = [(sys.modules[module], name) for module, name in _CLIENT_ERRORS.items() if module in sys.modules]
    return (OSError, *(getattr(module, name) for module, name in loaded))


def _remedy(error: BaseException) -> str | None:
    """What to do about an error that no waiting mends, or None for one that may pass."""
    by_name = next((_LASTING[kind.__name__] for kind in type(error).__mro__ if kind.__name__ in _LASTING), None)
    if by_name is not None:
        return by_name
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, PermissionError) or status in (401, 403):
        return "check the credentials (HF_TOKEN for the hub) and that they may read it"
    if isinstance(status, int) and 400 <= status < 500 and status not in _WORTH_WAITING:
        return "check the URL"
    return None


class RetryingFile(io.RawIOBase):
    """A remote file opened for reading that survives dropped connections.

    Each read is repeated with growing pauses; a file that changed its size in between is refused, because parts of two
    versions would make one wrong text.
    """

    def __init__(self, url: str) -> None:
        super().__init__()
        self._fs, self._path = filesystem(url)
        self._url = url
        self._position = 0
        # Others read ahead, and every read is a file of its own to them: what they fetch too much is thrown away.
        self._options = {"cache_type": "none"} if url.startswith("hf://") else {}
        self.size = patiently(url, self._fs, lambda: int(self._fs.info(self._path)["size"]))

    def readable(self) -> bool:  # noqa: D102 - as in io
        return True

    def seekable(self) -> bool:  # noqa: D102 - as in io
        return True

    def tell(self) -> int:  # noqa: D102 - as in io
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:  # noqa: D102 - as in io
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self.size}[whence]
        self._position = base + offset
        return self._position

    def readinto(self, buffer: Any) -> int:  # noqa: D102 - as in io
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read(self, size: int = -1) -> bytes:  # noqa: D102 - as in io
        start, stop = self._position, self.size if size is None or size < 0 else min(self._position + size, self.size)
        if stop <= start:
            return b""
        data = patiently(
            self._url,
            self._fs,
            lambda: bytes(self._fs.cat_file(self._path, start=start, end=stop, **self._options)),
        )
        if len(data) != stop - start:
            raise StorageError(f"{self._url} gave {len(data)} bytes where {stop - start} were due; it changed")
        self._position = stop
        return data
