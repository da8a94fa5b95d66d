"""Lets a trained model write: a line of JSON for each answer, or a conversation.

python -m jaxlm.generate --model=runs/mine "Once upon a time" "It was a dark and stormy night"
python -m jaxlm.generate --model=hf/llama --file=prompts.txt --temperature=0.7 --samples=4 > answers.jsonl
python -m jaxlm.generate --model=hf/llama --gin_file=gin_configs/decoding/beam.gin "Translate: ..."
python -m jaxlm.generate --model=hf/llama --chat

--model=PATH              a run's folder, one of its steps, or a Hugging Face folder
--file=PATH               prompts, one a line; of a .jsonl file each line's "prompt". Without prompts: standard input
--chat                    a conversation, in the model's chat template if it has one; ends with an empty line
--max_new_tokens=N        most tokens of an answer
--temperature=X, --top_k=N, --top_p=X, --min_p=X, --typical_p=X
                          how tokens are drawn, see `SamplingConfig`; temperature 0 is greedy
--stop=TEXT               an answer ends before it
--samples=N, --seed=N     answers to each prompt (1), and the seed of their draws (0)
--infill                  fills the gaps that "<extra_id_0>", "<extra_id_1>", ... mark in the prompts, with a model that
                          was trained on gin_configs/objectives/codegen2.gin
--specials                "<extra_id_0>" and other names of special tokens in prompts are these tokens
--cache=int8              keeps keys and values in 8 bits
--context=N               most tokens of a text; default: what the model was trained on
--mesh=AXIS:N,...         spreads the model over devices: tensor:4, or fsdp:2,tensor:2
--draft=PATH              the model that drafts, for gin_configs/decoding/draft_model.gin
--step=N, --averaged      of a run's folder: which step (the newest), and the moving average of its parameters
--compute=TYPE            float32 or bfloat16; default: as the model was trained
--gin_file, --gin.NAME    of `jaxlm.decoding.generation.GenerationConfig`; default: gin_configs/decoding/sampling.gin

A line has prompt, sample, text, tokens, log_probabilities (of each token under the model itself; null of beams, which
have a score) and finish: stop, length or complete; with drafts acceptance_length, the tokens that a pass yields.
"""

import itertools
import json
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any, TextIO

from jaxlm.configuration import take_flags
from jaxlm.exit_status import ExitStatus

_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "typical_p")
_OTHERS = (
    "max_new_tokens",
    "model",
    "file",
    "stop",
    "samples",
    "seed",
    "cache",
    "context",
    "mesh",
    "draft",
    "step",
    "compute",
)
_SWITCHES = ("chat", "specials", "averaged", "infill")
_MESH_AXES = ("data", "fsdp", "tensor", "expert")
_TOGETHER = 16
"""Prompts for each slot that are answered before their lines are written."""


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status. JAXLM_TRACEBACK=1 shows where an error came from."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or {"-h", "--help"} & set(arguments):
        print(__doc__)
        return ExitStatus.FINISHED
    flags, rest = take_flags(arguments, (*_SAMPLING, *_OTHERS), switches=_SWITCHES)
    prompts = _positional(rest)
    if problem := _problem(flags, prompts):
        print(f"jaxlm.generate: {problem}", file=sys.stderr)
        return ExitStatus.CONFIGURATION
    from jaxlm.configuration import resolve_or_exit
    from jaxlm.decoding.generation import GenerationConfig

    if not any(argument.startswith("--gin_file") for argument in rest):
        rest = ["--gin_file=gin_configs/decoding/sampling.gin", *rest]
    rest += [f"--gin.SamplingConfig.{name}={flags[name]}" for name in _SAMPLING if name in flags]
    config = resolve_or_exit(GenerationConfig, rest)
    if problem := _without_effect(config, flags):
        print(f"jaxlm.generate: {problem}", file=sys.stderr)
        return ExitStatus.CONFIGURATION
    try:
        _generate(config, flags, prompts)
    except (ValueError, OSError, ImportError) as error:
        if os.environ.get("JAXLM_TRACEBACK"):
            raise
        print(f"jaxlm.generate: {error}", file=sys.stderr)
        return ExitStatus.FAILED
    return ExitStatus.FINISHED


def _positional(arguments: list[str]) -> list[str]:
    """Takes out of `arguments` what is no flag nor the value of one of gin's."""
    prompts, others, value = [], [], False
    for argument in arguments:
        is_flag = argument.startswith("--") and not value
        (others if is_flag or value else prompts).append(argument)
        value = is_flag and argument.startswith("--gin") and "=" not in argument
    arguments[:] = others
    return prompts


