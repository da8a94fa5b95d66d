"""From a command line to a checked configuration: T5X's flags, and errors as one sentence.

--gin_file=PATH           read a gin file; may be repeated, later files win.
--gin.NAME=VALUE          bind a macro (--gin.TRAIN_STEPS=100) or a parameter (--gin.MeshConfig.fsdp=4); may be
                          repeated, wins over files. Strings need quotes inside the shell's (--gin.NAME="'x'"),
                          unless they consist of letters, digits and ./:~+-*?_ alone and read as nothing else.
--gin_search_paths=A,B    folders that gin files and their includes are looked for in, before the current folder
                          and this repository.
"""

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from jaxlm.configuration.build import build
from jaxlm.configuration.errors import ConfigError, nearest
from jaxlm.configuration.gin_files import Statements


def resolve(root: Any, arguments: Sequence[str], *, warn: bool = True) -> Any:
    """Builds the configuration that gin files and flags describe. Imports what the files import, starts nothing.

    Args:
      root: the dataclass to build (`RunConfig`), or a value in gin's language such as "%MODEL".
      arguments: command-line arguments, e.g. ["--gin_file=gin_configs/runs/quickstart.gin", "--gin.TRAIN_STEPS=10"].
      warn: of unused bindings in included files.

    Returns:
      An instance of `root`, every field of its tree checked against its annotation.

    Raises:
      ConfigError: one sentence that names the file and line or the flag, what is wrong, and the nearest valid name.
    """
    files, bindings, search_paths = _split(arguments)
    statements = Statements(search_paths)
    for file in files:
        statements.read_file(file)
    if isinstance(root, type):
        statements.targets[root] = None
    else:
        root = statements.read_value(root)
    for name, value in bindings:
        statements.read_binding(name, value)
    return build(root, statements, warn=warn)


def resolve_or_exit(root: Any, arguments: Sequence[str] | None = None) -> Any:
    """`resolve` for entry points: prints a `ConfigError` as one line and exits with status 2.

    Args:
      root: as for `resolve`.
      arguments: `sys.argv[1:]` if None.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if {"-h", "--help"} & set(arguments):
        print(__doc__)
        sys.exit(0)
    try:
        if not arguments:
            raise ConfigError(
                "nothing is configured; give a file of gin_configs/runs with --gin_file=... (see --help)."
            )
        return resolve(root, arguments)
    except ConfigError as error:
        print(f"configuration error: {error}", file=sys.stderr)
        sys.exit(2)


def _split(arguments: Sequence[str]) -> tuple[list[str], list[tuple[str, str]], tuple[pathlib.Path, ...]]:
    """(files, bindings as (name, value), search paths). `--flag value` is as good as `--flag=value`."""
    files, bindings, search_paths = [], [], []
    rest = iter(arguments)
    for argument in rest:
        flag, equals, value = argument.partition("=")
        if not equals and flag.startswith("--gin"):
            value = next(rest, None)
            if value is None or value.startswith("--"):
                raise ConfigError(f"{flag} lacks a value; write {flag}=...")
        if flag == "--gin_file":
            files.append(value)
        elif flag == "--gin_search_paths":
            search_paths += [pathlib.Path(path).expanduser() for path in value.split(",")]
        elif flag.startswith("--gin."):
            bindings.append((flag.removeprefix("--gin."), value))
        else:
            raise ConfigError(
                f"unknown argument {argument!r}{nearest(flag, ('--gin_file', '--gin_search_paths', '--gin.NAME'))}"
            )
    return files, bindings, tuple(search_paths)
