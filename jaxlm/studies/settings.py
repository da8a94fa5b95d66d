"""From settings, gin files and bindings, to the configuration that they describe."""

import functools
import pathlib
import tempfile

from jaxlm.configuration import ConfigError, digest, resolve
from jaxlm.evaluation.suite import EvaluationConfig
from jaxlm.run import RunConfig
from jaxlm.studies.config import Settings


@functools.lru_cache(maxsize=4096)
def resolved(settings: Settings) -> RunConfig:
    """The run that settings describe, without a folder.

    Raises:
      ConfigError: they do not resolve.
    """
    return _resolve(RunConfig, (*settings, "RunConfig.model_dir = 'unset'"))


@functools.lru_cache(maxsize=64)
def resolved_evaluation(settings: Settings) -> EvaluationConfig:
    """The evaluation that settings describe.

    Raises:
      ConfigError: they do not resolve.
    """
    return _resolve(EvaluationConfig, settings)


@functools.lru_cache(maxsize=64)
def evaluation_digest(settings: Settings) -> str:
    """The same for the same questions."""
    return digest(resolved_evaluation(settings))


def _resolve[T](of: type[T], settings: Settings) -> T:
    files = [setting for setting in settings if setting.endswith(".gin")]
    arguments = []
    for binding in (setting for setting in settings if not setting.endswith(".gin")):
        name, equals, value = binding.partition("=")
        if not equals:
            raise ConfigError(f"the setting {binding!r} is neither a .gin file nor NAME = value.")
        arguments.append(f"--gin.{name.strip()}={value.strip()}")
    # Included in one file: what a later one replaces may then remain unused.
    with tempfile.TemporaryDirectory() as scratch:
        together = pathlib.Path(scratch) / "settings.gin"
        together.write_text("".join(f"include '{file}'\n" for file in files))
        return resolve(of, [f"--gin_file={together}", *arguments], warn=False)
