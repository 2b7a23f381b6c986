"""`Profiler`: time by hook, and a trace that begins and ends at the steps asked for."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import pytest
from rich.console import Console

from jaxtrainer import Callback, Run, TrainModule
from jaxtrainer.callbacks import Checkpoint, LambdaCallback, ModelSummary, Profiler, Timer
from jaxtrainer.display.report import hook_table
from jaxtrainer.errors import ConfigError, RunDirError
from jaxtrainer.hooks import CallbackList
from tests import tiny
from tests.bad_input import refused

pytestmark = pytest.mark.usefixtures("compiled_once")


class ManualClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Slow(Callback):
    """Spends some of the clock's time in a hook."""

    def __init__(self, clock: ManualClock, seconds: float) -> None:
        self.clock = clock
        self.seconds = seconds

    def on_train_start(self, run: Run) -> None:
        self.clock.now += self.seconds

    def on_train_batch_start(self, run: Run, batch: Any, batch_idx: int) -> int | None:
        return -1 if batch_idx else None


def quiet(*arguments: Any, **options: Any) -> Profiler:
    return Profiler(*arguments, verbose=False, **options)


def test_time_of_each_hook_is_added_up():
    clock, profiler = ManualClock(), quiet()
    hooks = CallbackList([profiler, Slow(clock, 2.0), Slow(clock, 3.0)], TrainModule())
    run = Run(clock=clock)
    for _ in range(4):
        hooks.on_train_start(run)
    first, second = (profiler.times[f"{name}.on_train_start"] for name in ("Slow", "Slow 2"))
    assert (first.calls, first.total_s, first.mean_us) == (4, 8.0, 2e6)
    assert (second.calls, second.total_s) == (4, 12.0)
    assert profiler.summary()["Slow 2.on_train_start"]["share"] == 12.0 / 20.0


def test_hook_inside_a_hook_is_counted_once():
    clock, profiler = ManualClock(), quiet()

    def save(run: Run) -> None:
        clock.now += 1.0
        hooks.on_save_checkpoint(run, {})

    def add(run: Run, checkpoint: dict[str, Any]) -> None:
        clock.now += 4.0

    callback = LambdaCallback(on_save_point=save, on_save_checkpoint=add)
    hooks = CallbackList([profiler, callback], TrainModule())
    hooks.on_save_point(Run(clock=clock))
    assert profiler.times["LambdaCallback.on_save_checkpoint"].total_s == 4.0
    assert profiler.times["LambdaCallback.on_save_point"].total_s == 1.0


def test_hook_that_raises_is_timed_too():
    clock, profiler = ManualClock(), quiet()

    def fail(run: Run) -> None:
        clock.now += 1.0
        raise KeyError("gone")

    hooks = CallbackList([profiler, LambdaCallback(on_fit_end=fail)], TrainModule())
    with pytest.raises(KeyError):
        hooks.on_fit_end(Run(clock=clock))
    assert profiler.times["LambdaCallback.on_fit_end"].total_s == 1.0


def test_what_a_hook_returns_is_passed_on():
    hooks, run = CallbackList([quiet(), Slow(ManualClock(), 0.0)], TrainModule()), Run()
    assert hooks.on_train_batch_start(run, {}, 1) == -1
    assert hooks.on_train_batch_start(run, {}, 0) is None


def test_hooks_are_called_as_they_are_without_a_profiler():
    slow = Slow(ManualClock(), 0.0)
    hooks = CallbackList([slow], TrainModule())
    assert hooks.on_train_start == slow.on_train_start


def test_nothing_is_asked_for_in_a_step_without_a_trace():
    hooks = CallbackList([quiet()], TrainModule())
    each = ("on_train_batch_start", "on_train_batch_end", "on_save_point", "on_report")
    assert not any(hooks.has(name) for name in each)
    assert hooks.stops == ()


