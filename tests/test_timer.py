"""`Timer` and `duration`, on a clock that the test turns by hand."""

from __future__ import annotations

import io
from datetime import timedelta

import pytest
from rich.console import Console

from jaxtrainer.callback import Callback
from jaxtrainer.callbacks.timer import Timer
from jaxtrainer.duration import parse_duration
from jaxtrainer.errors import ConfigError, OptionError
from jaxtrainer.hooks import CallbackList
from jaxtrainer.run import Run


class ManualClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


@pytest.fixture
def run(clock: ManualClock) -> Run:
    return Run(clock=clock, is_epoch_end=True)


def train(timer: Timer, run: Run, clock: ManualClock, epochs_s: list[float]) -> None:
    """Call the hooks of a fit whose compilation takes 2 s."""
    timer.setup(run)
    with run.timings.phase("compile"):
        clock.now += 2.0
    timer.on_compile_end(run, "train step", 2.0)
    timer.on_train_start(run)
    for seconds in epochs_s:
        timer.on_train_epoch_start(run)
        with run.timings.phase("device"):
            clock.now += seconds
        run.is_epoch_end = True
        timer.on_train_epoch_end(run)
        run.next_epoch()
    timer.on_train_end(run)


def test_timer_counts_compilation_to_the_first_epoch(run: Run, clock: ManualClock):
    timer = Timer()
    train(timer, run, clock, [2.03, 0.5, 0.88])
    assert timer.first_epoch_s == pytest.approx(4.03)
    assert timer.epoch_times_s == pytest.approx([2.03, 0.5, 0.88])
    assert timer.average_epoch_s == pytest.approx(0.69)
    assert timer.summary() == "compile + epoch 1: 4.03 s\nlater epochs: 0.69 s average"


def test_timer_does_not_count_compilation_in_an_epoch_twice(run: Run, clock: ManualClock):
    timer = Timer()
    timer.setup(run)
    timer.on_train_start(run)
    timer.on_train_epoch_start(run)
    clock.now += 3.0
    timer.on_compile_end(run, "train step", 2.0)
    timer.on_train_epoch_end(run)
    assert timer.first_epoch_s == 3.0


def test_timer_of_a_resumed_epoch_counts_from_the_start(run: Run, clock: ManualClock):
    timer = Timer()
    run.epoch = 2
    timer.setup(run)
    timer.on_train_start(run)
    clock.now += 3.0
    timer.on_train_epoch_end(run)
    assert timer.summary() == "compile + epoch 3: 3.00 s"


def test_timer_leaves_an_epoch_that_was_cut_short_out(run: Run, clock: ManualClock):
    timer = Timer()
    train(timer, run, clock, [1.0, 1.0])
    run.is_epoch_end = False
    timer.on_train_epoch_start(run)
    clock.now += 0.1
    timer.on_train_epoch_end(run)
    assert timer.epoch_times_s == [1.0, 1.0]


def test_timer_without_an_ended_epoch_says_so(run: Run):
    timer = Timer()
    timer.setup(run)
    assert timer.average_epoch_s is None
    assert str(timer) == "no epoch has ended yet"


def test_timer_prints_where_the_time_went(run: Run, clock: ManualClock):
    file = io.StringIO()
    timer = Timer(console=Console(file=file, width=60))
    train(timer, run, clock, [2.0, 1.0, 1.0])
    run.timings.seconds["saving plots"] += 1.0
    clock.now += 2.0
    timer.on_fit_end(run)
    assert [line.strip() for line in file.getvalue().splitlines()] == [
        "compile + epoch 1: 4.00 s",
        "later epochs: 1.00 s average",
        "",
        "where the time went        time   share",
        "───────────────────────────────────────",
        "compilation              2.00 s   25.0%",
        "waiting for the device   4.00 s   50.0%",
        "saving plots             1.00 s   12.5%",
        "other                    1.00 s   12.5%",
        "",
        "total                    8.00 s",
        "",
    ]
    assert str(timer).startswith("compile + epoch 1: 4.00 s\nlater")


def test_timer_that_is_not_verbose_prints_nothing(run: Run, clock: ManualClock):
    file = io.StringIO()
    timer = Timer(verbose=False, console=Console(file=file))
    train(timer, run, clock, [1.0])
    timer.on_fit_end(run)
    assert file.getvalue() == ""
    assert "total" in str(timer)


def test_timer_knows_each_stage(run: Run, clock: ManualClock):
    timer = Timer()
    timer.setup(run)
    timer.on_test_start(run)
    clock.now += 1.5
    assert timer.time_elapsed("test") == 1.5
    assert timer.start_time("test") == 100.0
    assert timer.end_time("test") is None
    timer.on_test_end(run)
    clock.now += 9.0
    assert timer.time_elapsed("test") == 1.5
    assert timer.end_time("test") == 101.5
    assert timer.time_elapsed() == 0.0


