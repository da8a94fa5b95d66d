"""Sums around a ring, and a gather's gradient, are what numpy says, on 8 devices."""

import json
import pathlib


def test_collectives_and_their_gradients(run_python):
    program = str(pathlib.Path(__file__).with_name("collectives_program.py"))
    answer = json.loads(run_python([program], devices=8).stdout.splitlines()[-1])
    assert len(answer) == 10
    assert max(answer.values()) < 1e-5, answer
