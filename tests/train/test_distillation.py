"""Runs with a teacher: the student moves towards it and goes on after a stop; what cannot teach is refused."""

import pytest

from jaxlm import train

RUN = "run.RunConfig.samples = None\nEVAL_PERIOD = 0\nWIDTH = 16\nHIDDEN = 32\nNUM_LAYERS = 1\nTRAIN_STEPS = 8\n"
TAUGHT = (
    "TASK_FEATURE_LENGTHS = {{'inputs': 16, 'targets': 16}}\nDISTILLATION = @base.Distillation()\n"
    "base.Distillation.teacher = '{teacher}'\nbase.Distillation.temperature = 2.0\n"
)
IMPORTS = ("run", "objectives.base")


@pytest.fixture(scope="module")
def teacher(workshop):
    return workshop.train("teacher", workshop.gin("teacher", RUN + "TRAIN_STEPS = 30\n", imports=IMPORTS))


@pytest.fixture(scope="module")
def student(workshop, teacher):
    """An encoder-decoder that a decoder teaches (T5Gemma, arXiv 2504.06225)."""
    text = RUN + TAUGHT.format(teacher=teacher)
    gin = workshop.gin("student", text, model="encoder_decoder", objective="prefix_lm", imports=IMPORTS)
    return gin, workshop.train("student", gin)


def test_a_student_moves_towards_its_teacher(student, metrics):
    found = metrics(student[1])
    divergence = [values["train/teacher_divergence"] for values in found.values()]
    assert divergence[-1] < divergence[0] and min(divergence) > 0
    for values in found.values():  # the teacher's share is the whole loss, temperature 2
        assert values["train/loss"] == pytest.approx(4.0 * values["train/teacher_divergence"], rel=1e-5)
        assert values["train/teacher_cross_entropy"] < values["train/cross_entropy"]


def test_a_stopped_student_goes_on(student, workshop, metrics):
    """Law 4: the teacher is read again, and the steps are as they were."""
    gin, whole = student
    folder = workshop.rewound(whole, 4, "again")
    workshop.train(folder, gin)
    assert metrics(folder) == metrics(whole)


@pytest.mark.parametrize(
    "bindings, message",
    [
        (["VOCAB_SIZE=512"], "has 384 ids and the student 512, but they must have the same; set VOCAB_SIZE to 384"),
        (["Distillation.teacher='/nowhere'"], "/nowhere"),
        (
            ["OBJECTIVE=@objectives.masked_lm.MaskedLM()", "MODEL=%ENCODER"],
            "cannot read what a student of architecture",
        ),
        (["ByteVocabulary.named_tokens=('[MASK]',)"], "was trained with another vocabulary than this run's"),
    ],
    ids=["ids", "path", "architecture", "vocabulary"],
)
def test_what_cannot_be_taught_is_one_sentence(bindings, message, student, workshop, capsys):
    gin, _ = student
    if "MODEL=%ENCODER" in bindings:
        text = RUN + TAUGHT.format(teacher=workshop.folder / "teacher")
        gin, bindings = workshop.gin("encoder", text, model="encoder", objective="masked_lm", imports=IMPORTS), []
    assert train.main(workshop.arguments("bad", gin, *bindings)) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
