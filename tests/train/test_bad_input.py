"""Law 8: bad input gives one clear sentence with the remedy and a non-zero exit, before compiling; nothing is lost."""

import dataclasses
import gzip
import hashlib
import re
import shutil
import subprocess
import sys

import pytest

from jaxlm import train
from jaxlm.checkpoints import stored
from jaxlm.configuration import resolve
from jaxlm.exit_status import ExitStatus
from jaxlm.run import Programs, RunConfig, check_phases
from jaxlm.training.compiles import CompileCounter

PAIR = "TASK_FEATURE_LENGTHS={'inputs': 24, 'targets': 8}"
STAGE = "run.RunConfig.stages = (@first/stages.Stage(), @second/stages.Stage())\nfirst/stages.Stage.steps = 6\n"
STAGES = {"imports": ("run", "training.stages")}

# What is in the corpus: {file: bytes}.
CORPORA = {
    "nothing": ({}, "No text at .*corpus.*nothing is there; give a folder, file or glob"),
    "other kinds": ({"a.docx": b"PK"}, "none of the 1 files there is of a known kind; give"),
    "empty file": ({"a.txt": b""}, "train split of task 'files' has no text in it .*a.txt.*; name files that have"),
    "not UTF-8": ({"a.txt": b"caf\xe9 " * 400}, "a.txt is not UTF-8 .*; convert it .iconv"),
    "torn gzip": ({"a.txt.gz": gzip.compress(bytes(4000))[:-9]}, "a.txt.gz cannot be read .*; repair it or leave"),
    "no parquet": ({"a.parquet": b"PAR1, not"}, "a.parquet is not a readable parquet file .*; write it again"),
    "no JSON": (
        {"a.jsonl": b'{"text": "a"}\n{"text": \n'},
        "a.jsonl has a line at byte 14 that is not JSON .*; it needs",
    ),
    "no field": ({"a.jsonl": b'{"body": "a"}\n' * 50}, "no field 'text' in a record with the fields body; name one"),
}

# (what `Workshop.gin` is given, bindings on the command line, exit status, the sentence)
CONFIGURATIONS = {
    "unknown name": ({}, ["TRAIN_STEP=5"], 2, "no gin file has a macro TRAIN_STEP; did you mean 'TRAIN_STEPS'"),
    "unknown parameter": (
        {},
        ["BlockConfig.droput=1"],
        2,
        "BlockConfig has no parameter 'droput'; did you mean 'dropout'",
    ),
    "unknown in a file": (
        {"text": "layers.BlockConfig.droput = 0.1", "imports": ("layers",)},
        *([], 2, r"configuration.gin:\d+: BlockConfig has no parameter 'droput'; did you mean"),
    ),
    "wrong type": ({}, ["TRAIN_STEPS=many"], 2, "RunConfig.train_steps expects int, got 'many'"),
    "no steps": ({}, ["TRAIN_STEPS=0"], 2, "RunConfig.train_steps is 0; it must be at least 1"),
    "masked_lm, causal": ({"objective": "masked_lm"}, [], 2, "masked_lm .* not causal_decoder; use span_corruption"),
    "full_lm, encoder": ({"model": "encoder"}, [], 2, "full_lm writes its targets .* an encoder cannot; use masked_lm"),
    "multi_token, prefix": (
        {"model": "prefix_decoder", "objective": "multi_token"},
        *([], 2, "multi_token predicts tokens that a prefix_decoder sees .*; use causal_decoder"),
    ),
    "multi_token without heads": ({"objective": "multi_token"}, [], 2, "4 tokens but the model has 0 heads; make"),
    "detection without detector": (
        {"model": "encoder", "objective": "replaced_token_detection"},
        *([], 2, "wants a generator and a discriminator; give it a ReplacedTokenDetectorConfig"),
    ),
    "masked_lm, detector": (
        {"model": "replaced_token_detector", "objective": "masked_lm"},
        *([], 2, "this model is a replaced-token detector; use replaced_token_detection"),
    ),
    "detection without generator": (
        {"model": "replaced_token_detector", "objective": "replaced_token_detection"},
        *(
            ["ReplacedTokenDetection.generator=uniform"],
            2,
            "generator UNIFORM but the model has one; make the two agree",
        ),
    ),
    "row too short": (
        {"objective": "span_corruption"},
        *(["TASK_FEATURE_LENGTHS={'inputs': 1, 'targets': 1}"], 1),
        "span_corruption cannot fill rows of .* for causal_decoder; the smallest have 3 inputs and 3 targets",
    ),
    "no length": (
        {"model": "encoder_decoder", "objective": "span_corruption"},
        *([], 1, "do not make a row for the encoder_decoder; give a positive length for inputs and targets"),
    ),
    "missing special tokens": (
        {
            "text": "vocabularies.ByteVocabulary.named_tokens = ()",
            "imports": ("data.vocabularies",),
            "objective": "ul2",
        },
        *([PAIR.replace("24", "64").replace("8", "64")], 1, r"needs the special token '\[.\]', .*; add it with"),
    ),
    "pairs wanted": (
        {"objective": "supervised"},
        [PAIR],
        1,
        "needs examples with inputs and targets, .*; choose a data set",
    ),
    "small vocabulary": ({}, ["VOCAB_SIZE=200"], 1, "has 370 ids, but the model only 200; set .* to at least 370"),
    "few positions": (
        {
            "text": "layers.EmbeddingConfig.positions = @layers.LearnedPositions()\n"
            "layers.LearnedPositions.max_length = 16",
            "imports": ("layers",),
        },
        *([], 1, "Rows have 32 tokens, but .* learned positions for 16; shorten"),
    ),
    "mesh": ({}, ["mesh.MeshConfig.fsdp=3"], 1, "does not divide the 1 devices; choose degrees"),
    "microbatches": ({}, ["StepConfig.microbatches=3"], 2, "8 rows cannot be cut into 3 equal microbatches; choose"),
    "a seed of the step": ({}, ["StepConfig.seed=5"], 1, "StepConfig.seed is 5, but .* by RunConfig.seed, 0; set that"),
    "stages that do not add up": (
        {"text": STAGE + "second/stages.Stage.steps = 5", **STAGES},
        *([], 2, r"The stages have 6 \+ 5 steps, which do not add up to train_steps = 12"),
    ),
    "a bad last stage": (
        {"text": STAGE + "second/stages.Stage.steps = 6\nsecond/stages.Stage.data = 'c4'", **STAGES},
        *([], 1, "There is no task or mixture named 'c4'; nearest are"),
    ),
    "a bad optimizer of the last stage": (
        {"text": STAGE + "second/stages.Stage.steps = 6\nsecond/stages.Stage.freeze = ('encodr',)", **STAGES},
        *([], 1, "The parameter pattern 'encodr' matches none of the model's"),
    ),
    "an illegal last stage": (
        {"text": STAGE + "second/stages.Stage.steps = 6\nsecond/stages.Stage.architecture = 'encoder'", **STAGES},
        *([], 2, "full_lm writes its targets .* an encoder cannot; use masked_lm"),
    ),
}