def test_table_has_the_hooks_of_callbacks_and_module():
    class Module(tiny.Tiny):
        def on_train_epoch_end(self, run: Run) -> None: ...

    profiler = quiet()
    tiny.fit(module=Module(), callbacks=[profiler], max_epochs=2)
    assert profiler.times["Module.on_train_epoch_end"].calls == 2
    assert profiler.times["Probe.on_train_end"].calls == 1
    assert [column.header for column in profiler.table().columns] == [
        *("hook", "calls", "total ms", "mean us", "share"),
    ]
    assert sum(row["share"] for row in profiler.summary().values()) < 1.0


@pytest.mark.parametrize("call", ["fit", "test"])
def test_tables_are_printed_at_the_end(call: str):
    out = Console(file=io.StringIO(), width=100, color_system=None, force_terminal=False)
    trainer = tiny.make_trainer([Profiler(console=out), Timer(verbose=False)], max_epochs=1)
    options: dict[str, Any] = {} if call == "fit" else {"verbose": False}
    getattr(trainer, call)(tiny.Tiny(), tiny.make_batches(2), **options)
    text = out.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]
    assert "Timer.setup" in text
    assert "compilation" in text


def test_small_times_are_put_together():
    times = {f"hook {i}": (2, 1e-6 * i) for i in range(14)} | {"long": (1, 1.0)}
    rows = list(zip(*(column.cells for column in hook_table(times, 2.0).columns), strict=True))
    assert rows[0] == ("long", "1", "1,000.0", "1,000,000.0", "50.0%")
    assert len(rows) == 11
    assert rows[-1][:2] == ("5 others", "10")


def test_second_call_is_timed_by_itself():
    profiler = quiet()
    trainer = tiny.make_trainer([profiler], max_epochs=1)
    trainer.fit(tiny.Tiny(), tiny.make_batches(2))
    trainer.test(tiny.Tiny(), tiny.make_batches(2), verbose=False)
    assert set(profiler.times) == {"Profiler.setup", "Profiler.teardown"}


