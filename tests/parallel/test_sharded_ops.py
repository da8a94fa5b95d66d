"""Attention on a mesh is attention on one device, forward and backward, and moves no queries."""

import json

import pytest


@pytest.fixture(scope="module")
def answer(run_python):
    output = run_python(["tests/parallel/sharded_attention_program.py"], devices=8).stdout
    return json.loads(output.strip().splitlines()[-1])


def test_a_mesh_gives_what_one_device_gives(answer):
    for name, errors in answer["errors"].items():
        assert len(errors) >= 4 and max(errors) < 1e-5, (name, errors)
    assert answer["alibi"] < 1e-6


def test_kernels_bring_no_all_gather(answer):
    assert answer["gathers"] == 0
