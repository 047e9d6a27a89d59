"""Command lines and YAML files -> the keyword arguments of a function.

Comes in: a function whose signature is the schema, and the arguments as typed. Goes out: its keyword arguments,
dataclasses built. Guarantee: whatever is wrong with an argument or a key ends in one `ConfigError` that names it, its
value and what it takes; nothing is guessed, overwritten or dropped.

jsonargparse does the parsing; this module adds what it leaves out: flags that win wherever they stand, bare switches,
nearest names, duplicate keys, readable messages.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from pretrainkit.errors import ConfigError
from pretrainkit.registry import did_you_mean
from pretrainkit.values import at_home, mask_secrets

# What other tools call it, where the name itself leads elsewhere or nowhere.
_NAMES_ELSEWHERE = {
    "learning_rate": "optimizer.init_args.lr",
    "max_lr": "optimizer.init_args.lr",
    "batch_size": "train.micro_batch_size",
    "per_device_train_batch_size": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "warmup_steps": "train.lr_warmup_steps",
    "warmup_ratio": "train.lr_warmup_fraction",
    "num_train_epochs": "train.epochs",
    "max_grad_norm": "train.max_norm",
    "grad_clip": "train.max_norm",
    "seq_len": "train.max_seq_length",
    "save_steps": "train.save_interval",
    "logging_steps": "train.log_interval",
    "eval_steps": "eval.interval",
    "gradient_checkpointing": "compute.activation_checkpointing",
    "output_dir": "out_dir",
}


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
    from jsonargparse import ArgumentError

    parser = _build_parser(function, positional, program)
    arguments, config_files = _prepare(list(arguments), parser)
    given: dict[str, Any] = {}
    for path in config_files:
        content = load_yaml(path)
        _check_keys(path, content, parser)
        given |= _leaves(content)
        if not content:  # jsonargparse takes nothing for a mistake
            arguments.remove(f"--config={path}")
    given |= {name.lstrip("-"): value for name, _, value in (argument.partition("=") for argument in arguments)}
    try:
        parsed = parser.parse_args(arguments)
        _check_nulls(parsed, parser)
        values = parser.instantiate_classes(parsed)
    except (ArgumentError, ValueError, TypeError) as error:
        raise ConfigError(mask_secrets(_readable(error, parser, given))) from error
    return {name: _at_home(name, value) for name, value in vars(values).items() if name not in ("config", "debug")}


def _at_home(name: str, value: Any) -> Any:
    """The value with `~` resolved in its paths, which no shell does in --flag=~/folder."""
    if isinstance(value, list):
        return [_at_home(name, item) for item in value]
    return Path(at_home(f"--{name}", value)) if isinstance(value, Path) else value


def _leaves(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Every value of a file by its whole key; mappings too, because some are values."""
    leaves: dict[str, Any] = {}
    for key, value in content.items():
        leaves[f"{prefix}{key}"] = value
        if isinstance(value, dict):
            leaves |= _leaves(value, f"{prefix}{key}.")
    return leaves


class Flag(NamedTuple):
    """One flag of a command, as the reference page shows it."""

    name: str
    takes: str
    required: bool
    default: Any
    help: str


def describe_flags(function: Callable[..., Any]) -> list[Flag]:
    """Every flag of a function's command, in the order of its signature, groups' keys with their dots."""
    parser = _build_parser(function, (), None)
    groups = {dest.rpartition(".")[0] for dest in _actions(parser)}
    return [
        Flag(
            name=dest,
            takes=_type_in_words(getattr(action, "_typehint", None)),
            required=bool(getattr(action, "required", False)) or dest in parser.required_args,
            default=action.default,
            help=" ".join((action.help or "").split()),
        )
        for dest, action in _actions(parser).items()
        if dest not in groups and dest not in ("config", "debug")
    ]


def _build_parser(function: Callable[..., Any], positional: Sequence[str], program: str | None) -> Any:
    from jsonargparse import ArgumentParser, set_parsing_settings

    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(
        prog=program,
        description=" ".join((function.__doc__ or "").split("\n\n")[0].split()),
        exit_on_error=False,
        default_meta=False,
    )
    parser.add_argument("--config", action="config", help="YAML file with these keys; a flag wins over it.")
    # --debug is taken out before parsing; it stands here for --help and for "did you mean".
    parser.add_argument("--debug", action="store_true", help="Show a traceback instead of one line.")
    parser.add_function_arguments(function, sub_configs=False)
    for name in positional:
        _make_positional(parser, name)
    return parser


