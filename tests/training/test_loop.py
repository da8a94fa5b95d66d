"""The loop: every step logged once, exact resumption, and each way it may end."""

import os
import signal
import threading
import time

import jax
import numpy as np
import pytest

from jaxlm.checkpoints.manager import CheckpointConfig, CheckpointManager
from jaxlm.layers.parameters import Parametrization
from jaxlm.objectives.base import LossConfig
from jaxlm.parallel.mesh import MeshConfig
from jaxlm.parallel.parallelism import ParallelConfig
from jaxlm.training.callbacks import Callback, EarlyStopping, Periodically
from jaxlm.training.compiles import CompileCounter
from jaxlm.training.evaluation import Evaluator, make_eval_step
from jaxlm.training.guard import Skip, SpikeGuard, Stop
from jaxlm.training.loop import Loop, LoopConfig, Outcome, TrainingDiverged
from jaxlm.training.metrics import Names
from jaxlm.training.optimizers import AdamW, OptimizerConfig, build_optimizer
from jaxlm.training.prefetch import Prefetcher
from jaxlm.training.schedules import Constant
from jaxlm.training.state import abstract_model, abstract_state, initializer
from jaxlm.training.step import StepConfig, make_train_step


class Loader:
    """Batch k is a function of k; optionally finite, or with a batch that makes the loss NaN."""

    def __init__(self, make_batch, end=None, poison=None):
        self.make_batch, self.end, self.poison, self.position = make_batch, end, poison, 0

    def __next__(self):
        if self.position == self.end:
            raise StopIteration
        batch = self.make_batch(self.position)
        if self.position == self.poison:
            batch["decoder_loss_weights"] = np.full_like(batch["decoder_loss_weights"], np.inf)
        self.position += 1
        return batch

    def state(self):
        return {"position": self.position}

    def restore(self, state):
        self.position = state["position"]


class Lines:
    """Keeps what is written."""

    def __init__(self):
        self.lines = []

    def write(self, step, values):
        self.lines.append((step, values))

    def losses(self):
        return {step: values["train/loss"] for step, values in self.lines if "train/loss" in values}


class Parts:
    """One compiled step and evaluation for all tests of this file."""

    def __init__(self, tiny):
        self.tiny = tiny
        self.parallel = ParallelConfig(MeshConfig()).on(jax.devices()[:1])
        self.make = lambda key: tiny.Model(key, dropout=0.1, scan=True)
        self.definition, self.abstract, self.infos = abstract_model(self.make)
        self.layouts = self.definition.layouts
        self.optimizer = self.optimizer_with(None)
        self.step = self.train_step(None)
        self.eval_step = make_eval_step(
            self.definition, tiny.Objective(), self.optimizer, self.parallel, config=StepConfig(), loss=LossConfig()
        )

    def optimizer_with(self, guard):
        config = OptimizerConfig(AdamW(), Constant(0.01), guard=guard)
        return build_optimizer(config, self.infos, total_steps=100, parametrization=Parametrization())

    def train_step(self, guard):
        arguments = (self.definition, self.tiny.Objective(), self.optimizer_with(guard), self.parallel)
        return make_train_step(*arguments, config=StepConfig(), loss=LossConfig())

    def state(self, guard=None):
        return initializer(self.make, self.optimizer_with(guard), self.parallel)(0)

    def loader(self, **options):
        return Loader(self.tiny.batch, **options)

    def loop(self, **options):
        options = {"step": self.step, "config": LoopConfig(), "names": Names()} | options
        return Loop(parallel=self.parallel, **options)

    def evaluator(self, batches=2):
        return Evaluator(self.eval_step, lambda: self.loader(end=batches), self.parallel, Names())


@pytest.fixture(scope="module")
def parts(request):
    return Parts(request.getfixturevalue("tiny"))


def test_every_step_is_in_one_log_line(parts):
    """Means over intervals are the means of the steps, an interval that isn't full included; nothing compiles twice."""
    single, grouped = Lines(), Lines()
    state, outcome, data = parts.loop(writer=single, config=LoopConfig(log_period=1)).run(
        parts.state(), parts.loader(), until=7
    )
    assert outcome is Outcome.FINISHED and int(state.step) == 7
    assert data == {"position": 7}, "the position of the last step, not of what was read ahead"
    state = parts.state()
    with CompileCounter() as compiles:
        parts.loop(writer=grouped, config=LoopConfig(log_period=3)).run(state, parts.loader(), until=7)
    assert compiles.count == 0
    losses = single.losses()
    assert list(losses) == [1, 2, 3, 4, 5, 6, 7] and list(grouped.losses()) == [3, 6, 7]
    for step, steps in ((3, (1, 2, 3)), (6, (4, 5, 6)), (7, (7,))):
        assert grouped.losses()[step] == pytest.approx(np.mean([losses[s] for s in steps]), rel=1e-5)
    assert "train/seconds_per_step" not in single.lines[0][1], "the first step compiles: no time of it is reported"
    assert 0 <= single.lines[1][1]["train/data_wait"] <= 1


