"""gin over typed, frozen dataclasses: resolve, check, print, compare with the defaults."""

from jaxlm.configuration.command_line import resolve, resolve_or_exit
from jaxlm.configuration.errors import ConfigError
from jaxlm.configuration.flags import take_flags
from jaxlm.configuration.text import diff_from_defaults, digest, resolve_text, resolved_text

__all__ = [
    "ConfigError",
    "diff_from_defaults",
    "digest",
    "resolve",
    "resolve_or_exit",
    "resolve_text",
    "resolved_text",
    "take_flags",
]