@pytest.mark.parametrize("name", ["validation", "predict"])
def test_timer_adds_up_a_stage_that_runs_again(run: Run, clock: ManualClock, name: str):
    timer = Timer()
    timer.setup(run)
    for _ in range(2):
        getattr(timer, f"on_{name}_start")(run)
        clock.now += 1.5
        getattr(timer, f"on_{name}_end")(run)
    assert timer.time_elapsed("validate" if name == "validation" else "predict") == 3.0


def test_timer_stops_when_an_exception_ends_the_run(run: Run, clock: ManualClock):
    timer = Timer()
    timer.setup(run)
    timer.on_train_start(run)
    clock.now += 2.0
    timer.teardown(run)
    clock.now += 5.0
    assert timer.time_elapsed() == 2.0


def test_timer_begins_anew_with_each_fit(run: Run, clock: ManualClock):
    timer = Timer()
    train(timer, run, clock, [1.0, 1.0])
    run.stage = "test"
    timer.setup(run)
    assert timer.time_elapsed() == 2.0
    train(timer, Run(clock=clock, is_epoch_end=True), clock, [3.0])
    assert timer.time_elapsed() == 3.0
    assert timer.epoch_times_s == [3.0]


def test_timer_goes_on_counting_after_a_resume(run: Run, clock: ManualClock):
    timer = Timer()
    train(timer, run, clock, [4.0])
    state = timer.state_dict()
    assert state == {"elapsed_s": {"train": 4.0}}
    resumed = Timer(duration=10.0)
    resumed.setup(run)
    resumed.load_state_dict(state)
    resumed.on_train_start(run)
    clock.now += 1.0
    assert resumed.time_elapsed() == 5.0
    assert resumed.time_remaining() == 5.0


def test_timer_ends_the_run_after_the_step_that_used_up_its_time(run: Run, clock: ManualClock):
    timer = Timer("00:00:00:03")
    hooks = CallbackList([timer], Callback())
    timer.setup(run)
    timer.on_train_start(run)
    stops = []
    for _ in range(4):
        clock.now += 1.0
        hooks.on_save_point(run)
        stops.append(run.should_stop)
    assert stops == [False, False, True, True]
    assert run.stop_reason == "max_time"
    assert run.notices == ["Timer: the training time of 3.00 s is used up."]


def test_timer_that_checks_epochs_has_no_hook_after_a_dispatch(run: Run, clock: ManualClock):
    timer = Timer(duration=3, interval="epoch")
    assert not CallbackList([timer], Callback()).has("on_save_point")
    train(timer, run, clock, [1.0, 1.0])
    assert not run.should_stop
    train(timer, run, clock, [1.0, 2.0])
    assert run.stop_reason == "max_time"


def test_timer_without_a_duration_costs_nothing_a_step():
    hooks = CallbackList([Timer()], Callback())
    per_dispatch = ("on_save_point", "on_train_batch_start", "on_train_batch_end", "on_report")
    assert not [name for name in per_dispatch if hooks.has(name)]
    assert Timer().time_remaining() is None


def test_timer_resumed_after_its_time_stops_at_once(run: Run):
    timer = Timer(duration=3.0)
    timer.setup(run)
    timer.load_state_dict({"elapsed_s": {"train": 3.0}})
    timer.on_train_start(run)
    assert run.stop_reason == "max_time"
    assert timer.time_remaining() == 0.0


def test_timer_refuses_an_unknown_stage_interval_or_option():
    with pytest.raises(ConfigError, match="Did you mean 'train'"):
        Timer().time_elapsed("training")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ConfigError, match="Did you mean 'step'"):
        Timer(interval="steps")  # pyright: ignore[reportArgumentType]
    with pytest.raises(OptionError, match="Did you mean 'duration'"):
        Timer(durations=3)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("01:02:03:04", 93784.0),
        ("00:48:00:00", 172800.0),
        (timedelta(minutes=1.5), 90.0),
        ({"hours": 1, "minutes": 30}, 5400.0),
        (7, 7.0),
        (0.5, 0.5),
    ],
)
def test_duration_is_in_seconds(value: object, seconds: float):
    assert parse_duration(value) == seconds  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("01:30", "'00:01:30:00' for 1.5 h"),
        ("", "DD:HH:MM:SS"),
        ({"hour": 1}, "Did you mean 'hours'"),
        ({1: 1}, "Units: weeks, days"),
        ({"hours": "2"}, "as a duration"),
        ({}, "is 0 s"),
        (0, "is 0 s"),
        (timedelta(seconds=-1), "is -1 s"),
        (float("nan"), "is nan s"),
        (float("inf"), "is inf s"),
        (True, "Got True"),
        (None, "Got None"),
    ],
)
def test_duration_names_what_is_wrong(value: object, message: str):
    with pytest.raises(ConfigError, match=message):
        parse_duration(value)  # pyright: ignore[reportArgumentType]
