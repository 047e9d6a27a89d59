"""A function becomes a command: its signature is the command line, the YAML schema and the help text.

Comes in: a public function with typed, documented parameters. Goes out: the process's exit code. Guarantees: the same
keys on the command line and in a `--config` file, a flag wins over the file wherever it stands; an unknown flag or key is
answered with the nearest known one; a user's mistake is one line and exit code 2, with the traceback only on `--debug`.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from pretrainkit._version import __version__
from pretrainkit.errors import ConfigError, PretrainKitError
from pretrainkit.registry import Registry, did_you_mean

COMMANDS = Registry(
    "command",
    {
        "optimize": "pretrainkit.optimize:optimize_dataset",
        "merge": "pretrainkit.merge:merge_datasets",
        "pretrain": "pretrainkit.train:pretrain",
        "consolidate": "pretrainkit.export:consolidate_checkpoint",
        "convert": "pretrainkit.export:convert_pretrained_checkpoint",
        "export-hf": "pretrainkit.export:export_hf",
        "inspect": "pretrainkit.inspect:inspect_dataset",
        "report": "pretrainkit.report:write_report",
    },
)


def main() -> None:
    """`pretrainkit COMMAND ...`: the root scripts' commands for an installed package."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["--version"]:
        sys.exit(sys.stdout.write(f"pretrainkit {__version__}\n") and 0)
    if not arguments or arguments[0] in ("-h", "--help"):
        lines = [
            f"usage: pretrainkit [--version] {{{','.join(COMMANDS)}}} ...",
            "",
            "Run a command with --help for its flags.",
        ]
        sys.exit(sys.stdout.write("\n".join(lines) + "\n") and 0)
    try:
        function = COMMANDS.get(arguments[0])
    except PretrainKitError as error:
        sys.exit(_complain(error))
    run_cli(function, arguments[1:], program=f"pretrainkit {arguments[0]}")


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
        SystemExit: Always: 0 for success, 2 for a user's mistake, 128 + n when stopped by signal n.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given or os.environ.get("PRETRAINKIT_DEBUG") == "1"
    given = [argument for argument in given if argument != "--debug"]
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        values = parse(function, given, positional=positional, program=program)
        function(**values)
    except PretrainKitError as error:
        if debug:
            raise
        sys.exit(_complain(error))
    except KeyboardInterrupt:
        if debug:
            raise
        sys.exit(_complain(PretrainKitError("stopped by Ctrl+C"), exit_code=130))
    sys.exit(0)


def _complain(error: PretrainKitError, exit_code: int | None = None) -> int:
    sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
    return error.exit_code if exit_code is None else exit_code


