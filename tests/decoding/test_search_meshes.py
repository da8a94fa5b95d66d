"""Beams and speculative texts are the same on a mesh as on one device."""

import json

import numpy as np
import pytest


@pytest.mark.full
def test_searches_on_a_mesh_are_those_on_one_device(run_python):
    answers = json.loads(run_python(["tests/decoding/search_mesh_program.py"], devices=8).stdout.splitlines()[-1])
    assert answers["split"] > 5
    assert answers["mesh"]["beams"] == answers["one"]["beams"]
    assert answers["mesh"]["drawn"] == answers["one"]["drawn"]
    np.testing.assert_allclose(answers["mesh"]["scores"], answers["one"]["scores"], rtol=1e-5)
