"""A function becomes a command: its signature is the command line, the YAML schema and the help text.

Comes in: a public function with typed, documented parameters. Goes out: the process's exit code. Guarantees: the same
keys on the command line and in a `--config` file, and a flag wins over the file wherever it stands; an unknown flag or
key is answered with the nearest known one; a user's mistake is one line and exit code 2, a traceback only on `--debug`.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from pretrainkit._version import __version__
from pretrainkit.errors import Interrupted, PretrainKitError, StorageError
from pretrainkit.leave import leave
from pretrainkit.registry import Registry
from pretrainkit.values import mask_secrets

COMMANDS = Registry(
    "command",
    {
        "optimize": "pretrainkit.optimize:optimize_dataset",
        "merge": "pretrainkit.merge:merge_datasets",
        "inspect": "pretrainkit.inspect:inspect_dataset",
        "pretrain": "pretrainkit.train:pretrain",
        "consolidate": "pretrainkit.export:consolidate_checkpoint",
        "convert": "pretrainkit.export:convert_pretrained_checkpoint",
        "export-hf": "pretrainkit.export:export_hf",
        "report": "pretrainkit.report:write_report",
    },
)

# Parameters given by place; the root scripts and `pretrainkit COMMAND` share them.
POSITIONAL: dict[str, tuple[str, ...]] = {
    "inspect": ("dataset_dir",),
    "consolidate": ("checkpoint_dir",),
    "convert": ("checkpoint_dir", "output_dir"),
    "export-hf": ("checkpoint_dir", "output_dir"),
    "report": ("run_dirs",),
}


def main() -> None:
    """`pretrainkit COMMAND ...`: every root script's command, for an installed package."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["--version"]:
        sys.stdout.write(f"pretrainkit {__version__}\n")
        sys.exit(0)
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(f"usage: pretrainkit [--version] COMMAND ...\n\ncommands: {', '.join(COMMANDS)}\n")
        sys.stdout.write("`pretrainkit COMMAND --help` lists a command's flags.\n")
        sys.exit(0)
    run_command(arguments[0], arguments[1:], program=f"pretrainkit {arguments[0]}")


def run_command(name: str, arguments: Sequence[str] | None = None, *, program: str | None = None) -> None:
    """Run the command registered as `name` and exit; what the root scripts consist of.

    Raises:
        SystemExit: Always; see `run_cli`.
    """
    try:
        function = COMMANDS.get(name)
    except PretrainKitError as error:
        sys.exit(_complain(error))
    except KeyboardInterrupt:  # while the command is imported
        sys.exit(_complain(_ctrl_c()))
    run_cli(function, arguments, positional=POSITIONAL.get(name, ()), program=program)


def run_cli(
    function: Callable[..., Any],
    arguments: Sequence[str] | None = None,
    *,
    positional: Sequence[str] = (),
    program: str | None = None,
) -> None:
    """Run `function` with its parameters taken from the command line, then exit.

    Args:
        function: Public function; its annotations and Google-style docstring make the flags and the help.
        arguments: Command line without the program's name; None takes `sys.argv`.
        positional: Parameters given by place instead of by flag.
        program: Name in the usage line; None takes the script's.

    Raises:
        SystemExit: Always: 0 for success, 2 for a user's mistake, 75 where trying again may help, 128 + n when stopped
        by signal n.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given or os.environ.get("PRETRAINKIT_DEBUG") == "1"
    given = [argument for argument in given if argument != "--debug"]
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("pretrainkit").setLevel(logging.INFO)  # others' progress, such as every HTTP request, is not ours
    try:
        from pretrainkit.arguments import parse  # here, where Ctrl+C is one line

        function(**parse(function, given, positional=positional, program=program))
    except PretrainKitError as error:
        if debug:
            raise
        leave(_complain(error))
    except PermissionError as error:  # of whatever file: it is for the user to mend
        if debug:
            raise
        path = str(error.filename or error)
        leave(_complain(StorageError(f"no permission for {path}; have it changed, or give another path")))
    except BrokenPipeError:  # the reader, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the flush at exit would complain
    except KeyboardInterrupt:
        if debug:
            raise
        leave(_complain(_ctrl_c()))
    leave(0)


def _ctrl_c() -> Interrupted:
    return Interrupted("stopped by Ctrl+C", signal.SIGINT)


def _complain(error: PretrainKitError) -> int:
    prefix = "" if isinstance(error, Interrupted) else "error: "  # a stop that was asked for is no error
    sys.stderr.write(f"{prefix}{mask_secrets(' '.join(str(error).split()))}\n")
    return error.exit_code
