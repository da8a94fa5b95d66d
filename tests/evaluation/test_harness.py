"""lm-evaluation-harness gets from us what it gets from its own model on the same weights, on a task from local data."""

import gzip
import json
import os

import pytest

pytest.importorskip("torch", reason="needs the torch extra: pip install -e '.[torch]'")
transformers = pytest.importorskip("transformers", reason="needs the torch extra: pip install -e '.[torch]'")
pytest.importorskip("lm_eval", reason="needs the harness extra: pip install -e '.[harness]'")

TASK = """
task: local_choices
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {rows}}}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{query}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{gold}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shared_data):
    """A Llama of random parameters, spread enough that no two choices tie, with a byte-pair tokenizer."""
    import tokenizers
    import torch

    folder = tmp_path_factory.mktemp("llama")
    with gzip.open(shared_data / "eval" / "hellaswag" / "validation.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file][:8]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    texts = [row["query"] for row in rows]
    tokenizer.train_from_iterator(texts, vocab_size=400, special_tokens=["<|end|>"], show_progress=False)
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token="<|end|>")
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=128,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def both(folder):
    os.environ["HF_HUB_OFFLINE"] = "1"
    from lm_eval.models.huggingface import HFLM

    from jaxlm.evaluation.harness import HarnessModel

    ours = HarnessModel.create_from_arg_string(f"path={folder},row_length=256,batch_tokens=512", {"batch_size": 4})
    return ours, HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4)


def asked(kind, *arguments):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, argument, i) for i, argument in enumerate(arguments)]


def test_log_likelihoods(both):
    """Also of a context without text, one that ends in a space, and one that is too long."""
    pairs = [("The man went", " home"), ("", "Nobody knows."), ("A b ", "c"), ("word " * 200, " and the end")]
    ours, theirs = (model.loglikelihood(asked("loglikelihood", *pairs)) for model in both)
    for (found, greedy), (expected, expected_greedy) in zip(ours, theirs, strict=True):
        assert found == pytest.approx(expected, rel=1e-5) and greedy == expected_greedy


def test_rolling_log_likelihoods(both):
    texts = [("One two three. " * 60,), ("Short.",)]
    ours, theirs = (model.loglikelihood_rolling(asked("loglikelihood_rolling", *texts)) for model in both)
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_generation(both):
    """Greedy texts, cut at the texts that end them."""
    requests = [("The man went to", {"until": ["e"], "max_gen_toks": 8}), ("A", {"until": [], "max_gen_toks": 8})]
    ours, theirs = (model.generate_until(asked("generate_until", *requests)) for model in both)
    assert ours == theirs and ours[1]


def test_a_task_from_local_data(both, folder):
    """The harness' own evaluation: the same accuracy, and the same choice and sum for each row."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    (folder / "tasks").mkdir(exist_ok=True)
    (folder / "tasks" / "local.yaml").write_text(TASK.format(rows=folder / "rows.jsonl"))
    os.environ["HF_DATASETS_CACHE"] = str(folder / "cache")
    results = [
        simple_evaluate(
            model=model,
            tasks=["local_choices"],
            task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
            bootstrap_iters=0,
            log_samples=True,
        )
        for model in both
    ]
    ours, theirs = (result["results"]["local_choices"] for result in results)
    assert ours["acc,none"] == theirs["acc,none"] and ours["acc_norm,none"] == theirs["acc_norm,none"]
    for mine, other in zip(*(result["samples"]["local_choices"] for result in results), strict=True):
        for (found, _), (expected, _) in zip(mine["filtered_resps"], other["filtered_resps"], strict=True):
            assert float(found) == pytest.approx(float(expected), rel=1e-5)


def test_chat_template(both, folder, monkeypatch):
    """The harness' conversations are written as transformers writes them."""
    ours, theirs = both
    with pytest.raises(ValueError, match="has no chat template"):
        ours.apply_chat_template([{"role": "user", "content": "Hi"}])
    turns = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    template = turns + "{% if add_generation_prompt %}<bot>{% endif %}"
    (folder / "chat_template.jinja").write_text(template)
    monkeypatch.setattr(theirs.tokenizer, "chat_template", template)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert ours.apply_chat_template(messages) == theirs.apply_chat_template(messages) != ""
    assert ours.chat_template(True) == template and ours.chat_template(False) is None


def test_unknown_arguments_are_refused(folder):
    from jaxlm.evaluation.harness import HarnessModel

    with pytest.raises(ValueError, match="no argument 'rows' in --model_args"):
        HarnessModel(str(folder), rows=3)
