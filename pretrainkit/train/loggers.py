"""Where metrics go besides metrics.jsonl; each entry of LOGGERS is one more place.

Guarantee: no logger waits for a network that is not there, and none stops the training.
"""

from __future__ import annotations

import csv
import functools
import logging
import os
import secrets
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlparse

from pretrainkit.config import PretrainConfig
from pretrainkit.errors import ConfigError
from pretrainkit.registry import Registry
from pretrainkit.train.state import TrainState

logger = logging.getLogger(__name__)

LOGGERS = Registry(
    "logger",
    {
        "wandb": "pretrainkit.train.loggers:WandbLogger",
        "tensorboard": "pretrainkit.train.loggers:TensorBoardLogger",
        "csv": "pretrainkit.train.loggers:CsvLogger",
    },
)
_CONNECT_TIMEOUT_S = 5.0
_INIT_TIMEOUT_S = 20.0  # of a server that takes a connection and says nothing, waited for twice; wandb's own is 90


class MetricsLogger(Protocol):
    """What a logger can do."""

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Take one row."""
        ...

    def close(self) -> None:
        """Finish."""
        ...


def open_logger(config: PretrainConfig, settings: dict[str, Any], state: TrainState) -> MetricsLogger:
    """The logger a configuration names.

    Raises:
        ConfigError: Its package is not installed.
    """
    try:
        opened: MetricsLogger = LOGGERS.get(config.logger_name)(config, settings, state)
    except ImportError as error:
        raise ConfigError(
            f"logger_name={config.logger_name} needs the package {error.name}; pip install 'pretrainkit[log]', or use "
            "logger_name=none"
        ) from error
    return opened


class CsvLogger:
    """RUN/metrics.csv in long form: step, name, value. Columns then never change, whatever is logged later."""

    def __init__(self, config: PretrainConfig, settings: dict[str, Any], state: TrainState) -> None:
        del settings, state
        path = config.out_dir / "metrics.csv"
        is_new = not path.exists()
        self._file = open(path, "a", newline="", encoding="utf-8")  # noqa: SIM115 - open for the whole run
        self._writer = csv.writer(self._file)
        if is_new:
            self._writer.writerow(["step", "name", "value"])

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Take one row."""
        self._writer.writerows([step, name, value] for name, value in numbers.items())
        self._file.flush()

    def close(self) -> None:
        """Finish."""
        self._file.close()


class TensorBoardLogger:
    """RUN/tensorboard/."""

    def __init__(self, config: PretrainConfig, settings: dict[str, Any], state: TrainState) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what an interrupted run logged beyond the step it goes on from.
        self._writer = SummaryWriter(str(config.out_dir / "tensorboard"), purge_step=state.step + 1)
        self._writer.add_text("settings", "\n".join(f"    {key}: {value}" for key, value in settings.items()))

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Take one row."""
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Finish."""
        self._writer.close()


class WandbLogger:
    """Weights & Biases; offline, with one warning, when there is no key, no network, or a server that refuses it."""

    def __init__(self, config: PretrainConfig, settings: dict[str, Any], state: TrainState) -> None:
        import wandb

        mode: Any = os.environ.get("WANDB_MODE")
        reason = None if mode in ("offline", "disabled") else _why_offline()
        if reason is not None:
            logger.warning("wandb: %s; logging offline into %s/wandb (wandb sync sends it)", reason, config.out_dir)
            mode = "offline"
        state.wandb_id = state.wandb_id or secrets.token_hex(4)
        begin = functools.partial(
            wandb.init, project=config.log.project or "pretrainkit", name=config.log.run, group=config.log.group,
            dir=str(config.out_dir), config=settings, id=state.wandb_id, resume="allow",
            settings=wandb.Settings(init_timeout=_INIT_TIMEOUT_S),
        )  # fmt: skip
        self._run: Any = None
        try:
            self._run = begin(mode=mode)
        except Exception as error:  # noqa: BLE001 - a refused key, say; wandb's exceptions have no class in common
            logger.warning(
                "wandb: %s; logging offline into %s/wandb (wandb sync sends it)", _line(error), config.out_dir
            )
            self._begin_offline(begin)

    def _begin_offline(self, begin: Callable[..., Any]) -> None:
        import wandb

        try:
            wandb.teardown()  # its service holds the id of the run that failed, and would refuse it
            self._run = begin(mode="offline")
        except Exception as error:  # noqa: BLE001 - likewise
            logger.warning("wandb: %s; nothing is logged there, metrics.jsonl goes on", _line(error))

    def log(self, numbers: dict[str, float], step: int) -> None:
        """Take one row; the first failure is said, and the rest is left out."""
        if self._run is None:
            return
        try:
            self._run.log(numbers, step=step)
        except Exception as error:  # noqa: BLE001 - likewise
            logger.warning("wandb: %s; nothing more is sent, metrics.jsonl goes on", _line(error))
            self._run = None

    def close(self) -> None:
        """Finish."""
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:  # noqa: BLE001 - likewise
            logger.warning("wandb: %s; the last rows may not have been sent (wandb sync sends them)", _line(error))


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _why_offline() -> str | None:
    """Why wandb cannot be reached, or None. Asked here because wandb itself waits for minutes and then ends the run."""
    base = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    host = urlparse(base).hostname or base
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    has_key = "WANDB_API_KEY" in os.environ or (netrc.is_file() and host in netrc.read_text(errors="replace"))
    if not has_key:
        return "no API key (set WANDB_API_KEY or run `wandb login`)"
    try:
        socket.create_connection((host, urlparse(base).port or 443), timeout=_CONNECT_TIMEOUT_S).close()
    except OSError as error:
        return f"{host} cannot be reached ({error})"
    return None
