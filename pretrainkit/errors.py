"""The error tree: every mistake a user can make has one class here.

Guarantee: `run_cli` turns any of these into one line on the terminal and the error's exit code: 2, something is to be
mended, unless said otherwise below. An exception that is not in this tree is a bug of ours and keeps its traceback.

    PretrainKitError
    +- ConfigError       a flag, a YAML key or a combination of them is wrong
    +- InputError        input files or documents are missing, damaged or not what was said
    +- TokenizerError    a tokenizer folder cannot be used, or two engines disagree
    +- StorageError      a path cannot be read, written or locked (full disk, permissions, another process)
    |  +- UnreachableError  a remote path cannot be had now: network, store or credentials
    +- DatasetError      a dataset on disk is damaged, incomplete or does not fit its records
    +- ModelError        a model is unknown, or does not fit its dataset or its weights
    +- CheckpointError   a checkpoint is missing, damaged or belongs to another run
    +- TrainingError     training cannot go on (non-finite loss, hung rank)
    +- LaunchError       processes, ranks or nodes cannot be started or died for good
"""

from __future__ import annotations

TRY_AGAIN = 75  # exit code of what nobody has to mend; EX_TEMPFAIL of sysexits.h


class PretrainKitError(Exception):
    """A mistake the user can correct; the message says what was wrong, the value, and the way out."""

    exit_code = 2


class ConfigError(PretrainKitError):
    """A flag, a YAML key or a combination of them is wrong."""


class InputError(PretrainKitError):
    """Input files or documents are missing, damaged or not what was said."""


class TokenizerError(PretrainKitError):
    """A tokenizer folder cannot be used, or two engines disagree."""


class StorageError(PretrainKitError):
    """A path cannot be read, written or locked."""


class UnreachableError(StorageError):
    """A remote path cannot be had now; nothing is said about what lies there."""


class DatasetError(PretrainKitError):
    """A dataset on disk is damaged, incomplete or does not fit its records."""


class ModelError(PretrainKitError):
    """A model is unknown, or does not fit its dataset or its weights."""


class CheckpointError(PretrainKitError):
    """A checkpoint is missing, damaged or belongs to another run."""


class TrainingError(PretrainKitError):
    """Training cannot go on."""


class LaunchError(PretrainKitError):
    """Processes, ranks or nodes cannot be started or died for good. Exit code 75 for a rank that was killed or hung."""


class Interrupted(PretrainKitError):  # noqa: N818 - an outcome a user asked for, not an error
    """Stopped by a signal; everything finished so far is kept. Exit code 128 + signal number, as shells have it."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number
