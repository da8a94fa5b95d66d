"""A case's model in transformers and here: what both compute of the same texts, whole, padded and packed.

transformers and torch are imported when they are needed, so that this can be imported without them.
"""

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import load_file

from jaxlm.architecture import Architecture
from jaxlm.checkpoints import naming
from jaxlm.checkpoints.huggingface.folder import HuggingFaceFolder, export, open_folder
from jaxlm.checkpoints.huggingface.tensors import resolve
from jaxlm.decoding.cached_model import CachedModel
from jaxlm.decoding.engine import Engine, EngineConfig
from jaxlm.decoding.requests import Request
from jaxlm.decoding.sampling import SamplingConfig
from jaxlm.layers.context import LOCAL
from jaxlm.models import ModelConfig, ReplacedTokenDetector, build_model
from jaxlm.training.state import abstract_model
from tests.checkpoints.huggingface.family_cases import Case

VOCABULARY = 96
LENGTH, SOURCE_LENGTH = 40, 48
CUT, SOURCE_CUT = (17, 23), (20, 28)  # the beginnings of the texts that fill one packed row
_RNG = np.random.default_rng(0)
TOKENS = _RNG.integers(3, VOCABULARY, (2, LENGTH))
SOURCES = _RNG.integers(3, VOCABULARY, (2, SOURCE_LENGTH))
LABELS = _RNG.integers(0, VOCABULARY, (2, LENGTH))


@dataclasses.dataclass(frozen=True)
class Outputs:
    """What a model makes of the texts.

    Attributes:
      logits: [2, T, V] of the two texts; of a detector [2, T].
      hidden: [2, T, E], what the head gets.
      beginnings: logits of the first 17 and 23 tokens of the two texts one after the other [T, V], of padded rows or of
        a packed one.
    """

    logits: np.ndarray
    hidden: np.ndarray
    beginnings: np.ndarray