def test_a_pause_at_the_end_loses_no_log_line_and_the_last_save_has_the_evaluation(parts):
    """However the run ends: evaluations and saves wait for the steps before them, whose interval isn't full."""
    evaluate, config = (lambda state: {"validation/nats": 1.5}), LoopConfig(log_period=3, evaluation_period=5)
    for end, logged, evaluated in ((7, [3, 6, 7], [5, 7]), (5, [3, 5], [5])):
        for ending in ({"until": end}, {"until": 50, "end": end}):
            lines, saves = Lines(), Saves()
            loader = parts.loader(end=ending.pop("end", None))
            expected = evaluated if ending["until"] == end else [5]
            loop = parts.loop(writer=lines, evaluate=evaluate, checkpoints=saves, config=config)
            loop.run(parts.state(), loader, **ending)
            assert list(lines.losses()) == logged
            assert [step for step, values in lines.lines if "validation/nats" in values] == expected
            (step, _, contents), *more = saves.saved
            assert step == end and not more
            assert contents["metrics"] == ({"validation/nats": 1.5} if end in expected else {})


def test_a_resumed_run_is_bit_identical(parts, tmp_path):
    """Law 4 for the loop's part: state, data position with batches in flight, callbacks, through real checkpoints."""
    whole = Lines()
    parts.loop(writer=whole, config=LoopConfig(log_period=1)).run(parts.state(), parts.loader(), until=8)
    resumed = Lines()
    options = {"writer": resumed, "config": LoopConfig(log_period=1)}
    with CheckpointManager(tmp_path, CheckpointConfig(period=3), parts.layouts) as manager:
        parts.loop(checkpoints=manager, **options).run(parts.state(), parts.loader(), until=5)
    with CheckpointManager(tmp_path, CheckpointConfig(period=3), parts.layouts) as manager:
        found = manager.restore(abstract_state(parts.abstract, parts.optimizer, parts.parallel))
        loader = parts.loader()
        loader.restore(found.checkpoint.data)
        assert loader.position == 5
        _, outcome, _ = parts.loop(checkpoints=manager, **options).run(found.state, loader, until=8)
    assert outcome is Outcome.FINISHED
    assert resumed.losses() == whole.losses()


class Saves:
    """A checkpoint manager that remembers its calls."""

    def __init__(self, period=1000):
        self.period, self.saved = period, []

    def should_save(self, step):
        return step % self.period == 0

    def save(self, step, state, **contents):
        self.saved.append((step, int(state.step), contents))

    def wait(self):
        pass


class At(Callback):
    """Does something after one step was dispatched."""

    def __init__(self, step, action):
        self.step, self.action = step, action

    def on_step(self, step, state):
        if step == self.step:
            self.action()


