"""The resolved text is complete: it is a gin file that makes the same configuration, and the same text, again."""

import dataclasses
import functools
import sys

import pytest

from jaxlm.configuration import ConfigError, diff_from_defaults, digest, resolve, resolve_text, resolved_text

zoo = sys.modules["zoo"]

CONFIGS = {
    "plain": zoo.Run(model=zoo.Model(32), steps=1),
    "everything": zoo.Run(
        model=zoo.Model(
            32, blocks=(zoo.Block(), zoo.Block(4), zoo.Block(4), zoo.Block()), kind=zoo.Kind.PREFIX, norm=zoo.Block(4)
        ),
        steps=10**12,
        rate=zoo.Piece((1e-5, float("-inf"), 0.1)),
        folder='it\'s "quoted"\n\\ Größe',
        lengths={"inputs": 1, "a.b": 2},
        pair=(-1, 1e300),
        function=functools.partial(zoo.scaled, factor=3.0),
        resume=False,
        limit=0,
    ),
    "function": zoo.Run(model=zoo.Model(1), steps=1, function=zoo.relu),
    "nested": zoo.Holder({"a.b": zoo.Block(1), "a_b": zoo.Block(2), "c": (zoo.Holder(zoo.Block(3)),)}),
    "long": zoo.Holder(tuple(f"a name that takes some room {i}" for i in range(9))),
    "same class inside": zoo.Holder(zoo.Holder(zoo.Holder((None, True, [])))),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_text_makes_the_configuration_again(gin_file, name):
    config = CONFIGS[name]
    text = resolved_text(config)
    again = resolve(type(config), [f"--gin_file={gin_file(text, header='')}"])
    assert repr(again) == repr(config)
    assert resolved_text(again) == text
    assert repr(resolve_text(text)) == repr(config), "the text says of what class it is"


def test_text_is_complete_and_readable():
    assert resolved_text(CONFIGS["everything"]).startswith("from __gin__ import dynamic_registration\nimport zoo\n")
    model = zoo.Model(32, blocks=(zoo.Block(), zoo.Block(4), zoo.Block()))
    assert (
        resolved_text(model)
        == """\
from __gin__ import dynamic_registration
import zoo

zoo.Model:
    vocabulary_size = 32
    blocks = (@blocks_0/zoo.Block(), @blocks_1/zoo.Block(), @blocks_0/zoo.Block())
    kind = 'causal'
    norm = None

blocks_0/zoo.Block:
    width = 8
    dropout = 0.0
    activation = 'gelu'

blocks_1/zoo.Block:
    width = 4
    dropout = 0.0
    activation = 'gelu'
"""
    )


def test_a_digest_outlives_new_fields_that_are_none():
    older = dataclasses.make_dataclass(
        "Model",
        [("vocabulary_size", int), ("blocks", tuple), ("kind", zoo.Kind)],
        frozen=True,
        module="zoo",
    )
    assert resolved_text(older(32, (), zoo.Kind.CAUSAL)) != resolved_text(zoo.Model(32))
    assert digest(older(32, (), zoo.Kind.CAUSAL)) == digest(zoo.Model(32)) == digest(zoo.Model(32))
    empty = dataclasses.make_dataclass("Block", [], frozen=True, module="zoo")
    first = dataclasses.make_dataclass("Block", [("width", int | None, None)], frozen=True, module="zoo")
    assert digest(zoo.Holder(empty())) == digest(zoo.Holder(first())) != digest(zoo.Holder(first(8)))
    others = zoo.Model(33), zoo.Model(32, norm=zoo.Block()), zoo.Model(32, blocks=(zoo.Block(),))
    assert len({digest(model) for model in (zoo.Model(32), *others)} | {digest(zoo.Model(32), "more")}) == 5


def test_what_cannot_be_written_is_refused():
    with pytest.raises(ConfigError, match=r"thing is <.*Opaque.*cannot be written as a configuration"):
        resolved_text(zoo.Holder(zoo.Opaque()))
    with pytest.raises(ConfigError, match="thing is nan"):
        resolved_text(zoo.Holder(float("nan")))


def test_diff_from_defaults():
    assert diff_from_defaults(CONFIGS["plain"]) == "model = Model\nmodel.vocabulary_size = 32\nsteps = 1\n"
    blocks = (zoo.Block(4), zoo.Block(4), zoo.Block(4), zoo.Block())
    config = zoo.Run(
        model=zoo.Model(32, blocks=blocks, kind=zoo.Kind.PREFIX), steps=1, rate=1, default_block=zoo.Block(dropout=0.5)
    )
    assert diff_from_defaults(config) == (
        "model = Model\n"
        "model.vocabulary_size = 32\n"
        "model.blocks[0..2] = Block\n"
        "model.blocks[0..2].width = 4  # 8\n"
        "model.blocks[3] = Block\n"
        "model.kind = 'prefix'  # 'causal'\n"
        "steps = 1\n"
        "rate = 1  # 0.1\n"
        "default_block.dropout = 0.5  # 0.0\n"
    )