@pytest.fixture
def refused(workshop, capsys):
    """A function (run's folder, gin file, bindings): (exit status, its one line of error). Nothing may be compiled."""

    def refuse(run, gin, *bindings, profile=None):
        flags = [] if profile is None else [f"--profile={profile}"]
        capsys.readouterr()
        with CompileCounter() as compiles:
            try:
                status = train.main([*workshop.arguments(run, gin, *bindings), *flags])
            except SystemExit as ended:
                status = ended.code
        assert not compiles.names
        error = capsys.readouterr().err
        assert error.endswith(".\n") or error.endswith("?\n")
        assert error.count("\n") == 1, error
        return status, error

    return refuse


@pytest.mark.parametrize("name", CORPORA)
def test_corpus(name, workshop, refused, tmp_path):
    contents, sentence = CORPORA[name]
    corpus = tmp_path / "corpus"
    for file, data in contents.items():
        corpus.mkdir(exist_ok=True)
        (corpus / file).write_bytes(data)
    status, error = refused(tmp_path / "run", workshop.gin("plain"), f"FILES='{corpus}'")
    assert status == 1 and matches(sentence, error)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_configuration(name, workshop, refused, tmp_path):
    options, bindings, expected, sentence = CONFIGURATIONS[name]
    status, error = refused(tmp_path / "run", workshop.gin("configuration", **options), *bindings)
    assert status == expected and matches(sentence, error), error
    assert not (tmp_path / "run").exists()


def test_baselines_without_evaluation(workshop):
    """Before training, not when its report is written."""
    run = resolve(RunConfig, workshop.arguments("baselines", workshop.gin("baselines")))
    run = dataclasses.replace(run, baselines=True, evaluation=None)
    with pytest.raises(ValueError, match="baselines are scored on .*, but evaluation is None; give it"):
        check_phases(run, run.parallel.on(), Programs())


def matches(sentence, error):
    return re.search(sentence, error)


@pytest.fixture(scope="module")
def done(workshop):
    """A run of 4 steps: (gin file, folder)."""
    gin = workshop.gin("done", "TRAIN_STEPS = 4\nEVAL_PERIOD = 4\nCHECKPOINT_PERIOD = 2")
    return gin, workshop.train("done", gin)


def digests(folder):
    """What a folder holds, bit by bit."""
    return {path: hashlib.sha256(path.read_bytes()).digest() for path in folder.rglob("*") if path.is_file()}


