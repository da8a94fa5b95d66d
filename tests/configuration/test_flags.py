"""Flags of an entry point are taken out of its command line; the rest is gin's."""

from jaxlm.configuration import take_flags


def test_flags_are_taken_in_both_forms():
    arguments = ["--gin_file=a.gin", "--topology", "v5e:4x4", "--search", "--save=x", "--gin.topology=1", "topology"]
    flags, rest = take_flags([*arguments, "--save=y"], ("topology", "save"), switches=("search",))
    assert flags == {"topology": "v5e:4x4", "search": "", "save": "y"}
    assert rest == ["--gin_file=a.gin", "--gin.topology=1", "topology"]
    assert take_flags(["--search=3"], (), switches=("search",)) == ({"search": "3"}, [])
    assert take_flags(["--save"], ("save",)) == ({"save": ""}, [])