def _make_positional(parser: Any, name: str) -> None:
    """Let `--name VALUE` also be given by its place, keeping its type and help."""
    action = next(action for action in parser._actions if action.dest == name)
    parser.positional_names = [*getattr(parser, "positional_names", []), name]
    action.help = f"(by place or by flag) {action.help or ''}".strip()


def _actions(parser: Any) -> dict[str, Any]:
    return {action.dest: action for action in parser._actions if action.dest not in ("help", "print_config")}


def _prepare(arguments: list[str], parser: Any) -> tuple[list[str], list[Path]]:
    """The arguments in the form jsonargparse wants, and the config files among them.

    --config moves to the front, so that flags win wherever they stand; a bare switch gets its `=true`; values without
    a flag get the flag whose place they hold. Unknown flags are refused here, with the nearest known ones.
    """
    by_option = {option: action for action in parser._actions for option in action.option_strings}
    places = list(getattr(parser, "positional_names", []))
    configs: list[str] = []
    others: list[str] = []
    index = 0
    while index < len(arguments):
        argument = arguments[index]
        following = arguments[index + 1] if index + 1 < len(arguments) else None
        index += 1
        if not re.match(r"--?[A-Za-z]", argument):
            others += _by_place(argument, places, parser)
            continue
        name, equals, _ = argument.partition("=")
        _check_flag(name, by_option)
        action = by_option.get(name)  # None for a key inside a free-form mapping, as in --model_config.n_layer
        if equals or (action is not None and action.nargs == 0):
            others.append(argument)
        elif getattr(action, "_typehint", None) is bool and str(following).lower() not in ("true", "false"):
            others.append(f"{name}=true")
        elif following is None:
            raise ConfigError(f"{name} needs a value; see --help")
        else:
            others.append(f"{name}={following}")
            index += 1
        _check_path(name, others[-1].partition("=")[2], action)
        if name == "--config":
            configs.append(others.pop())
        if name.lstrip("-") in places:
            places.remove(name.lstrip("-"))
    paths = [Path(config.partition("=")[2]) for config in configs]
    return [f"--config={path}" for path in paths] + others, paths


def _by_place(value: str, places: list[str], parser: Any) -> list[str]:
    if not places:
        raise ConfigError(f"{value!r} belongs to no flag; write it as --flag={value}, see --help")
    if "list" in str(getattr(_actions(parser)[places[0]], "_typehint", "")):
        return [f"--{places[0]}+={value}"]  # a list takes every value that is left
    return [f"--{places.pop(0)}={value}"]


def _check_flag(name: str, by_option: dict[str, Any]) -> None:
    if name in by_option or name.rstrip("+") in by_option:
        return
    if any(name.startswith(f"{option}.") and _is_free_form(action) for option, action in by_option.items()):
        return
    near = [f"--{dest}" for dest in _same_thing(name.lstrip("-"), (option.lstrip("-") for option in by_option))]
    near = near or did_you_mean(name, by_option) or ["--help"]
    raise ConfigError(f"unknown flag {name}; did you mean {' or '.join(near)}?")


def _same_thing(wrong: str, known: Iterable[str]) -> list[str]:
    """Known names for what a name means: what other tools call so, else what is called so in a group."""
    known = sorted(known)
    last = wrong.rpartition(".")[2]
    if _NAMES_ELSEWHERE.get(last) in known:
        return [_NAMES_ELSEWHERE[last]]
    return [name for name in known if name.endswith(f".{last}")]


def _check_path(name: str, value: Any, action: Any) -> None:
    """Refuse an empty path, which would mean the working folder."""
    if value == "" and "Path" in str(getattr(action, "_typehint", "")):
        raise ConfigError(f"{name} is empty; give a path (is a shell variable unset?)")


def _is_free_form(action: Any) -> bool:
    return "dict" in str(getattr(action, "_typehint", "")).lower()


class _StrictLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; this one refuses."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise ConfigError(f"line {key_node.start_mark.line + 1}: the key {key!r} stands twice; remove one")
            seen.add(key)
        return super().construct_mapping(node, deep=deep)