OTHERS = {
    "another model": (["WIDTH=64"], "belongs to another run: its model differs .*; give this run another folder"),
    "another vocabulary": (
        ["ByteVocabulary.extra_ids=90"],
        "belongs to another run: its data and vocabulary differ .*; give this run",
    ),
    "another seed": (["RANDOM_SEED=1"], "belongs to another run: its seed differs .*; give this run another folder"),
    "another objective": (
        ["OBJECTIVE=@prefix_lm.PrefixLM()"],
        "belongs to another run: its objective differs .*; give this run another folder",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_runs_folder(name, done, workshop, refused):
    """Its checkpoints, records and configuration stay as they are."""
    bindings, sentence = OTHERS[name]
    _, folder = done
    before = digests(folder)
    gin = workshop.gin(
        "other", "TRAIN_STEPS = 6\nEVAL_PERIOD = 4\nCHECKPOINT_PERIOD = 2", imports=("objectives.prefix_lm",)
    )
    status, error = refused(folder, gin, *bindings)
    assert status == 1 and matches(sentence, error), error
    assert digests(folder) == before


def test_no_runs_folder(done, workshop, refused, tmp_path):
    gin, _ = done
    (tmp_path / "thesis.tex").write_text("years of work")
    status, error = refused(tmp_path, gin)
    assert status == 1 and "has files (thesis.tex, ...) but no run.json" in error
    status, error = refused(tmp_path / "thesis.tex", gin)
    assert status == 1 and "is a file; a run needs a folder of its own" in error
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_the_corpus_changed(workshop, capsys):
    """The saved position is of another text, and a resumed run would not read what it would have read."""
    corpus = workshop.folder / "changing"
    shutil.copytree(workshop.corpus, corpus)
    gin = workshop.gin("changing", "TRAIN_STEPS = 2")
    workshop.train("changed", gin, f"FILES='{corpus}'")
    (corpus / "a.txt").write_text("something new. " * 300)
    before = digests(workshop.folder / "changed" / "checkpoints")
    arguments = workshop.arguments("changed", gin, f"FILES='{corpus}'", "TRAIN_STEPS=4")
    assert train.main(arguments) == 1
    error = capsys.readouterr().err
    assert matches("position is of a run with other files, .*; go on with that run's settings, or start", error), error
    assert error.count("\n") == 1
    assert digests(workshop.folder / "changed" / "checkpoints") == before


def test_damaged_checkpoints(done, workshop, refused):
    """No checkpoint is intact: nothing is trained anew over them."""
    gin, folder = done
    run = workshop.rewound(folder, 4, "damaged")
    for array in (run / "checkpoints").rglob("d/*"):
        data = bytearray(array.read_bytes())
        data[len(data) // 2] ^= 1
        array.write_bytes(data)
    before = digests(run / "checkpoints")
    status, error = refused(run, gin, "TRAIN_STEPS=6")
    assert status == 1 and "checkpoint" in error
    assert digests(run / "checkpoints") == before


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "warm_start.WarmStart.path = '/nonexistent'",
            "no checkpoint to start from in /nonexistent; give a run's folder",
        ),
        (
            "warm_start.WarmStart.path = '{folder}'\nVOCAB_SIZE = 512",
            r"shape \[384, 32\], but .* \[512, 32\].*vocabular.*; drop",
        ),
    ],
    ids=["nowhere", "another vocabulary"],
)
def test_warm_start(text, sentence, done, workshop, capsys, tmp_path):
    """Compiles the initialisation, whose arrays the checkpoint should fill, and no more."""
    _, folder = done
    gin = workshop.gin(
        "warm",
        "run.RunConfig.warm_start = @warm_start.WarmStart()\n" + text.format(folder=folder),
        imports=("run", "checkpoints.warm_start"),
    )
    before = digests(folder)
    assert train.main(workshop.arguments(tmp_path / "run", gin)) == 1
    error = capsys.readouterr().err
    assert matches(sentence, error) and error.count("\n") == 1, error
    assert digests(folder) == before and stored.open_latest(tmp_path / "run" / "checkpoints") is None


def test_the_process_says_it_too(workshop, repository):
    """Not only `main`: the process has the status, one line on its standard error, and no traceback."""
    command = [
        sys.executable,
        "-m",
        "jaxlm.train",
        *workshop.arguments("spoken", workshop.gin("plain"), "VOCAB_SIZE=9"),
    ]
    result = subprocess.run(command, cwd=repository, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("jaxlm.train: The vocabulary has 370 ids") and result.stderr.count("\n") == 1


def test_a_bad_range_of_steps_to_profile(workshop, refused, tmp_path):
    status, error = refused(tmp_path / "run", workshop.gin("plain"), profile="5-3")
    assert status == 1 and "A profile of steps 5 to 3 cannot be made" in error
    assert not (tmp_path / "run").exists()


def test_diverged(workshop, capsys):
    """A loss that is not finite ends the run; the last checkpoint is from before."""
    arguments = workshop.arguments("diverged", workshop.gin("plain"), "LEARNING_RATE=1e38")
    assert train.main(arguments) == ExitStatus.DIVERGED == 4
    error = capsys.readouterr().err
    assert matches(r"Training diverged at step \d+: .*; continue from the last checkpoint with", error)
    assert stored.open_latest(workshop.folder / "diverged" / "checkpoints") is None
