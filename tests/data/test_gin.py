"""The shipped data files make loaders: one line of gin for any corpus."""

import json

import numpy as np
import pytest

from jaxlm.architecture import Architecture
from jaxlm.configuration import ConfigError, resolve
from jaxlm.data.loader import build_loader
from jaxlm.objectives.full_lm import FullLM
from jaxlm.objectives.supervised import Supervised


def load(file, *bindings, objective=None):
    flags = [f"--gin.{binding}" for binding in bindings]
    config = resolve("%DATA", [f"--gin_file=gin_configs/data/{file}.gin", *flags])
    loader = build_loader(
        config, objective=objective or FullLM(), architecture=Architecture.CAUSAL_DECODER, batch_size=2
    )
    batch = next(loader)
    loader.close()
    return loader, batch


def test_files_by_one_line(tmp_path):
    (tmp_path / "a.md").write_text("a text of some length " * 100)
    loader, batch = load("files", f"FILES='{tmp_path}'", "TASK_FEATURE_LENGTHS={'targets': 64}")
    assert batch["decoder_target_tokens"].shape == (2, 64)
    assert "text of some" in loader.vocabulary.decode(batch["decoder_target_tokens"][0])


def test_pairs_by_one_line(tmp_path):
    rows = [{"question": "why?", "answer": "because"}] * 50
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    lines = (f"FILES='{tmp_path}/*.jsonl'", "INPUTS_FIELD='question'", "TARGETS_FIELD='answer'")
    loader, batch = load("pairs", *lines, "VALIDATION_FILES='unused'", objective=Supervised())
    assert loader.vocabulary.decode(batch["decoder_target_tokens"][0][:11]) == "why?because"
    assert loader.density["pairs"] > 0.4  # fifty short pairs in one row of 1280


def test_text_without_what_evaluation_data_have(tmp_path):
    """A preprocessor is one line; a long text loses the passage alone."""
    words = "one two three four five six seven eight nine ten eleven twelve thirteen"
    text = "A quiet street. " * 50 + words + " and so on. " * 50
    (tmp_path / "book.jsonl").write_text(json.dumps({"text": text}))
    (tmp_path / "eval.jsonl").write_text(json.dumps({"q": words}))
    (tmp_path / "clean.gin").write_text(
        "from __gin__ import dynamic_registration\n"
        "from jaxlm.data import decontamination\n"
        "from jaxlm.data import tasks\n"
        "from jaxlm.evaluation import tasks as evaluation_tasks\n"
        "include 'gin_configs/data/files.gin'\n"
        f"FILES = '{tmp_path}/book.jsonl'\n"
        "VALIDATION_FILES = 'unused'\n"
        "tasks.text_task.preprocessors = [@decontamination.Decontaminate()]\n"
        "decontamination.Decontaminate.against = {'mine': @evaluation_tasks.rows_in()}\n"
        "decontamination.Decontaminate.windows = @decontamination.Windows()\n"
        f"evaluation_tasks.rows_in.folder = '{tmp_path}'\n"
        "evaluation_tasks.rows_in.validation = 'eval.jsonl'\n"
    )
    task = resolve("%DATA", [f"--gin_file={tmp_path / 'clean.gin'}"]).mixture
    (shard,) = task.source.shards("train")
    kept = [record["targets"] for record in task.texts(task.source.read(shard))]
    at = text.index(words)
    assert kept == [text[: at - 200], text[at + len(words) + 200 :]]


TEMPLATES = """
dataset: mine
templates:
  a: !Template
    answer_choices: no ||| yes
    jinja: '{{ text }}? ||| {{ answer_choices[label] }}'
    metadata: !TemplateMetadata
      original_task: true
    name: ask
"""


def test_prompted_pairs_without_evaluation_data(tmp_path):
    """Rows by promptsource's templates, less what evaluation data have."""
    words = "one two three four five six seven eight nine ten eleven twelve thirteen"
    rows = [{"text": words if i % 2 else "fine", "label": i % 2} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "eval.jsonl").write_text(json.dumps({"q": words}))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "templates.yaml").write_text(TEMPLATES)
    (tmp_path / "clean.gin").write_text(
        "from __gin__ import dynamic_registration\n"
        "from jaxlm.data import decontamination\n"
        "from jaxlm.data import sources\n"
        "include 'gin_configs/data/prompted.gin'\n"
        "DECONTAMINATE = @decontamination.Decontaminate()\n"
        "decontamination.Decontaminate.against = {'mine': @evaluation/sources.TextFiles()}\n"
        "decontamination.Decontaminate.split = 'train'\n"
        f"evaluation/sources.TextFiles.pattern = '{tmp_path}/eval.jsonl'\n"
        "evaluation/sources.TextFiles.held_out = 0.0\n"
    )
    flags = [f"FILES='{tmp_path}/rows.jsonl'", f"TEMPLATES='{tmp_path}'", "DATASET='mine'"]
    flags += ["sources.TextFiles.held_out=0.0", "TASK_FEATURE_LENGTHS={'inputs': 512, 'targets': 64}"]

    def questions(file):
        config = resolve("%DATA", [f"--gin_file={file}", *(f"--gin.{flag}" for flag in flags)])
        (task,) = config.mixture.tasks()
        assert task.name == "mine/ask"
        source = task.source
        return {pair["inputs"] for shard in source.shards("train") for pair in task.texts(source.read(shard))}

    assert questions("gin_configs/data/prompted.gin") == {f"{words}?", "fine?"}
    assert questions(tmp_path / "clean.gin") == {"fine?"}


def test_the_default_corpus_also_by_its_registered_name():
    loader, batch = load("stdlib")
    _, same = load("registered", "MIXTURE_OR_TASK_NAME='python_stdlib'")
    assert loader.dataset_names == ("python_stdlib",)
    assert batch["decoder_loss_weights"].all()
    np.testing.assert_array_equal(batch["decoder_target_tokens"], same["decoder_target_tokens"])
    with pytest.raises(ConfigError, match="value is required"):
        load("registered")