def test_sigterm_saves_and_ends(parts):
    saves, handler = Saves(), signal.getsignal(signal.SIGTERM)
    callback = At(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    _, outcome, _ = parts.loop(checkpoints=saves, callbacks=(callback,)).run(parts.state(), parts.loader(), until=50)
    assert outcome is Outcome.PREEMPTED
    (step, in_state, contents), *more = saves.saved
    assert not more and step == in_state == contents["data"]["position"] and step in (3, 4)
    assert signal.getsignal(signal.SIGTERM) is handler, "the process's own handler is back"


def test_nan_ends_the_run_with_the_step_and_saves_nothing_after_it(parts):
    saves = Saves(period=2)
    loop = parts.loop(checkpoints=saves, config=LoopConfig(log_period=50))
    with pytest.raises(TrainingDiverged, match=r"diverged at step 6: .* SpikeGuard"):
        loop.run(parts.state(), parts.loader(poison=5), until=50)
    assert [step for step, *_ in saves.saved] == [2, 4]


def test_spikes_are_told_of_at_the_next_log_with_their_batch(parts):
    """In-graph flags, read only with the log; the position is that before the batch, whatever was read ahead."""
    seen = []

    class Notes(Callback):
        def on_spike(self, spike):
            seen.append(spike)

        def on_log(self, step, values):
            seen.append(step)

    guard = SpikeGuard(policy=Skip(patience=2))
    step, lines = parts.train_step(guard), Lines()
    loop = parts.loop(callbacks=(Notes(),), config=LoopConfig(log_period=4), step=step, writer=lines)
    state, outcome, _ = loop.run(parts.state(guard), parts.loader(poison=5), until=9)
    assert outcome is Outcome.FINISHED and int(state.opt_state["guard"].skipped) == 1
    assert [s if isinstance(s, int) else s.step for s in seen] == [4, 6, 8, 9]
    spike = seen[1]
    assert spike.data == {"position": 5} and not np.isfinite(spike.loss) and not np.isfinite(spike.grad_norm)
    assert all(np.isfinite(values["train/grad_norm"]) for _, values in lines.lines), "of the steps that were taken"
    lines = Lines()  # an interval may have no other step
    loop = parts.loop(config=LoopConfig(log_period=1), step=step, writer=lines)
    _, outcome, _ = loop.run(parts.state(guard), parts.loader(poison=5), until=9)
    assert outcome is Outcome.FINISHED and len(lines.lines) == 9
    of_spike = lines.lines[5][1]
    assert not {"train/tokens", "train/tokens_per_second", "train/loss", "train/grad_norm"} & set(of_spike)
    assert of_spike["train/skipped"] == 1.0 and of_spike["train/seconds_per_step"] > 0
    with pytest.raises(TrainingDiverged) as diverged:
        parts.loop(config=LoopConfig(log_period=4), step=parts.train_step(SpikeGuard(policy=Stop()))).run(
            parts.state(guard), parts.loader(poison=5), until=9
        )
    assert (diverged.value.step, diverged.value.data) == (6, {"position": 6})


def test_the_end_of_the_data_ends_the_run(parts):
    saves = Saves()
    state, outcome, _ = parts.loop(checkpoints=saves).run(parts.state(), parts.loader(end=4), until=50)
    assert outcome is Outcome.OUT_OF_DATA and int(state.step) == 4 and saves.saved[0][0] == 4


def test_a_finished_run_does_nothing(parts):
    saves, lines = Saves(), Lines()
    loop = parts.loop(checkpoints=saves, writer=lines)
    state, outcome, _ = loop.run(parts.state(), parts.loader(), until=0)
    assert outcome is Outcome.FINISHED and int(state.step) == 0 and not saves.saved and not lines.lines


def test_evaluation_is_weighted_by_token_and_callbacks_see_it(parts):
    lines, paused = Lines(), []
    stop = EarlyStopping("validation/nats", patience=1, min_delta=1e9)  # nothing is ever an improvement
    every = Periodically("samples", 4, lambda step, state: paused.append((step, int(state.step))))
    saves = Saves()
    loop = parts.loop(
        writer=lines, evaluate=parts.evaluator(), callbacks=(stop, every), checkpoints=saves,
        config=LoopConfig(evaluation_period=4),
    )  # fmt: skip
    state, outcome, _ = loop.run(parts.state(), parts.loader(), until=50)
    assert outcome is Outcome.STOPPED and paused == [(4, 4), (8, 8)]
    values = {step: v["validation/nats"] for step, v in lines.lines if "validation/nats" in v}
    assert len(values) == 2
    sums = [jax.device_get(parts.eval_step(state, parts.tiny.batch(k))["nats"]) for k in range(2)]
    assert parts.evaluator()(state)["validation/nats"] == pytest.approx(
        sum(s for s, _ in sums) / sum(w for _, w in sums), rel=1e-5
    )
    (_, _, contents), *_ = saves.saved
    fresh = EarlyStopping("validation/nats", patience=1)
    fresh.load_state_dict(contents["callbacks"]["EarlyStopping"])
    assert fresh.wants_to_stop


def test_an_empty_validation_set_is_one_sentence(parts):
    with pytest.raises(ValueError, match="loader of 'validation' yields no batch"):
        parts.evaluator(batches=0)(parts.state())


def test_early_stopping_names_a_metric_that_is_not_there():
    with pytest.raises(ValueError, match=r"watches 'validation/x', but the evaluation has \['a'\]"):
        EarlyStopping("validation/x").on_evaluation(1, {"a": 1.0})


def test_an_error_of_the_loader_reaches_the_user_and_no_thread_stays(parts):
    loader = parts.loader()
    loader.make_batch = lambda k: parts.tiny.batch(k) if k < 2 else 1 / 0
    with pytest.raises(ZeroDivisionError):
        parts.loop().run(parts.state(), loader, until=50)
    with Prefetcher(parts.loader(), parts.parallel, depth=1) as batches:
        _, state = next(batches)
        assert state == {"position": 1}
        time.sleep(0.05)  # it reads ahead now, and has no room
    assert not [thread for thread in threading.enumerate() if thread.name == "prefetch"]
