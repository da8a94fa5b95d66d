"""A number that changes over training: `Piecewise`, used by mixture rates and corruption rates.

Pure Python, so that data workers can evaluate it. (Learning-rate schedules run inside the jitted step
and live in `jaxlm.training.schedules`.)
"""

import bisect
import dataclasses


@dataclasses.dataclass(frozen=True)
class Piecewise:
    """A function of the training step given by its values at a few steps.

    Attributes:
      steps: increasing training steps, the first one 0.
      values: the value at each of them.
      linear: interpolate linearly between them; otherwise each value holds until the next step.

    Example:
      >>> Piecewise(steps=(0, 100), values=(0.3, 0.1))(50)
      0.2
      >>> Piecewise(steps=(0, 100), values=(0.3, 0.1), linear=False)(99)
      0.3
    """

    steps: tuple[int, ...]
    values: tuple[float, ...]
    linear: bool = True

    def __post_init__(self):
        if len(self.steps) != len(self.values) or not self.steps:
            raise ValueError(
                f"Piecewise needs one value a step, got {len(self.steps)} steps and {len(self.values)} values."
            )
        if self.steps[0] != 0 or any(a >= b for a, b in zip(self.steps, self.steps[1:])):
            raise ValueError(f"Piecewise steps must start at 0 and increase, got {self.steps}.")

    def __call__(self, step: int) -> float:
        """The value at `step`; after the last step the last value holds."""
        i = bisect.bisect_right(self.steps, step) - 1
        if i == len(self.steps) - 1 or not self.linear:
            return self.values[i]
        share = (step - self.steps[i]) / (self.steps[i + 1] - self.steps[i])
        return self.values[i] + share * (self.values[i + 1] - self.values[i])


def varies(value: object) -> bool:
    """Whether a value is a `Piecewise`, or has one among its items or a dataclass's fields."""
    if isinstance(value, (tuple, list)):
        return any(map(varies, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, (type, Piecewise)):
        return any(varies(getattr(value, field.name)) for field in dataclasses.fields(value))
    return isinstance(value, Piecewise)


def at_step(value: float | Piecewise, step: int) -> float:
    """`value` itself if it is a plain number, otherwise its value at `step`."""
    return value(step) if isinstance(value, Piecewise) else value