class SideBySide:
    """A case's two models.

    Args:
      case: which.
      folder: to write transformers' model to.
    """

    def __init__(self, case: Case, folder: pathlib.Path):
        self.case, self.path = case, folder / case.name

    @functools.cached_property
    def model(self) -> Any:
        """transformers' model with large random parameters, saved in its folder."""
        import torch
        import transformers

        model_class = getattr(transformers, self.case.model)
        model = model_class(model_class.config_class(**self.case.options)).eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                scale = parameter.ndim == 1 and name.endswith("weight")
                noise = torch.randn(parameter.shape, generator=generator) * 0.2
                parameter.copy_(noise + (self.case.scale if scale else 0.0))
        model.save_pretrained(self.path)
        return model

    @functools.cached_property
    def folder(self) -> HuggingFaceFolder:
        """The folder, opened here."""
        assert self.model is not None
        return open_folder(self.path)

    @functools.cached_property
    def definition(self) -> Any:
        """Of our model."""
        return abstract_model(lambda key: build_model(self.folder.config, key=key))[0]

    @functools.cached_property
    def params(self) -> Any:
        """Our parameters."""
        _, abstract, _ = abstract_model(lambda key: build_model(self.folder.config, key=key))
        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), abstract)
        return self.folder.load(target, self.definition.layouts)

    def parameters(self, tree: Any) -> dict[str, np.ndarray]:
        """{path: array}, layers one by one, of a tree like the parameters."""
        leaves = {path: np.asarray(leaf) for path, leaf in naming.flatten(tree).items()}
        sources = naming.sources(tree, self.definition.layouts).items()
        return {
            naming.show(path): leaves[source.path] if source.row is None else leaves[source.path][source.row]
            for path, source in sources
        }

    @functools.cached_property
    def theirs(self) -> Outputs:
        """By transformers, the beginnings in padded rows."""
        logits, hidden = self._run_theirs(None, None)
        padded, _ = self._run_theirs(CUT, SOURCE_CUT)
        return Outputs(logits, hidden, np.concatenate([padded[i, :n] for i, n in enumerate(CUT)]))

    @functools.cached_property
    def ours(self) -> Outputs:
        """By our model, the beginnings packed into one row."""
        return self.run(self.folder.config, self.definition)

    def run(self, config: ModelConfig, definition: Any) -> Outputs:
        """By a model with our parameters."""

        @jax.jit
        def outputs(params, batch):
            return _hidden_and_logits(definition.merge(params), batch)

        hidden, logits = map(np.asarray, outputs(self.params, _batch(config.architecture, packed=True)))
        return Outputs(logits[:2], hidden[:2], logits[2])

    def differences(self) -> dict[str, float]:
        """The largest differences over the largest numbers of transformers, and the mean one of the logits."""
        theirs, ours = self.theirs, self.ours
        names = ("logits", "hidden", "beginnings")
        found = {name: relative(getattr(ours, name), getattr(theirs, name)) for name in names}
        mean = np.abs(ours.logits - theirs.logits).mean() / np.abs(theirs.logits).max()
        return found | {"logits_mean": float(mean)}

    def mutated(self, feature: str) -> float:
        """The largest difference of the logits over the largest when a feature is changed."""
        changed = self.case.features[feature](self.folder.config)
        assert changed != self.folder.config
        definition, _, _ = abstract_model(lambda key: build_model(changed, key=key))
        return relative(self.run(changed, definition).logits, self.theirs.logits)

    def gradient_difference(self) -> float:
        """Norm of the difference of the loss's gradients over the norm of transformers', all parameters together."""
        theirs = self._their_gradients()
        config = self.folder.config

        @jax.jit
        def gradients(params, batch):
            return jax.grad(lambda p: _loss(_hidden_and_logits(self.definition.merge(p), batch)[1]))(params)

        ours = self.parameters(gradients(self.params, _batch(config.architecture, packed=False)))
        table = resolve(self.folder.family.table_of(config, theirs), self.folder.shapes)
        assert {entry.name for entry in table} == set(theirs)
        error = size = 0.0
        for entry in table:
            parts = entry.form.split(theirs[entry.name], entry.held(self.folder.shapes))
            for path, theirs_of in zip(entry.paths, parts, strict=True):
                ours_of = ours[path] if entry.row is None else ours[path][entry.row]
                error += float(np.sum((ours_of - theirs_of) ** 2))
                size += float(np.sum(theirs_of**2))
        return (error / size) ** 0.5

    def send_back(self, folder: pathlib.Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Exports our parameters, as the adapter that read them, to a folder; {tensor: theirs, ours}."""
        values, theirs = self.parameters(self.params), self.model.config
        ids = {name: getattr(theirs, name) for name in ("pad_token_id",) if getattr(theirs, name) is not None}
        shapes = {path: value.shape for path, value in values.items()}
        kind = self.folder.family.model_type
        family = export(folder, self.folder.config, shapes, values.__getitem__, special_ids=ids, family=kind)
        assert family is self.folder.family
        before, after = load_file(self.path / "model.safetensors"), load_file(folder / "model.safetensors")
        assert before.keys() == after.keys()
        return {name: (before[name], after[name]) for name in before}

    def greedy(self, count: int = 32) -> tuple[int, int]:
        """Continues the beginnings of the texts by `count` tokens each, or as many as the model's context leaves.

        Returns:
          Tokens up to which transformers' choice is clear, its two highest logits being more than 1e-4 apart, and how
          many of these are the engine's as well.
        """
        import torch

        both = self.model.config.is_encoder_decoder
        texts, cut = (SOURCES, SOURCE_CUT) if both else (TOKENS, CUT)
        prompts = [text[:n] for text, n in zip(texts, cut)]
        start = 0 if both else None
        model = CachedModel(self.definition.merge(self.params), start_id=start)
        longest = model.context_length or LENGTH + count
        counts = [count if both else min(count, longest - len(prompt)) for prompt in prompts]
        requests = [
            Request(prompt, SamplingConfig(temperature=0.0, max_new_tokens=n)) for prompt, n in zip(prompts, counts)
        ]
        answers = Engine(model, EngineConfig(slots=2)).generate(requests)
        clear = same = 0
        for prompt, count, answer in zip(prompts, counts, answers, strict=True):
            out = self.model.generate(
                torch.tensor(prompt[None]),
                attention_mask=torch.ones((1, len(prompt)), dtype=torch.int64),
                do_sample=False,
                max_new_tokens=count,
                eos_token_id=None,
                pad_token_id=0,
                output_logits=True,
                use_cache=False,  # whose form in transformers fails where a decoder is deeper than its encoder
                return_dict_in_generate=True,
                **({"decoder_start_token_id": start} if both else {}),
            )
            theirs = out.sequences[0, -count:].numpy()
            highest = torch.stack(out.logits)[:, 0].topk(2).values.numpy()
            unclear = np.flatnonzero(highest[:, 0] - highest[:, 1] <= 1e-4)
            until = int(unclear[0]) if len(unclear) else count
            clear += until
            same += int(np.sum(np.cumprod(answer.tokens[:until] == theirs[:until])))
        return clear, same

    def _run_theirs(
        self, lengths: tuple[int, ...] | None, source_lengths: tuple[int, ...] | None
    ) -> tuple[np.ndarray, np.ndarray]:
        import torch

        with torch.no_grad():
            inputs = self._inputs(lengths, source_lengths)
            out = self.model(**inputs, output_hidden_states=True)
        states = out.decoder_hidden_states if self.model.config.is_encoder_decoder else out.hidden_states
        return out.logits.numpy(), states[-1].numpy()

    def _inputs(self, lengths: tuple[int, ...] | None, source_lengths: tuple[int, ...] | None) -> dict[str, Any]:
        import torch

        def mask(of: tuple[int, ...], width: int) -> Any:
            return torch.tensor((np.arange(width)[None] < np.array(of)[:, None]).astype(np.int64))

        both = self.model.config.is_encoder_decoder
        inputs = {"input_ids": torch.tensor(SOURCES if both else TOKENS)}
        if both:
            inputs["decoder_input_ids"] = torch.tensor(TOKENS)
        if lengths is not None:
            inputs["decoder_attention_mask" if both else "attention_mask"] = mask(lengths, LENGTH)
            if both:
                inputs["attention_mask"] = mask(source_lengths, SOURCE_LENGTH)
        return inputs

    def _their_gradients(self) -> dict[str, np.ndarray]:
        import torch
        from torch.nn import functional

        self.model.zero_grad()
        logits = self.model(**self._inputs(None, None)).logits
        labels = torch.tensor(LABELS)
        if logits.ndim == 3:
            loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        else:
            loss = functional.binary_cross_entropy_with_logits(logits, (labels > VOCABULARY // 2).float())
        loss.backward()
        return {name: p.grad.numpy() for name, p in self.model.named_parameters() if p.grad is not None}


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference over the largest number expected."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def _hidden_and_logits(model: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    if isinstance(model, ReplacedTokenDetector):
        hidden, _ = model.discriminator.hidden_states(batch)
        return hidden, model.verdict(hidden, LOCAL)
    hidden, _ = model.hidden_states(batch)
    return hidden, model.head(hidden)


def _loss(logits: jax.Array) -> jax.Array:
    """Mean cross-entropy with `LABELS`, or of yes and no."""
    if logits.ndim == 2:
        return jnp.mean(jnp.logaddexp(0.0, jnp.where(LABELS > VOCABULARY // 2, -logits, logits)))
    return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(LABELS)[..., None], -1))


def _batch(architecture: Architecture, *, packed: bool) -> dict[str, jax.Array]:
    """The texts, one a row; and a third row with the beginnings of both."""
    sides = {"decoder": (TOKENS, CUT), "encoder": (SOURCES, SOURCE_CUT)}
    if architecture is Architecture.ENCODER:
        sides = {"encoder": sides["decoder"]}
    batch = {}
    for side, (texts, cut) in sides.items():
        segments, positions = np.ones_like(texts), np.broadcast_to(np.arange(texts.shape[1]), texts.shape)
        if packed:
            both = np.concatenate([text[:n] for text, n in zip(texts, cut)])
            texts = np.vstack([texts, both])
            segments = np.vstack([segments, np.repeat([1, 2], cut)])
            positions = np.vstack([positions, np.concatenate([np.arange(n) for n in cut])])
        batch |= {f"{side}_input_tokens": texts, f"{side}_segment_ids": segments, f"{side}_positions": positions}
    return {name: jnp.asarray(x, jnp.int32) for name, x in batch.items()}
