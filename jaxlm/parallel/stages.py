"""Pipeline stages: what a user says of them, and which stage holds which layer. Data; `pipeline` runs them."""

import dataclasses
import enum

import numpy as np


class Recompute(enum.Enum):
    """What a stage keeps of a microbatch for its backward pass.

    BLOCKS: what `StackConfig.remat` says of each block, at least every block's input.
    STAGE: its own input alone. The stage runs forward once more before its backward pass, in which blocks keep what
      `StackConfig.remat` says; with Remat.NONE that costs no more than Remat.FULL and BLOCKS.
    """

    BLOCKS = "blocks"
    STAGE = "stage"


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """How microbatches go through the stages, of which there are `MeshConfig.stage`.

    Beside `StepConfig.microbatches`, which cuts the batch into pieces whose gradients are added up one after the
    other: each such piece is cut again into `microbatches`, which follow each other through the stages. What a layer
    does not add up over tokens (the balance of experts) is of one of these.

    Attributes:
      microbatches: M, a multiple of the stages S. Stages are idle for a share (S - 1) / (M * rounds + S - 1) of the
        time, see `Stages.bubble`.
      rounds: 1: every stage has neighbouring layers (GPipe; Huang et al. 2019, arXiv 1811.06965). V > 1: a microbatch
        goes round the stages V times, and stage s has every S-th of S * V runs of layers (the interleaved schedule;
        Narayanan et al. 2021, arXiv 2104.04473, 2.2): less idle time for V times the traffic between stages.
      recompute: see `Recompute`.
    """

    microbatches: int = 1
    rounds: int = 1
    recompute: Recompute = Recompute.BLOCKS

    def __post_init__(self):
        object.__setattr__(self, "recompute", Recompute(self.recompute))
        for name in ("microbatches", "rounds"):
            if getattr(self, name) < 1:
                raise ValueError(f"Pipeline.{name} is {getattr(self, name)}; it must be at least 1.")
        if self.rounds > 1 and self.recompute is not Recompute.STAGE:
            raise ValueError(
                f"Pipeline.rounds is {self.rounds}, which needs Pipeline.recompute = 'stage': otherwise a stage would "
                f"keep, for each step's backward pass, a copy of the parameters that the step used."
            )


@dataclasses.dataclass(frozen=True)
class Stages:
    """How the repeats of a stack are dealt to pipeline stages.

    They are cut into `count * rounds` runs of equal length; run c belongs to stage c % count, in round c // count.
    Where the repeats do not divide, identity layers fill the last runs. A stack's arrays keep the repeats of a stage
    together, so that each stage holds a part of every array and no parameter ever moves.

    Attributes:
      count: S, number of stages.
      rounds: V, runs that a stage has.
    """

    count: int = 1
    rounds: int = 1

    def run_length(self, repeats: int) -> int:
        """Repeats in a run, identity layers among them.

        Raises:
          ValueError: there are fewer repeats than runs.
        """
        runs = self.count * self.rounds
        if repeats < runs:
            raise ValueError(
                f"A stack of {repeats} repeats of its pattern cannot fill {self.count} pipeline stages"
                f"{f' in {self.rounds} rounds' if self.rounds > 1 else ''}; lower MeshConfig.stage"
                f"{' or Pipeline.rounds' if self.rounds > 1 else ''} so that their product is at most {repeats}."
            )
        return -(-repeats // runs)

    def order(self, repeats: int) -> np.ndarray:
        """int [N]: which repeat each row of a stacked array holds; what is not below `repeats` is an identity layer."""
        length = self.run_length(repeats)
        rows = np.arange(length * self.count * self.rounds).reshape(self.rounds, self.count, length)
        return rows.transpose(1, 0, 2).ravel()

    def padding(self, repeats: int) -> int:
        """How many identity layers fill the runs."""
        return len(self.order(repeats)) - repeats

    def steps(self, microbatches: int) -> int:
        """Steps of the pipeline in a forward pass; in each, every stage runs one run of its layers."""
        return microbatches * self.rounds + self.count - 1

    def bubble(self, microbatches: int) -> float:
        """Share of the steps in which a stage has nothing to do."""
        return (self.count - 1) / self.steps(microbatches)


ONE_STAGE = Stages()
"""No pipeline."""
