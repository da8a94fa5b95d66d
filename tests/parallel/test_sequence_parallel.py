"""Rows split along their length: the results of one device, and no more traffic than keys need."""

import json

import pytest


@pytest.fixture(scope="module")
def answer(run_python):
    output = run_python(["tests/parallel/sequence_program.py"], devices=8, timeout=600).stdout
    return json.loads(output.strip().splitlines()[-1])


def test_split_rows_give_what_whole_rows_give(answer):
    """Values and gradients of q, k, v, the bias table and sinks (law 3)."""
    assert len(answer["errors"]) == 10
    for name, errors in answer["errors"].items():
        assert len(errors) == 6 and max(errors) < 1e-5, (name, errors)


def test_keys_go_round_and_nothing_is_gathered(answer):
    found = answer["traffic"]["ring"]
    assert found["collective-permute"] > 0
    assert found["all-gather"] == found["reduce-scatter"] == found["all-to-all"] == 0, found


def test_gathering_gathers_keys_alone(answer):
    """Of 8 query heads and 2 key heads over 2 devices, arrays [2, 1024, 1, 8] of keys and of values travel."""
    found = answer["traffic"]["all_gather"]
    assert found["collective-permute"] == found["all-to-all"] == 0, found
    assert found["gathered"] and all(shape == "2,1024,1,8" for _, shape in found["gathered"]), found


def test_few_keys_are_gathered_unless_a_window_keeps_them_near(answer):
    assert answer["chosen"] == {"few": ["all_gather"], "many": ["ppermute"], "few, window": ["ppermute"]}


def test_no_array_of_scores_exists(answer):
    assert not answer["traffic"]["ring"]["scores"] and not answer["traffic"]["all_gather"]["scores"]


def test_what_cannot_be_split_is_one_sentence(answer):
    said = answer["refusals"]
    assert said["dense mask"].startswith("The mask Dense, which is not made of key intervals, cannot be split along")
    assert said["dense bias"].startswith("A bias given as an array (use RelativeBias or AlibiBias) cannot be split")
    assert said["blocks"].startswith("BlockSparse.block=(16, 16), whose sides do not divide the runs of [8, 8] tokens")
    assert said["no log-sum-exp"].startswith("splash cannot: the log-sum-exp")


def test_models_give_the_same_losses_metrics_and_gradients(run_python):
    """Every architecture and the objectives that look at neighbours, with dropout and metrics by data set."""
    output = run_python(["tests/parallel/sequence_models_program.py"], devices=8, timeout=600).stdout
    answer = json.loads(output.strip().splitlines()[-1])
    assert len(answer) == 4
    for name, found in answer.items():
        assert found["values"] < 1e-5 and found["gradients"] < 1e-5, (name, found)
