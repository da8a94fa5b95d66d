"""Prompted multitask data: data sets x templates -> tasks of inputs and targets -> a mixture (T0, arXiv 2110.08207).

    sets = (PromptedSet("copa", TextFiles("copa/train.jsonl"), PromptsourceTemplates("templates", "super_glue/copa")),)
    mixture = prompted_mixture("multitask", sets, vocabulary)

Each template of a data set is a task of its own, so that mixing rates, accounting and randomness are by template. The
`supervised` objective trains on the targets alone; packing is the loader's.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterable, Iterator

from jaxlm.data.decontamination import Decontaminate
from jaxlm.data.prompts import Prompts, PromptsourceTemplates, QuestionTemplate, TemplateError, row_name
from jaxlm.data.sources import Record, Source, TextFiles
from jaxlm.data.tasks import Feature, Mixture, Task
from jaxlm.data.vocabularies import Vocabulary

log = logging.getLogger("jaxlm.data")

_FAILING_SHARE = 0.01
_FAILURES_SHOWN = 5


@dataclasses.dataclass(frozen=True)
class Prompted:
    """Puts rows as {"inputs", "targets"} by one template: the question, and its right answer.

    A row that the template does not apply to, or whose answer is not known, is left out, and counted. One on which it
    fails to render is left out as well and said; more than 1% of these in a shard are an error, and so are rows of
    which none has a known answer.

    Attributes:
      prompts: templates.
      template: the name of one of them.
    """

    prompts: Prompts
    template: str

    def stream(self, records: Iterable[Record]) -> Iterator[Record]:
        """The rows of a shard as pairs.

        Raises:
          ValueError: the template fails on too many, or no row that it applies to has an answer.
        """
        template, rows, failed, pairs, unknown = self._found(), 0, [], 0, 0
        for rows, record in enumerate(records, 1):
            try:
                question = template.question(record)
            except TemplateError as error:
                failed.append(f"{row_name(rows - 1, record)}: {error}")
                if len(failed) <= _FAILURES_SHOWN:
                    log.warning("Template %r fails on %s", self.template, failed[-1])
                continue
            if question is None:
                continue
            if (answer := question.right_answer) is None:
                unknown += 1
                continue
            pairs += 1
            yield {"inputs": answer[0], "targets": answer[1]}
        if len(failed) > _FAILING_SHARE * rows:
            raise ValueError(
                f"The template {self.template!r} fails on {len(failed)} of {rows} rows of a shard ({failed[0]}); mend "
                f"it, or leave it out by naming the others in PromptsourceTemplates.names."
            )
        if unknown and not pairs:
            raise ValueError(
                f"The template {self.template!r} gives no right answer for any of {rows} rows of a shard; train on a "
                f"split whose labels are known, or correct the template."
            )
        if failed:
            log.warning("Template %r left out %d of %d rows.", self.template, len(failed), rows)
        if unknown:
            log.warning("Template %r left out %d of %d rows without a right answer.", self.template, unknown, rows)

    def _found(self) -> QuestionTemplate:
        found = {template.name: template for template in self.prompts.templates()}
        if self.template not in found:
            raise ValueError(f"There is no template {self.template!r}; there are {sorted(found)}.")
        return found[self.template]


@dataclasses.dataclass(frozen=True)
class PromptedSet:
    """A data set and its templates.

    Attributes:
      name: its tasks are called name/template.
      source: of rows.
      prompts: templates for them.
    """

    name: str
    source: Source
    prompts: Prompts

    def tasks(self, vocabulary: Vocabulary, decontaminate: Decontaminate | None = None) -> tuple[Task, ...]:
        """A task for each template, without the pairs that `decontaminate` leaves out."""
        feature = Feature(vocabulary, add_eos=False)
        features = {"inputs": feature, "targets": feature}
        names = [template.name for template in self.prompts.templates()]
        after = () if decontaminate is None else (decontaminate,)
        return tuple(
            Task(f"{self.name}/{name}", self.source, features, (Prompted(self.prompts, name), *after)) for name in names
        )


def sets_in(folder: str, names: tuple[str, ...], templates: str, *, held_out: float = 0.01) -> tuple[PromptedSet, ...]:
    """Data sets that lie in a folder by promptsource's names, with all their templates, as T0 was trained on them.

    As released (bigscience-workshop/t-zero, seqio_tasks), also templates without choices and those that make another
    task of the rows, which `PromptsourceTemplates` leaves out where no names are given.

    Args:
      folder: has the rows of each as `<name>/train*`, say glue/mrpc/train.jsonl.gz.
      names: data sets, such as "glue/mrpc".
      templates: promptsource's folder of templates.
      held_out: share of the rows for validation.
    """
    found = []
    for name in names:
        prompts = PromptsourceTemplates(templates, name)
        prompts = dataclasses.replace(prompts, names=prompts.all_names())
        found.append(PromptedSet(name, TextFiles(os.path.join(folder, name, "train*"), held_out=held_out), prompts))
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class TemplateRate:
    """T0's rate of a template: the data set's examples; of one above the cap, the cap divided by its templates.

    As released (bigscience-workshop/t-zero, seqio_tasks): what is below the cap is not divided, so that small data sets
    with many templates weigh more.

    Attributes:
      templates: of the data set.
      cap: examples of a data set.
    """

    templates: int
    cap: int = 500_000

    def __call__(self, examples: int) -> float:
        """The rate of a task of so many examples."""
        return float(self.cap // self.templates if examples > self.cap else examples)


def prompted_mixture(
    name: str,
    sets: tuple[PromptedSet, ...],
    vocabulary: Vocabulary,
    *,
    cap: int = 500_000,
    decontaminate: Decontaminate | None = None,
) -> Mixture:
    """All templates of all data sets at T0's rates.

    Args:
      name: of the mixture.
      sets: data sets.
      vocabulary: ids.
      cap: see `TemplateRate`.
      decontaminate: leaves out pairs that share an N-gram with evaluation data; None keeps all.
    """
    if decontaminate is not None and decontaminate.windows is not None:
        raise ValueError("Decontaminate.windows cuts texts, and a pair that is hit goes as a whole; leave it out here.")
    members = []
    for prompted in sets:
        tasks = prompted.tasks(vocabulary, decontaminate)
        members += [(task, TemplateRate(len(tasks), cap)) for task in tasks]
    return Mixture(name, tuple(members))
