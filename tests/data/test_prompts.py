"""Templates give the questions that they say, and a row that they fail on is told from one they do not apply to."""

import dataclasses

import pytest

from jaxlm.data import prompts
from jaxlm.data.fingerprint import fingerprint
from jaxlm.data.prompts import Prompt, PromptsourceTemplates, Question, TemplateError

COPA = {"premise": "It rained.", "choice1": "Wet.", "choice2": "Dry.", "question": "effect", "label": 0}


def ask(prompt, row):
    (template,) = prompt.templates()
    return template.question(row)


def test_parts_of_a_prompt():
    prompt = Prompt(context="{{ premise }} So:", choices="[choice1, choice2]", gold="label")
    question = ask(prompt, COPA)
    assert question == Question(("It rained. So:",), ("Wet.", "Dry."), 0)
    assert question.pairs == (("It rained. So:", "Wet."), ("It rained. So:", "Dry."))
    assert question.right_answer == ("It rained. So:", "Wet.")
    partial = ask(
        Prompt(contexts="options", choices="[rest, rest]", gold="answer"),
        {"options": ["A", "B"], "rest": "c", "answer": "1"},
    )
    assert partial.pairs == (("A", "c"), ("B", "c")) and partial.gold == 1
    assert ask(Prompt(context="{{ c }}", answers="[word]"), {"c": "x", "word": "y"}).answers == ("y",)
    assert ask(Prompt(answers="text"), {"text": "abc"}).answers == ("abc",)


@pytest.mark.parametrize("label", [-1, "", None, 2])
def test_hidden_labels_are_no_gold(label):
    assert ask(Prompt(choices="[choice1, choice2]", gold="label"), COPA | {"label": label}).gold is None


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        (Prompt(context="{{ missing }}", answers="[premise]"), "'missing' is undefined"),
        (Prompt(choices="missing", gold="label"), "'missing' is not defined by the row"),
        (Prompt(choices="premise.upper()[1:3].x", gold="0"), "x' is not defined by the row"),
        (Prompt(choices="[label]", gold="0"), "not a list of texts"),
        (Prompt(contexts="[premise]", choices="[choice1, choice2]", gold="0"), "1 contexts for 2 choices"),
        (Prompt(context="{{ premise.__class__.__mro__ }}", answers="[premise]"), "unsafe"),
    ],
)
def test_what_fails_on_a_row(prompt, sentence):
    with pytest.raises(TemplateError, match=sentence):
        ask(prompt, COPA)


def test_a_mistake_in_a_template_is_found_before_any_row():
    with pytest.raises(ValueError, match="Prompt 'default' is not Jinja"):
        Prompt(context="{{ premise", answers="x").templates()
    with pytest.raises(ValueError, match="either choices or answers"):
        Prompt(context="x")
    with pytest.raises(ValueError, match="both context and contexts"):
        Prompt(context="x", contexts="y", choices="z")


YAML = """
dataset: super_glue
subset: copa
templates:
  a: !Template
    answer_choices: '{{choice1}} ||| {{choice2}}'
    id: a
    jinja: '{% if question == "effect" %} {{ premise }} So? ||| {% if label != -1 %}{{ answer_choices[label]
      }}{% endif %}{% endif %}'
    metadata: !TemplateMetadata
      original_task: true
    name: so
    reference: ''
  b: !Template
    answer_choices: null
    id: b
    jinja: 'Rhyme: {{ ["one", "two", "three"] | choice }} ||| {{ premise }}'
    metadata: !TemplateMetadata
      original_task: false
    name: rhyme
    reference: ''
  c: !Template
    answer_choices: 'Yes ||| No'
    id: c
    jinja: '{{ premise }} ||| Maybe'
    metadata: !TemplateMetadata {}
    name: broken
    reference: ''
"""


