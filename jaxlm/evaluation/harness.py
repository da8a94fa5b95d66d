"""Any task of lm-evaluation-harness on any model of ours: `lm_eval.api.model.LM` over `TextModel`.

    python -m jaxlm.evaluation.harness run --model jaxlm --model_args path=runs/mine --tasks hellaswag

is the harness' own command line (package lm-eval; `python -m pip install -e '.[harness]'` in the clone) that knows the
model "jaxlm"; from Python, importing this module registers it. `model_args`:

    path            a run's folder, one of its steps, or a Hugging Face folder
    step, averaged, compute     as of `jaxlm.checkpoints.pretrained.load`
    max_length      tokens that the model reads; default: what it says
    batch_tokens, row_length, share_context     as of `jaxlm.evaluation.scoring.ScoringConfig`

The harness' own batch size has no meaning here: rows are packed. Scores are those of its own `hf` model on the same
weights, with one exception: a tokenizer that begins every text with bos makes `hf` predict that bos in rolling
log-likelihoods as well, which we do not.
"""

import json
import pathlib
import sys
from collections.abc import Sequence
from typing import Any, override

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import normalize_gen_kwargs
except ImportError as error:
    raise ImportError(
        f"lm-evaluation-harness is missing ({error}); install it: python -m pip install -e '.[harness]' in the clone."
    ) from error

from jaxlm.checkpoints import pretrained
from jaxlm.decoding.chat import ChatTemplate
from jaxlm.decoding.sampling import SamplingConfig
from jaxlm.evaluation.scoring import Score, ScoringConfig
from jaxlm.evaluation.text_model import TextFormat, TextModel


@register_model("jaxlm")
class HarnessModel(LM):
    """A model for lm-evaluation-harness."""

    def __init__(
        self,
        path: str,
        *,
        step: int | None = None,
        averaged: bool = False,
        compute: str | None = None,
        max_length: int | None = None,
        batch_size: Any = None,
        max_batch_size: Any = None,
        device: Any = None,
        **scoring: Any,
    ):
        """Opens a model; see the module for the arguments. The harness' batch sizes and device are ignored."""
        super().__init__()
        del batch_size, max_batch_size, device
        known = ("row_length", "batch_tokens", "share_context")
        if unknown := [name for name in scoring if name not in known]:
            raise ValueError(
                f"The model jaxlm has no argument {unknown[0]!r} in --model_args; it has {known} and path."
            )
        self.pretrained = pretrained.load(path, step=step, averaged=averaged, compute=compute)
        self.model = TextModel(
            self.pretrained,
            format=TextFormat(delimiter=""),  # a task's continuations begin with theirs
            scoring=ScoringConfig(**scoring),
            context_length=max_length,
        )

    @override
    def loglikelihood(self, requests: Sequence[Instance], **options: Any) -> list[tuple[float, bool]]:
        """(log-likelihood, whether greedy) of each (context, continuation)."""
        pairs = [request.args for request in requests]
        return [self._cached("loglikelihood", *found) for found in zip(pairs, self.model.score(pairs), strict=True)]

    @override
    def loglikelihood_rolling(self, requests: Sequence[Instance], **options: Any) -> list[float]:
        """Log-likelihood of each whole text."""
        texts = [request.args[0] for request in requests]
        scores = self.model.rolling(texts)
        for text, score in zip(texts, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), score.total)
        return [score.total for score in scores]

    @override
    def generate_until(self, requests: Sequence[Instance], **options: Any) -> list[str]:
        """What the model writes after each context; the requests' own arguments say how, and where it ends."""
        groups: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        texts = [""] * len(requests)
        for written, indices in groups.items():
            arguments = normalize_gen_kwargs(json.loads(written), default_max_gen_toks=256)
            until, count = arguments.pop("until"), arguments.pop("max_gen_toks")
            sampling = SamplingConfig(
                temperature=arguments.pop("temperature", None) or (1.0 if arguments.get("do_sample") else 0.0),
                top_k=arguments.pop("top_k", 0),
                top_p=arguments.pop("top_p", 1.0),
                min_p=arguments.pop("min_p", 0.0),
            )
            arguments.pop("do_sample", None)
            if arguments:
                raise ValueError(f"The model jaxlm does not know the generation arguments {sorted(arguments)}.")
            contexts = [requests[i].args[0] for i in indices]
            found = self.model.generate(contexts, max_new_tokens=count, stop=until, sampling=sampling)
            for index, text in zip(indices, found, strict=True):
                texts[index] = text
                self.cache_hook.add_partial("generate_until", requests[index].args, text)
        return texts

    @override
    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as the model's chat template writes it.

        Raises:
          ValueError: the model has no chat template, or the conversation ends with what the model is to go on with.
        """
        if not add_generation_prompt:
            raise ValueError("The model jaxlm does not go on with a message that is begun; leave out gen_prefix.")
        return self._chat_template().text(chat_history)

    @override
    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's text, which the harness keeps with the results; None where it is not asked for."""
        return self._chat_template().source if chat_template else None

    def _chat_template(self) -> ChatTemplate:
        template = ChatTemplate.of(pathlib.Path(self.pretrained.source))
        if template is None:
            raise ValueError(f"{self.pretrained.source} has no chat template; leave out --apply_chat_template.")
        return template

    @property
    @override
    def tokenizer_name(self) -> str:
        return f"jaxlm-{self.model.vocabulary.fingerprint()}"

    def get_model_info(self) -> dict[str, Any]:
        """What the harness writes beside results."""
        config = self.pretrained.config
        return {
            "model_path": self.pretrained.source,
            "architecture": config.architecture.value,
            "compute": config.compute.value,
            "max_length": self.model.context_length,
            "shares_context": self.model.scorer.shares_context,
        }

    def _cached(self, kind: str, request: tuple[str, str], score: Score) -> tuple[float, bool]:
        answer = score.total, score.is_greedy
        self.cache_hook.add_partial(kind, request, answer)
        return answer


def main() -> None:
    """lm-evaluation-harness' command line."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    sys.exit(main())