def parse(
    function: Callable[..., Any],
    arguments: Sequence[str],
    *,
    positional: Sequence[str] = (),
    program: str | None = None,
) -> dict[str, Any]:
    """The keyword arguments for `function` that a command line and its `--config` files stand for.

    Raises:
        ConfigError: An unknown or missing flag or key, or a value that does not fit its type.
        SystemExit: 0 after `--help`.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(
        prog=program,
        description=(function.__doc__ or "").split("\n\n")[0].replace("\n", " ").strip(),
        exit_on_error=False,
        default_meta=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with these keys; a flag overrides it.")
    skip = set(positional)
    for name in positional:
        parser.add_argument(name, type=Path, help=_parameter_help(function, name))
    parser.add_function_arguments(function, skip=skip, sub_configs=False)
    known = {action.dest for action in parser._actions if action.dest not in ("help", "config", "==SUPPRESS==")}
    arguments = _config_first(list(arguments))
    for path in _config_files(arguments):
        _check_config_file(Path(path), known)
    _check_flags(arguments, parser)
    try:
        namespace = parser.parse_args(arguments)
        instantiated = parser.instantiate_classes(namespace)
    except (ArgumentError, ValueError, TypeError) as error:
        raise ConfigError(_readable(error, parser)) from error
    values: dict[str, Any] = instantiated.as_dict() if hasattr(instantiated, "as_dict") else vars(instantiated)
    values = {key: getattr(instantiated, key) for key in values if key != "config"}
    return values


def _parameter_help(function: Callable[..., Any], name: str) -> str:
    match = re.search(rf"^\s+{name}: (.+?)(?=\n\s+\w+: |\n\n|\n\s*Returns:|\Z)", function.__doc__ or "", re.DOTALL | re.MULTILINE)
    return " ".join(match[1].split()) if match else ""


def _config_first(arguments: list[str]) -> list[str]:
    """The same arguments with every --config moved to the front, so that flags win wherever they stand."""
    configs: list[str] = []
    others: list[str] = []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        if argument == "--config" and position + 1 < len(arguments):
            configs.append(f"--config={arguments[position + 1]}")
            position += 1
        elif argument.startswith("--config="):
            configs.append(argument)
        else:
            others.append(argument)
        position += 1
    return configs + others


def _config_files(arguments: list[str]) -> list[str]:
    return [argument.partition("=")[2] for argument in arguments if argument.startswith("--config=")]


class _StrictLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; this one refuses."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)  # type: ignore[no-untyped-call]
            if key in seen:
                raise ConfigError(f"line {key_node.start_mark.line + 1}: the key {key!r} stands twice; remove one")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises:
        ConfigError: The file is missing, not YAML, not a mapping, or has a key twice.
    """
    if not path.is_file():
        near = did_you_mean(path.name, [p.name for p in path.parent.glob("*.yaml")] if path.parent.is_dir() else [])
        raise ConfigError(
            f"--config {path}: no such file" + (f"; did you mean {path.parent / near[0]}?" if near else "")
        )
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path} holds a {type(content).__name__}, not a mapping; write lines of the form `key: value`"
        )
    return content


def _check_config_file(path: Path, known: set[str]) -> None:
    # Where a known dest has no known children (a free-form dict or list), its content is checked by its type alone.
    parents = {dest.rpartition(".")[0] for dest in known if "." in dest}
    parents |= {parent.rpartition(".")[0] for parent in parents}

    def walk(mapping: dict[Any, Any], prefix: str) -> None:
        for key, value in mapping.items():
            dest = f"{prefix}{key}"
            if dest not in known and dest not in parents:
                siblings = {name[len(prefix) :].split(".")[0] for name in known if name.startswith(prefix)}
                near = did_you_mean(str(key), siblings) or sorted(siblings)
                raise ConfigError(
                    f"{path}: unknown key {dest!r}; did you mean {' or '.join(prefix + n for n in near[:3])}?"
                )
            if dest in parents and isinstance(value, dict):
                walk(value, f"{dest}.")

    walk(load_yaml(path), "")


def _check_flags(arguments: list[str], parser: Any) -> None:
    options = {option for action in parser._actions for option in action.option_strings}
    free_form = {
        option
        for action in parser._actions
        for option in action.option_strings
        if "dict" in str(getattr(action, "_typehint", ""))
    }
    for argument in arguments:
        if argument == "--":
            return
        name = argument.partition("=")[0]
        if not re.match(r"--?[A-Za-z]", name) or name in options:
            continue
        if any(name.startswith(f"{option}.") for option in free_form) or name.rstrip("+") in options:
            continue
        near = did_you_mean(name, options) or ["--help"]
        raise ConfigError(f"unknown flag {name}; did you mean {' or '.join(near)}?")


def _readable(error: Exception, parser: Any) -> str:
    """Jsonargparse's message with its noise removed and, for a wrong choice, the choices."""
    text = " ".join(str(error).split())
    match = re.search(r"(?:Parser|Problem with|argument|key) \"?(?:--)?([A-Za-z_][\w.]*)\"?", text)
    if match:
        for action in parser._actions:
            hint = str(getattr(action, "_typehint", ""))
            choices = re.findall(r"Literal\[([^\]]+)\]", hint)
            if action.dest == match[1] and choices and re.search("Union|Literal|Expected", text):
                value = re.search(r"(?:Got value|Given value|value)[: ]+\"?([^\s\"]+)", text)
                given = f"={value[1]}" if value else ""
                return f"--{action.dest}{given} is not one of {choices[0]}"
    return text
