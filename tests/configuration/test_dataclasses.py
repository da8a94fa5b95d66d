"""Every frozen dataclass of the library can be configured: plain fields, resolvable types, no hidden defaults."""

import dataclasses
import importlib
import inspect
import pathlib
import typing

import pytest

from jaxlm.configuration import typed

ROOT = pathlib.Path(__file__).resolve().parents[2]
# What needs packages of extras, and modules that run when imported.
LEFT_OUT = {
    "jaxlm.data.seqio_bridge",
    "jaxlm.evaluation.harness",
    "jaxlm.checkpoints.huggingface.modeling_jaxlm",
    "jaxlm.configuration.__main__",
}

# Made by models and programs, never by a file.
NOT_CONFIGURED = {
    "jaxlm.decoding.requests.Request",
    "jaxlm.evaluation.subject.Subject",
    "jaxlm.layers.stacking.StackLayout",
    "jaxlm.parallel.pipeline.StackedLayers",
}


def frozen_dataclasses() -> dict[str, type]:
    found = {}
    for path in sorted((ROOT / "jaxlm").rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        if name in LEFT_OUT:
            continue
        for _, cls in inspect.getmembers(importlib.import_module(name), inspect.isclass):
            if cls.__module__ == name and dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen:
                found[f"{name}.{cls.__qualname__}"] = cls
    return found


CLASSES = frozen_dataclasses()


@pytest.mark.parametrize("name", CLASSES)
def test_defaults_fit_their_annotations(name):
    annotations = typing.get_type_hints(CLASSES[name])
    for field in dataclasses.fields(CLASSES[name]):
        if field.default is not dataclasses.MISSING:
            typed.fit(field.default, annotations[field.name])


@pytest.mark.parametrize("name", sorted(set(CLASSES) - NOT_CONFIGURED))
def test_no_configuration_hides_in_a_default(name):
    """A nested configuration is required or None: gin binds what a file refers to, never what a class made itself."""
    for field in dataclasses.fields(CLASSES[name]):
        made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        hidden = dataclasses.is_dataclass(made) and not isinstance(made, type)
        assert not hidden, f"{name}.{field.name} defaults to a {type(made).__name__}; make it None or required"