@pytest.fixture
def templates(tmp_path):
    folder = tmp_path / "super_glue" / "copa"
    folder.mkdir(parents=True)
    (folder / "templates.yaml").write_text(YAML)
    return lambda *names: PromptsourceTemplates(str(tmp_path), "super_glue/copa", names)


def test_promptsource_templates_as_they_are(templates):
    (so,) = templates().templates()
    assert so.question(COPA) == Question(("It rained. So?",), ("Wet.", "Dry."), 0)
    assert so.question(COPA | {"label": -1}).gold is None
    assert so.question(COPA | {"question": "cause"}) is None  # renders nothing
    piped = COPA | {"premise": "a ||| b", "choice1": "c ||| d"}
    assert so.question(piped) == Question(("a ||| b So?",), ("c ||| d", "Dry."), 0)
    (rhyme,) = templates("rhyme").templates()
    found = {rhyme.question(COPA | {"label": n}).contexts[0] for n in range(20)}
    assert len(found) == 3 and all(rhyme.question(COPA).contexts == rhyme.question(COPA).contexts for _ in range(5))
    assert rhyme.question(COPA).answers == ("It rained.",)
    with pytest.raises(TemplateError, match="'Maybe' is none of the choices"):
        templates("broken").templates()[0].question(COPA)
    with pytest.raises(ValueError, match="has no template 'mine'; it has"):
        templates("mine").templates()
    with pytest.raises(ValueError, match="There are no promptsource templates at"):
        PromptsourceTemplates(str(templates().folder), "nothing").templates()


def test_rows_with_other_fields_than_the_templates_expect(templates):
    row = {"text": "It rained.", "options": ["Wet.", "Dry."], "right": "A", "question": "effect"}
    fields = {
        "premise": "text",
        "choice1": "options[0]",
        "choice2": "options[1]",
        "label": "['A', 'B'].index(right)",
    }
    named = dataclasses.replace(templates(), fields=fields)
    (so,) = named.templates()
    assert so.question(row) == Question(("It rained. So?",), ("Wet.", "Dry."), 0)
    assert fingerprint(named) != fingerprint(templates())  # a cache of the one is not the other's
    with pytest.raises(TemplateError, match="'options' is undefined"):
        so.question({"text": "It rained."})
    with pytest.raises(ValueError, match="The expression 'options\\[' is not Jinja"):
        dataclasses.replace(templates(), fields={"choice1": "options["}).templates()


def test_edited_templates_make_other_caches(templates):
    before = fingerprint(templates("rhyme"))
    path = f"{templates().folder}/super_glue/copa/templates.yaml"
    with open(path) as file:
        text = file.read()
    assert fingerprint(templates("rhyme")) == before != fingerprint(templates("so"))
    with open(path, "w") as file:
        file.write(text.replace("Rhyme:", "A rhyme:"))
    prompts._read_yaml.cache_clear()  # a process reads a file once
    assert fingerprint(templates("rhyme")) != before


def test_the_real_templates(shared_data, tmp_path, full):
    """All of promptsource's parse; those of bundled data sets make of every row a question with a known answer.

    One does not, by a mistake of its own: it offers A to D where the rows have five choices.
    """
    from benchmarks import promptsource

    folder = promptsource.unpack(shared_data, str(tmp_path))
    counts = promptsource.parse(folder)
    assert sum(counts.values()) == 2085 and len(counts) == 279
    failing = {}
    for dataset in promptsource.ROWS:
        for account in promptsource.render(shared_data, folder, dataset, 500 if full else 20):
            if account.get("failed"):
                failing[dataset, account["template"]] = account["reason"]
            # Templates of COPA are for one of its two questions.
            assert account.get("answered", 0) == account["rows"] - account.get("failed", 0) - account.get(
                "not applicable", 0
            )
            assert not account.get("not applicable") or dataset == "super_glue/copa"
    assert list(failing) == [("commonsense_qa", "question_to_answer_index")]
    assert "the answer 'E' is none of the choices ['A', 'B', 'C', 'D']" in failing.popitem()[1]
