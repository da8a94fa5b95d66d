"""An entry point's own flags beside gin's: `--name=value` or `--name value`."""

import sys
from collections.abc import Sequence


def take_flags(
    arguments: Sequence[str], names: Sequence[str], switches: Sequence[str] = (), optional: Sequence[str] = ()
) -> tuple[dict[str, str], list[str]]:
    """Takes flags out of a command line; prints one line and exits with status 2 where a switch has a value.

    Args:
      arguments: of the command line.
      names: of the flags, without dashes.
      switches: further names, which have no value ("").
      optional: further names, whose value may be left out ("").

    Returns:
      {name: value} of those given, the last one if one is given twice, and the other arguments.
    """
    taken, others = {}, []
    rest = iter(arguments)
    for argument in rest:
        flag, equals, value = argument.partition("=")
        name = flag.removeprefix("--")
        if name == flag or name not in (*names, *switches, *optional):
            others.append(argument)
        elif equals and name in switches:
            print(f"configuration error: {argument}: {flag} takes no value; give it alone, or not.", file=sys.stderr)
            sys.exit(2)
        else:
            taken[name] = value if equals or name not in names else next(rest, "")
    return taken, others
