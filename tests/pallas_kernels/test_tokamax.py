"""The adapter to tokamax, with tokamax's own reference in place of its GPU kernel; skipped without tokamax."""

import jax.numpy as jnp
import pytest

from pallas_kernels import conformance, masks, platforms
from pallas_kernels.attention import UnsupportedAttention, attention
from pallas_kernels.attention_backends import ATTENTION
from pallas_kernels.backends import tokamax


def test_absent_or_of_another_version_it_says_what_to_install(monkeypatch):
    x = jnp.ones((1, 4, 1, 8), jnp.bfloat16)
    for version, message in [
        (None, r"tokamax is not installed \(pip install tokamax==0.0.17\)"),
        ("0.0.13", "tokamax 0.0.13 is installed, and what is known is 0.0.17"),
    ]:
        monkeypatch.setattr(tokamax, "_version", lambda version=version: version)
        with pytest.raises(UnsupportedAttention, match=message):
            attention(x, x, x, mask=masks.Full(), backend="tokamax")


@pytest.mark.parametrize("name", ["full", "causal", "packed prefix", "chunks, lengths", "multi-query", "dense bias"])
def test_conformance_of_the_translation(name, monkeypatch):
    base = pytest.importorskip("tokamax._src.ops.attention.base", reason="needs tokamax: pip install -e '.[tokamax]'")

    class OnThisMachine(tokamax.TokamaxBackend):
        def refuses(self, request):
            return []

    monkeypatch.setattr(tokamax, "_kernel", base.DotProductAttention)
    monkeypatch.setitem(ATTENTION.backends, "tokamax", conformance.WithReferenceLse(OnThisMachine()))
    assert platforms.current().kind == "cpu"
    conformance.check("tokamax", name, jnp.float32)