def load_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; an empty file is an empty mapping.

    Raises:
        ConfigError: The file is missing, not YAML, not a mapping, or has a key twice.
    """
    if path.is_dir():
        raise ConfigError(f"--config={path} is a folder; give a YAML file")
    if not path.is_file():
        siblings = [sibling.name for sibling in path.parent.glob("*.yaml")] if path.parent.is_dir() else []
        near = did_you_mean(path.name, siblings)
        raise ConfigError(
            f"--config={path}: no such file" + (f"; did you mean {path.parent / near[0]}?" if near else "")
        )
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_StrictLoader)  # noqa: S506 - a SafeLoader
    except ConfigError as error:
        raise ConfigError(f"{path}, {error}") from error
    except (yaml.YAMLError, UnicodeDecodeError, TypeError) as error:
        raise ConfigError(f"{path} is not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}, not a mapping; write lines like `key: value`")
    return content


def _check_keys(path: Path, content: dict[Any, Any], parser: Any, prefix: str = "") -> None:
    known = _actions(parser)
    # A group has keys of its own; anything below a leaf (a free-form dict, a list) is checked by its type alone.
    groups = {dest[: match.start()] for dest in known for match in re.finditer(r"\.", dest)}
    for key, value in content.items():
        dest = f"{prefix}{key}"
        if dest in ("config", "debug"):  # jsonargparse would read the other file too
            raise ConfigError(f"{path}: {dest!r} is a flag, no key of a file; say it as --{dest}")
        if dest not in known and dest not in groups:
            siblings = {name[len(prefix) :].split(".")[0] for name in known if name.startswith(prefix)}
            near = " or ".join(_same_thing(dest, known)) or _alternatives(str(key), siblings, prefix)
            raise ConfigError(f"{path}: unknown key {dest!r}; did you mean {near}?")
        _check_path(f"{path}: {dest}", value, known.get(dest))
        if dest in groups and isinstance(value, dict):
            _check_keys(path, value, parser, f"{dest}.")
        elif dest in groups:  # jsonargparse would take the defaults
            raise ConfigError(f"{path}: {_group_in_words(dest, known, '')}")


def _check_nulls(values: Any, parser: Any) -> None:
    """Refuse null where a value belongs; jsonargparse lets it pass."""
    for dest, action in _actions(parser).items():
        hint = getattr(action, "_typehint", None)
        if hint is not None and dest in values and values[dest] is None and type(None) not in typing.get_args(hint):
            raise ConfigError(f"--{dest}=null does not fit; it takes {_type_in_words(hint)}")


def _group_in_words(dest: str, known: Iterable[str], prefix: str = "--") -> str:
    first = min(name for name in known if name.startswith(f"{dest}."))
    return f"{prefix}{dest} is a group; give its keys one by one, like {prefix}{first}"


def _alternatives(wrong: str, known: Iterable[str], prefix: str) -> str:
    return " or ".join(prefix + name for name in did_you_mean(wrong, known) or sorted(known))


def _readable(error: Exception, parser: Any, given: dict[str, Any]) -> str:
    """One line for one of jsonargparse's errors: the flag, the value as given, and what it should be."""
    text = " ".join(str(error).split())
    if isinstance(error.__cause__, ConfigError):
        return str(error.__cause__)
    missing = re.search(r'Key "([\w.]+)" is required', text)
    if missing:
        return f"--{missing[1]} is missing; see --help"
    wrong = re.search(r'key "([\w.]+)"', text)
    action = _actions(parser).get(wrong[1]) if wrong else None
    if action is None:
        return text
    value = re.search(r"(?:Got|Given) value: (.*?)(?= Subtypes:| Errors:| - Expected| Given value|$)", text)
    shown = f"={given[action.dest]}" if action.dest in given else f"={value[1]}" if value else ""
    if any(dest.startswith(f"{action.dest}.") for dest in _actions(parser)):
        return _group_in_words(action.dest, _actions(parser))
    hint = getattr(action, "_typehint", None)
    return f"--{action.dest}{shown} does not fit; it takes {_type_in_words(hint)}"


def _type_in_words(hint: Any) -> str:
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        Path: "a path",
        type(None): "null",
    }
    if hint in names:
        return names[hint]
    arguments = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return ("one of " if len(arguments) > 1 else "") + ", ".join(str(argument) for argument in arguments)
    if origin in (typing.Union, types.UnionType):
        # null last: it is the rarer choice
        return " or ".join(_type_in_words(a) for a in sorted(arguments, key=lambda argument: argument is type(None)))
    if origin in (list, tuple) or "list" in str(hint).lower():
        return "a list like [a, b]"
    if origin is dict:
        return "a mapping"
    return getattr(hint, "__name__", str(hint))
