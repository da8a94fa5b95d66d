"""A Hugging Face `config.json`, read so that nothing in it is overlooked."""

from collections.abc import Collection, Mapping
from typing import Any

_ABSENT = object()

# Of no consequence for what a model computes: bookkeeping, generation, training-time options, output options.
INCONSEQUENTIAL = frozenset(
    """_attn_implementation _name_or_path _num_labels architectures attention_dropout attention_probs_dropout_prob
    attn_pdrop auto_map bos_token_id cache_implementation chunk_size_feed_forward classifier_activation classifier_bias
    classifier_dropout classifier_pooling cls_token_id decoder_bos_token_id decoder_start_token_id do_sample
    dropout_rate dtype early_stopping embd_pdrop embedding_dropout eos_token_id forced_bos_token_id forced_eos_token_id
    gradient_checkpointing hidden_dropout hidden_dropout_prob id2label initializer_cutoff_factor initializer_factor
    initializer_range is_decoder is_encoder_decoder keys_to_ignore_at_inference label2id length_penalty mask_token_id
    max_length min_length mlp_dropout model_type n_ctx n_positions num_beam_groups num_beams num_labels
    num_return_sequences output_attentions output_hidden_states output_past output_router_logits pad_token_id prefix
    problem_type pruned_heads repetition_penalty resid_pdrop return_dict router_aux_loss_coef router_jitter_noise
    sep_token_id summary_activation summary_first_dropout summary_last_dropout summary_proj_to_labels summary_type
    summary_use_proj task_specific_params temperature tokenizer_class top_k top_p torch_dtype torchscript
    transformers_version typical_p unk_token_id use_cache use_return_dict""".split()
)


class Fields:
    """Reads a configuration's fields; `finish` complains of those that nobody asked for.

    A field that an adapter does not know may change what the model computes, so it is an error unless it is empty
    (None, False, 0, "", [], {}) or known to be of no consequence.

    Args:
      values: the parsed `config.json`.
      ignore: more names to pass over.
      tensors: names of the tensors beside it; None: nobody knows.
    """

    def __init__(self, values: Mapping[str, Any], ignore: tuple[str, ...] = (), tensors: Collection[str] | None = None):
        self._tensors, self._ignored, self._parts = tensors, ignore, []
        self._values = dict(values)
        self._unread = set(values) - INCONSEQUENTIAL - set(ignore)
        self.model_type = str(values.get("model_type"))

    def __call__(self, name: str, default: Any = _ABSENT) -> Any:
        """A field's value; `default` where it is absent or null.

        Raises:
          ValueError: it is absent and has no default.
        """
        self._unread.discard(name)
        value = self._values.get(name)
        if value is None:
            if default is _ABSENT:
                raise ValueError(f"config.json of this {self.model_type} lacks {name!r}, which says what the model is.")
            return default
        return value

    def expect(self, name: str, *allowed: Any) -> None:
        """Raises ValueError unless the field is absent or one of `allowed`."""
        value = self(name, allowed[0])
        if value not in allowed:
            raise ValueError(
                f"config.json has {name} = {value!r}; the {self.model_type} adapter knows only "
                f"{' or '.join(map(repr, allowed))}."
            )

    def part(self, name: str) -> "Fields":
        """The fields of a field that is a configuration by itself; `finish` sees to them as well."""
        self._parts.append(part := Fields(self(name), self._ignored, self._tensors))
        return part

    def has_tensor(self, name: str, default: bool) -> bool:
        """Whether the checkpoint has this tensor; `default` where its tensors are not known."""
        return default if self._tensors is None else name in self._tensors

    def finish(self) -> None:
        """Raises ValueError where fields are left that nobody read."""
        left = sorted(name for name in self._unread if self._values[name])
        if left:
            shown = ", ".join(f"{name} = {self._values[name]!r}" for name in left[:4])
            raise ValueError(
                f"config.json of this {self.model_type} has {shown}, which the adapter does not know and which may "
                f"change what the model computes; if it does not, convert the folder with "
                f"tools/convert_checkpoint.py --ignore={','.join(left)}."
            )
        for part in self._parts:
            part.finish()
