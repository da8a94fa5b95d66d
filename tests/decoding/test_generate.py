"""`python -m jaxlm.generate` as a user runs it: prompts from everywhere, lines of JSON, a conversation, bad input."""

import io
import json
import re

import pytest

from benchmarks.tiny_runs import Workshop
from jaxlm.decoding.chat import ChatTemplate
from jaxlm.exit_status import ExitStatus
from jaxlm.generate import main
from tests.checkpoints.test_pretrained import save_run

BEAM = "--gin_file=gin_configs/decoding/beam.gin"
SHORT = ["--max_new_tokens=5", "--gin.GenerationConfig.slots=2"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run whose model was only initialised: bytes, rows of 32 tokens."""
    return save_run(Workshop(tmp_path_factory.mktemp("runs")), "saved").folder


@pytest.fixture
def ask(run_folder, capsys, monkeypatch):
    """A function that runs the command; (status, answers, standard error)."""

    def run(*arguments, stdin=""):
        monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        status = main([f"--model={run_folder}", *SHORT, *arguments])
        out, err = capsys.readouterr()
        return status, out, err

    return run


def test_prompts_from_everywhere(ask, tmp_path):
    """The command line, files and standard input give the same lines."""
    status, out, _ = ask("ab", "hello", "--seed=3")
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == ExitStatus.FINISHED and [line["prompt"] for line in lines] == ["ab", "hello"]
    for line in lines:
        assert set(line) == {"prompt", "sample", "text", "tokens", "log_probabilities", "finish"}
        assert len(line["tokens"]) == len(line["log_probabilities"]) == 5 or line["finish"] == "stop"
        assert max(line["log_probabilities"], default=-1) < 0
    (tmp_path / "prompts.txt").write_text("ab\nhello\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "ab"}\n{"prompt": "hello", "id": 7}\n')
    for name in ("prompts.txt", "prompts.jsonl"):
        assert ask(f"--file={tmp_path / name}", "--seed=3")[1] == out
    assert ask("--seed=3", stdin="ab\nhello\n")[1] == out
    samples = [json.loads(line) for line in ask("ab", "--seed=3", "--samples=3")[1].splitlines()]
    assert [line["sample"] for line in samples] == [0, 1, 2]
    assert samples[0] == lines[0] and samples[1]["tokens"] != samples[0]["tokens"]


def test_greedy_and_a_cache_of_8_bits(ask):
    """Temperature 0 does not ask the seed; 8 bits move log-probabilities by little, and do move them."""
    greedy, other, rounded = (
        json.loads(ask("hello", "--temperature=0", *more)[1]) for more in ((), ("--seed=9",), ("--cache=int8",))
    )
    assert greedy == other
    differences = [abs(a - b) for a, b in zip(greedy["log_probabilities"], rounded["log_probabilities"])]
    assert 0 < max(differences) < 0.1


def test_gaps_are_filled(ask):
    """A span for each gap, in its place, and another for each sample; what is no gap is as it was."""
    status, out, _ = ask("a<extra_id_0>b<extra_id_1>c", "--infill", "--samples=2")
    lines = [json.loads(line) for line in out.splitlines()]
    assert status == ExitStatus.FINISHED and [line["sample"] for line in lines] == [0, 1]
    for line in lines:
        first, second = line["spans"]
        assert line["text"] == f"a{first}b{second}c" and line["finish"] in ("stop", "length")
    assert lines[0]["spans"] != lines[1]["spans"]


def test_a_conversation(ask):
    """Answers as they come, until an empty line; one that is too long is said and forgotten."""
    status, out, err = ask("--chat", stdin="x" * 40 + "\nhi\n\nnot read\n")
    assert status == ExitStatus.FINISHED and "without a chat template" in err
    assert "longer than the model's context of 32 tokens" in err and err.count("jaxlm.generate:") == 1


def test_a_chat_template_in_its_sandbox(tmp_path):
    source = "{% for m in messages %}\n<{{ m.role }}>{{ m.content }}{{ eos_token }}\n{% endfor %}<assistant>"
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": source, "eos_token": {"content": "</s>"}, "pad_token": None})
    )
    template = ChatTemplate.of(tmp_path)
    assert template.text([{"role": "user", "content": "hi"}]) == "<user>hi</s>\n<assistant>"
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('only one turn') }}")
    with pytest.raises(ValueError, match="cannot be used: only one turn"):
        ChatTemplate.of(tmp_path).text([])
    (tmp_path / "chat_template.jinja").write_text("{{ messages.__class__.__mro__ }}")
    with pytest.raises(ValueError, match="unsafe"):
        ChatTemplate.of(tmp_path).text([])
    assert ChatTemplate.of(tmp_path / "elsewhere") is None


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (["x" * 30], 1, "longer than the model's context of 32 tokens; shorten the prompt or max_new_tokens"),
        (["a", "--samples=none"], 2, "--samples=none is no number from 1 on"),
        (["a", "--chat"], 2, "leave out the prompts"),
        (["a", "--file=b"], 2, "give one of the two"),
        (["a", "--cache=int4"], 2, "there are compute and int8"),
        (["a", "--mesh=tensor"], 1, "write axes of .* as tensor:4,fsdp:2"),
        (["--file=/nowhere/prompts.txt"], 1, "/nowhere/prompts.txt"),
        (["no gap", "--infill"], 1, "gaps of 'no gap' must be marked by sentinels"),
        (["--chat", "--infill"], 2, "--chat and --infill are two ways to write"),
        (["--chat", "--samples=2"], 2, "--chat has one answer to what is said, as it is said; leave out --samples"),
        (["--chat", "--specials"], 2, "as it is said; leave out --specials"),
        (
            ["a", "--draft=b"],
            2,
            "nothing asks for drafts of a model; add --gin_file=.*draft_model.gin, or leave out --d",
        ),
        (["a", "--draft=b", "--gin_file=gin_configs/decoding/lookup.gin"], 2, "nothing asks for drafts of a model"),
        (["a", "--seed=3", BEAM], 2, "--seed is of draws, and a beam search draws nothing; leave it out"),
        (["a", "--samples=2", BEAM], 2, "--samples is of draws, .* leave it out .BeamConfig.num_return is"),
        (
            ["a<extra_id_0>", "--infill", BEAM, "--gin.BeamConfig.num_return=2"],
            2,
            "--infill fills a gap in one way, .* 2",
        ),
    ],
)
def test_bad_input_is_one_sentence(ask, arguments, status, sentence):
    found, out, err = ask(*arguments)
    assert found == status and not out
    assert re.search(sentence, err) and err.count("\n") == 1


def test_unknown_flags_and_models(ask, capsys, tmp_path):
    wrong = (
        ["--temprature=0", "a"],
        ["--temperature=hot", "a"],
        ["--temperature=1", BEAM, "a"],
        ["--averaged=no", "a"],
    )
    for arguments in wrong:
        with pytest.raises(SystemExit) as stopped:
            ask(*arguments)
        err = capsys.readouterr().err
        assert stopped.value.code == 2 and err.count("\n") == 1, err
    assert main(["a"]) == 2 and "which model?" in capsys.readouterr().err
    assert main([f"--model={tmp_path}", "a"]) == 1 and capsys.readouterr().err.count("\n") == 1
