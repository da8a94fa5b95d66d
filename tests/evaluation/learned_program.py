"""Prints, as JSON, a trial and a probe's features on one device, and on two that share parameters and examples out.

python learned_program.py FOLDER    # with rows as test_learned.py writes them
"""

import dataclasses
import functools
import json
import sys

import jax
import numpy as np

from jaxlm.architecture import Architecture
from jaxlm.evaluation.finetuning import FinetuningSweep, run_trial
from jaxlm.evaluation.labelled import LabelledRows, SentenceSimilarity
from jaxlm.evaluation.learned import features_program
from jaxlm.parallel.mesh import MeshConfig
from jaxlm.parallel.parallelism import ParallelConfig
from tests.evaluation.test_learned import opened_model

rows = LabelledRows(sys.argv[1], train="train.jsonl", validation="validation.jsonl", test="test.jsonl")
kind = SentenceSimilarity(rows, first="{{ text }}", second="{{ other }}", high=5.0)
sweep = FinetuningSweep("t", kind, batch_size=8, epochs=0.5)
model = opened_model(Architecture.ENCODER)
found = {}
for name, mesh, count in (("one", MeshConfig(), 1), ("two", MeshConfig(fsdp=2), 2)):
    opened = sweep.opened(model, ParallelConfig(mesh).on(jax.devices()[:count]))
    read = features_program(dataclasses.replace(opened.form, head_size=None))
    features = opened.everything("test", functools.partial(read, {"body": opened.body}))
    trial, _ = run_trial(sweep, opened, {"body": opened.body}, 1e-3, 0)
    found[name] = {"features": np.asarray(features)[:5].tolist(), "pearson": trial.test["pearson"]}
print(json.dumps(found))