def _problem(flags: dict[str, str], prompts: list[str]) -> str | None:
    """What is wrong with the flags, in a sentence."""
    if not flags.get("model"):
        return "which model? Give --model=PATH (see --help)."
    if "chat" in flags and "infill" in flags:
        return "--chat and --infill are two ways to write; give one of the two."
    if "chat" in flags and (prompts or "file" in flags):
        return "--chat takes what is said from the terminal; leave out the prompts."
    for name in ("samples", "specials"):
        if "chat" in flags and name in flags:
            return f"--chat has one answer to what is said, as it is said; leave out --{name}."
    if prompts and "file" in flags:
        return "prompts come from the command line or from --file; give one of the two."
    for name, least in (("max_new_tokens", 1), ("samples", 1), ("seed", 0), ("context", 1), ("step", 0)):
        if name in flags and not (flags[name].isdecimal() and int(flags[name]) >= least):
            return f"--{name}={flags[name]} is no number from {least} on."
    if "cache" in flags and flags["cache"] not in ("compute", "int8"):
        return f"--cache={flags['cache']} is no kind of cache; there are compute and int8."
    return None


def _without_effect(config: Any, flags: dict[str, str]) -> str | None:
    """Which flag the way of generating would pass over, in a sentence."""
    from jaxlm.decoding.beam import BeamConfig

    if "draft" in flags and (config.speculative is None or config.speculative.lookup is not None):
        return (
            "nothing asks for drafts of a model; add --gin_file=gin_configs/decoding/draft_model.gin, or leave out "
            "--draft."
        )
    if isinstance(config.method, BeamConfig):
        for name in ("seed", "samples"):
            if name in flags:
                return (
                    f"--{name} is of draws, and a beam search draws nothing; leave it out (BeamConfig.num_return is "
                    f"the number of answers)."
                )
        if "infill" in flags and config.method.num_return > 1:
            return (
                f"--infill fills a gap in one way, but BeamConfig.num_return is {config.method.num_return}; make it 1."
            )
    return None


def _generate(config: Any, flags: dict[str, str], prompts: list[str]) -> None:
    import dataclasses

    from jaxlm.decoding.chat import Chat, ChatTemplate

    if "max_new_tokens" in flags:  # of whichever method
        method = dataclasses.replace(config.method, max_new_tokens=int(flags["max_new_tokens"]))
        config = dataclasses.replace(config, method=method)
    if "stop" in flags:
        config = dataclasses.replace(config, stop=(*config.stop, flags["stop"]))
    generator, model = _open(config, flags)
    seed = int(flags.get("seed", 0))
    if "chat" in flags:
        template = ChatTemplate.of(pathlib.Path(model.source))
        note = (
            "in the model's chat template" if template else "without a chat template: the model goes on with the text"
        )
        print(f"A conversation {note}. An empty line ends it.", file=sys.stderr)
        _talk(Chat(generator, template, seed=seed), sys.stdin)
        return
    texts = iter(prompts) if prompts else _read(flags.get("file"))
    for together in itertools.batched(texts, _TOGETHER * config.slots):
        if "infill" in flags:
            _infill(generator, together, range(seed, seed + int(flags.get("samples", 1))))
            continue
        ids = [_encode(model, text, "specials" in flags) for text in together]
        answers = generator.generate(ids, seed=seed, samples=int(flags.get("samples", 1)))
        for text, found in zip(together, answers, strict=True):
            for sample, answer in enumerate(found):
                print(json.dumps(_line(text, sample, answer), ensure_ascii=False), flush=True)