class Trace:
    """Stands in for JAX's profiler, and keeps the steps at which it was called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[int] = []
        self.waits = 0
        self.folder = Path()
        self.run: Run | None = None
        wait = jax.block_until_ready

        def start(folder: str) -> None:
            self._note()
            self.folder = Path(folder) / "plugins" / "profile" / "now"

        def stop() -> None:
            self._note()
            self.folder.mkdir(parents=True)
            (self.folder / "vm.xplane.pb").touch()

        def block(x: Any) -> Any:
            self.waits += 1
            return wait(x)

        monkeypatch.setattr(jax.profiler, "start_trace", start)
        monkeypatch.setattr(jax.profiler, "stop_trace", stop)
        monkeypatch.setattr(jax, "block_until_ready", block)

    def _note(self) -> None:
        assert self.run is not None
        self.steps.append(self.run.global_step)

    def fit(self, profiler: Profiler, more: Sequence[Callback] = (), **options: Any) -> Any:
        watch = LambdaCallback(setup=lambda run: setattr(self, "run", run))
        return tiny.fit(callbacks=[watch, profiler, *more], **{"max_epochs": 2, **options})


@pytest.fixture
def trace(monkeypatch: pytest.MonkeyPatch) -> Trace:
    return Trace(monkeypatch)


@pytest.mark.parametrize("dispatch", [1, 4], ids=["single", "fused"])
@pytest.mark.parametrize(
    ("steps", "at"),
    [
        ((6, 7), [5, 7]),  # within an epoch, within a fused dispatch
        ((1, 3), [0, 3]),  # from the start
        ((7, 10), [6, 10]),  # over the end of an epoch
        ((3, 8), [2, 8]),  # to the end of an epoch
        ((16, 16), [15, 16]),  # the last step
        ((14, 40), [13, 16]),  # beyond the end
    ],
)
def test_trace_begins_and_ends_at_its_steps(
    trace: Trace, tmp_path: Path, dispatch: int, steps: tuple[int, int], at: list[int]
):
    trace.fit(quiet(tmp_path, steps=steps), steps_per_dispatch=dispatch)
    assert trace.steps == at
    assert trace.waits == 2


def test_trace_ends_before_a_validation(trace: Trace, tmp_path: Path):
    seen = []
    first = LambdaCallback(
        on_validation_batch_start=lambda run, batch, batch_idx: seen.append(trace.steps.copy())
    )
    profiler = quiet(tmp_path, steps=(3, 4))
    trace.fit(
        profiler,
        more=[first],
        val_loader=tiny.make_batches(1),
        val_check_interval=4,
        max_epochs=1,
    )
    assert seen == [[2, 4], [2, 4]]


def test_trace_counts_updates_under_accumulation(trace: Trace, tmp_path: Path):
    trace.fit(quiet(tmp_path, steps=(2, 3)), accumulate_grad_batches=2)
    assert trace.steps == [1, 3]


def test_trace_of_a_resumed_run_begins_where_it_can(trace: Trace, tmp_path: Path):
    saver = Checkpoint(tmp_path / "run", every_n_train_steps=5)
    tiny.fit(callbacks=[saver], max_steps=5)
    trace.fit(quiet(tmp_path, steps=(4, 7)), ckpt_path=tmp_path / "run")
    assert trace.steps == [5, 7]


def test_trace_does_not_change_the_training(trace: Trace, tmp_path: Path):
    _, traced = trace.fit(quiet(tmp_path, steps=(6, 7)))
    _, plain = tiny.fit(max_epochs=2)
    tiny.assert_same_bits(traced, plain)


def test_trace_stops_when_training_fails(trace: Trace, tmp_path: Path):
    def fail(run: Run) -> None:
        raise KeyError("gone")

    profiler, failing = quiet(tmp_path, steps=(2, 100)), LambdaCallback(on_train_epoch_end=fail)
    with pytest.raises(KeyError, match="gone"):
        trace.fit(profiler, more=[failing])
    assert trace.steps == [1, 8]
    assert profiler.trace_path is not None


def test_run_that_ends_before_its_steps_says_so(trace: Trace, tmp_path: Path):
    profiler = quiet(tmp_path, steps=(20, 30))
    trace.fit(profiler)
    assert trace.steps == []
    assert profiler.trace_path is None
    assert trace.run is not None
    assert "training went from step 0 to 16 and steps=(20, 30)" in trace.run.notices[-1]


def test_trace_is_written_and_its_file_named(tmp_path: Path):
    profiler, summary = quiet("profile", steps=(2, 3)), ModelSummary(console=Console(quiet=True))
    module = tiny.Tiny(make=tiny.line)
    trainer = tiny.make_trainer([profiler, summary], max_epochs=1, default_root_dir=tmp_path)
    trainer.fit(module, tiny.make_loader())
    assert profiler.trace_path is not None
    path = Path(profiler.trace_path)
    assert path.is_relative_to(tmp_path / "profile")
    assert path.stat().st_size > 0
    assert list(path.parent.glob("*.trace.json.gz"))
    assert module.run is not None
    (notice,) = [text for text in module.run.notices if text.startswith("Profiler")]
    assert f"steps 2 to 3 are in {path}" in notice


def test_trace_that_somebody_else_runs_is_left_alone(tmp_path: Path):
    profiler, module = quiet(tmp_path / "ours", steps=(2, 3)), tiny.Tiny(make=tiny.line)
    with jax.profiler.trace(str(tmp_path / "theirs")):
        tiny.fit(module=module, callbacks=[profiler], max_epochs=1)
    assert profiler.trace_path is None
    assert module.run is not None
    assert any("Only one profile may be run" in text for text in module.run.notices)
    assert list((tmp_path / "theirs").rglob("*.xplane.pb"))


@pytest.mark.parametrize(
    "options",
    [
        {"steps": (1, 2)},
        {"dirpath": "profile"},
        {"dirpath": "profile", "steps": (0, 2)},
        {"dirpath": "profile", "steps": (5, 4)},
        {"dirpath": "profile", "steps": 10},
    ],
)
def test_option_that_cannot_work_is_refused(options: dict[str, Any]):
    with pytest.raises(ConfigError, match=r"steps=\(10, 20\)"):
        Profiler(**options)


def test_directory_that_cannot_be_written_is_refused_before_compilation(tmp_path: Path):
    (tmp_path / "file").touch()
    profiler = quiet(tmp_path / "file" / "below", steps=(1, 2))
    refused(RunDirError, "Profiler cannot write in", callbacks=[profiler])
