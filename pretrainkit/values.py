"""What one value of a configuration must be, whatever its key: checks that `pretrainkit.config` shares.

Comes in: a key and its value. Goes out: nothing, or a `ConfigError` naming both and the way out. Guarantee: a URL's
password, key or token is in no message.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import urlsplit

from pretrainkit.errors import ConfigError, StorageError

_MOST = 2**63 - 1  # what torch, numpy and a file's size can count to
_LONGEST_NAME, _LONGEST_PATH = 255, 4095  # bytes. Source: linux/limits.h, NAME_MAX and PATH_MAX
_SECRETS = (
    (re.compile(r"(?<=://)[^\s/@'\"]*:[^\s@'\"]*(?=@)"), "***"),  # s3://KEY:SECRET@bucket; a secret may hold a slash
    (re.compile(r"(?<=https://)[^\s/@'\"]+(?=@)|(?<=http://)[^\s/@'\"]+(?=@)"), "***"),
    (re.compile(r"(://[^\s?'\"]+\?)[^\s'\"]+"), r"\1***"),  # a signed query
)


def require(condition: bool, key: str, value: object, rule: str) -> None:
    """Refuse a value that breaks a rule.

    Raises:
        ConfigError: With key, value and rule.
    """
    if not condition:
        raise ConfigError(f"{key}={value} {rule}")


def above(key: str, value: float | None, limit: float = 0) -> None:
    """Refuse a number that is not above a limit, not finite, or more than can be counted."""
    if value is not None:
        require(limit < value < math.inf, key, value, f"must be above {limit:g}")  # NaN is neither
        require(value <= _MOST, key, value, f"must be at most {_MOST}")


def between(key: str, value: float | None, low: float, high: float, hint: str = "") -> None:
    """Refuse a number out of a range, whose ends belong to it."""
    if value is not None:
        require(low <= value <= high, key, value, f"must be between {low} and {high}{hint}")


def carries_secret(source: str) -> bool:
    """Whether a URL has a password, a token or a signed query in it."""
    if "://" not in source:
        return False
    try:
        parts = urlsplit(source)
        _ = parts.port
    except ValueError:  # a key with a slash in it; or no URL at all
        return "@" in source
    # abfs://CONTAINER@ACCOUNT names no user.
    return bool(parts.password or parts.query or (parts.username and parts.scheme.startswith("http")))


def refuse_secrets(sources: Iterable[str]) -> None:
    """Refuse URLs of datasets with a secret in them; the value stays unsaid: it would be in the log for ever.

    Raises:
        ConfigError: One has.
    """
    if any(carries_secret(source) for source in sources):
        raise ConfigError(
            "the URL of a dataset carries a password, key or token, which logs and saved configurations would show; "
            "give it by the environment, as AWS_SECRET_ACCESS_KEY or HF_TOKEN"
        )


def mask_secrets(text: str) -> str:
    """A message without what its URLs carry before the @ or in their query."""
    for pattern, replacement in _SECRETS:
        text = pattern.sub(replacement, text)
    return text


def at_home(key: str, path: str | Path) -> str:
    """A path with `~` resolved, which no shell does in --flag=~/folder, and YAML never.

    Raises:
        ConfigError: It is empty, which would mean the working folder, or has a zero byte.
        StorageError: It is longer than file systems take.
    """
    text = str(path)
    if not text:
        raise ConfigError(f"{key} is empty; give a path (is a shell variable unset?)")
    if "://" in text:
        return text
    text = os.path.expanduser(text)
    longest = max(os.fsencode(text).split(b"/"), key=len)
    if len(longest) > _LONGEST_NAME or len(os.fsencode(text)) > _LONGEST_PATH:
        raise StorageError(
            f"{key}={text[:40]}... is too long ({len(text)} characters); file systems take {_LONGEST_NAME} bytes in a "
            f"name and {_LONGEST_PATH} in a path"
        )
    require("\0" not in text, key, repr(text), "has a zero byte in it, which no path can have")
    return text
