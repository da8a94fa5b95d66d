"""An entry point's own flags beside gin's: `--name=value` or `--name value`."""

from collections.abc import Sequence


def take_flags(
    arguments: Sequence[str], names: Sequence[str], switches: Sequence[str] = ()
) -> tuple[dict[str, str], list[str]]:
    """Takes flags out of a command line.

    Args:
      arguments: of the command line.
      names: of the flags, without dashes.
      switches: further names, whose value may be left out ("").

    Returns:
      {name: value} of those given, the last one if one is given twice, and the other arguments.
    """
    taken, others = {}, []
    rest = iter(arguments)
    for argument in rest:
        flag, equals, value = argument.partition("=")
        name = flag.removeprefix("--")
        if name == flag or name not in (*names, *switches):
            others.append(argument)
        else:
            taken[name] = value if equals or name in switches else next(rest, "")
    return taken, others
