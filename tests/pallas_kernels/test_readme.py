"""The README's examples run as they stand, and its table is what the backends answer."""

import pathlib
import re

import pallas_kernels.attention
from pallas_kernels import support
from pallas_kernels.attention_backends import ATTENTION


def test_examples_run_in_order(monkeypatch, capsys):
    monkeypatch.setattr(ATTENTION, "backends", dict(ATTENTION.backends))
    namespace = {}
    examples = re.findall(r"```python\n(.*?)```", support.README.read_text(), re.DOTALL)
    assert len(examples) == 4
    for number, code in enumerate(examples):
        exec(compile(code, f"README.md, example {number}", "exec"), namespace)
    said = capsys.readouterr().out.strip()
    promised = re.search(r"prints `(.*?) \.\.\.`", support.README.read_text(), re.DOTALL)[1].replace("\n", " ")
    assert said.startswith(promised.removesuffix(","))


def test_the_table_is_what_the_backends_answer():
    text = support.README.read_text()
    assert support.in_readme(text) == text, "run python -m pallas_kernels.support --update"
    assert support.table() in text


def test_every_backend_is_described():
    text = support.README.read_text()
    for name in ATTENTION.backends:
        assert f"\n| `{name}` |" in text
    modules = pathlib.Path(pallas_kernels.attention.__file__).parent
    for name in re.findall(r"`(\w+\.py)`", text):
        assert (modules / name).is_file()