def _open(config: Any, flags: dict[str, str]) -> tuple[Any, Any]:
    """(the `Generator`, the `Pretrained` that it runs)."""
    from jaxlm.checkpoints import pretrained
    from jaxlm.decoding.cached_model import CachedModel
    from jaxlm.decoding.generation import Generator
    from jaxlm.decoding.infills import span_end
    from jaxlm.layers.cache import CacheConfig
    from jaxlm.layers.context import LOCAL, Context
    from jaxlm.parallel.parallelism import ParallelConfig
    from jaxlm.parallel.sharded_ops import ShardedOps

    parallel = ParallelConfig(_mesh(flags["mesh"])).on() if "mesh" in flags else None
    context = LOCAL if parallel is None else Context(ops=ShardedOps(parallel))
    caching = CacheConfig(flags.get("cache", "compute"), config.extension)

    def opened(path: str, **options: Any) -> tuple[Any, Any]:
        found = pretrained.load(path, parallel=parallel, **options)
        length = int(flags["context"]) if "context" in flags else found.context_length
        options = {"caching": caching, "context_length": length, "context": context}
        return CachedModel(found.model, start_id=found.start_id, **options), found

    step = int(flags["step"]) if "step" in flags else None
    options = {"step": step, "averaged": "averaged" in flags, "compute": flags.get("compute")}
    model, found = opened(flags["model"], **options)
    if found.vocabulary is None:
        raise ValueError(
            f"{found.source} has no vocabulary to write prompts in: {found.no_vocabulary} Put its tokenizer beside it."
        )
    draft = opened(flags["draft"])[0] if "draft" in flags else None
    end_ids = found.eos_ids
    if "infill" in flags:
        if not found.config.architecture.has_decoder_features or found.config.architecture.has_encoder_features:
            raise ValueError(f"{found.source} is no decoder, and only these infill; leave out --infill.")
        end_ids = (span_end(found.vocabulary),)
    generator = Generator(model, found.vocabulary, config, end_ids=end_ids, draft=draft)
    return generator, found


def _infill(generator: Any, texts: Iterable[str], seeds: Iterable[int]) -> None:
    """Writes the texts with their gaps filled, a line for each text and seed."""
    from jaxlm.decoding.infills import fill

    found = [fill(generator, list(texts), seed=seed) for seed in seeds]
    for text, answers in zip(texts, zip(*found, strict=True), strict=True):
        for sample, answer in enumerate(answers):
            line = {"prompt": text, "sample": sample, "text": answer.text, "spans": answer.spans}
            print(json.dumps(line | {"finish": answer.finish.value}, ensure_ascii=False), flush=True)


def _mesh(text: str) -> Any:
    """The `MeshConfig` of "tensor:4,fsdp:2"."""
    from jaxlm.parallel.mesh import MeshConfig

    degrees = {}
    for part in text.split(","):
        axis, _, degree = part.partition(":")
        if axis not in _MESH_AXES or not degree.isdecimal():
            raise ValueError(f"--mesh={text} cannot decode; write axes of {', '.join(_MESH_AXES)} as tensor:4,fsdp:2.")
        degrees[axis] = int(degree)
    return MeshConfig(**degrees)


def _read(file: str | None) -> Iterator[str]:
    """Prompts, a line each, of a file or of standard input."""
    if file is None:
        yield from (line.rstrip("\n") for line in sys.stdin)
        return
    with open(file) as lines:
        for number, line in enumerate(lines, start=1):
            if not file.endswith(".jsonl"):
                yield line.rstrip("\n")
                continue
            try:
                yield str(json.loads(line)["prompt"])
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f'{file}, line {number}: not an object with a "prompt" ({error}).') from error


def _encode(model: Any, text: str, specials: bool) -> list[int]:
    """The ids of a prompt, ending as the model's inputs did in training (`Pretrained.input_end_id`)."""
    vocabulary = model.vocabulary
    ids = (vocabulary.encode_with_specials(text) if specials else vocabulary.encode(text)).tolist()
    return ids if model.input_end_id is None else [*ids, model.input_end_id]


def _line(prompt: str, sample: int, answer: Any) -> dict[str, Any]:
    """What is written of an answer."""
    scores = answer.log_probabilities
    return {
        "prompt": prompt,
        "sample": sample,
        "text": answer.text,
        "tokens": answer.tokens.tolist(),
        "log_probabilities": None if scores is None else [round(float(x), 6) for x in scores],
        **({} if answer.score is None else {"score": float(answer.score)}),
        **({} if answer.acceptance_length is None else {"acceptance_length": round(answer.acceptance_length, 3)}),
        "finish": answer.finish.value,
    }


def _talk(chat: Any, lines: Iterable[str], out: TextIO | None = None) -> None:
    """Answers line by line; what cannot be answered is said, and the conversation goes on."""
    out = out or sys.stdout
    for line in lines:
        if not line.strip():
            return
        try:
            for part in chat.say(line.rstrip("\n")):
                print(part, end="", file=out, flush=True)
            print(file=out, flush=True)
        except ValueError as error:
            print(f"jaxlm.generate: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
