"""Flags of an entry point are taken out of its command line; the rest is gin's."""

import pytest

from jaxlm.configuration import take_flags


def test_flags_are_taken_in_both_forms():
    arguments = ["--gin_file=a.gin", "--topology", "v5e:4x4", "--search", "--save=x", "--gin.topology=1", "topology"]
    options = {"switches": ("fast",), "optional": ("search",)}
    flags, rest = take_flags([*arguments, "--save=y", "--fast"], ("topology", "save"), **options)
    assert flags == {"topology": "v5e:4x4", "search": "", "save": "y", "fast": ""}
    assert rest == ["--gin_file=a.gin", "--gin.topology=1", "topology"]
    assert take_flags(["--search=3"], (), **options) == ({"search": "3"}, [])
    assert take_flags(["--save"], ("save",)) == ({"save": ""}, [])


def test_a_switch_takes_no_value(capsys):
    """`--averaged=false` would otherwise switch on what it means to switch off."""
    for argument in ("--fast=false", "--fast=1", "--fast="):
        with pytest.raises(SystemExit) as stopped:
            take_flags([argument], (), switches=("fast",))
        assert stopped.value.code == 2
        assert (
            capsys.readouterr().err
            == f"configuration error: {argument}: --fast takes no value; give it alone, or not.\n"
        )
