"""The batch size that is found: by the compiler's account, and that the run is one of that size."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import pytest

from jaxtrainer import DataModule, data
from jaxtrainer.callbacks import BatchSizeFinder, Checkpoint, LearningRateFinder
from jaxtrainer.callbacks.batch_size_finder import between, last_that
from jaxtrainer.errors import ConfigError, OptionError
from jaxtrainer.memory import free_bytes, host_bytes, is_out_of_memory
from jaxtrainer.probe import Sizes
from tests import tiny
from tests.bad_input import Compilations, assert_says, module_with, refused

pytestmark = pytest.mark.usefixtures("compiled_once")

LINE = 30_000
"""Bytes of a device that the training of `Tiny` fits in with some tens of samples."""


def tuned(finder: BatchSizeFinder, loader: Any = None, module: Any = None, **options: Any) -> Any:
    """Run the finder alone, and return the module."""
    module = module or tiny.Tiny()
    loader = tiny.make_loader(512) if loader is None else loader
    tiny.make_trainer([finder], **options).tune(module, loader)
    return module


class FakeProbe:
    """A device with `limit` bytes on which each sample needs ten, and runs only up to `runs`."""

    def __init__(
        self, limit: int, runs: int = 1 << 30, num_shards: int = 1, num_samples: int = 1 << 10
    ) -> None:
        self.run = self.module = tiny.Tiny()
        self.limit, self.runs = limit, runs
        self.tried: list[int] = []
        self.loader = tiny.make_loader(1 << 10, 1)
        self.num_shards, self.num_samples = num_shards, num_samples
        self.datamodule = None
        self.is_resumed = self.asks_for_loader = False
        self.notices: list[str] = []

    def notice(self, text: str) -> None:
        self.notices.append(text)

    def sizes(self) -> Sizes:
        return Sizes(self.loader.batch_size, self.num_samples, self.num_shards)

    def free_bytes(self) -> int:
        return self.limit

    def step_bytes(self, batch_size: int) -> int | None:
        return None if batch_size > 900 else 10 * batch_size

    def try_step(self, batch_size: int) -> bool:
        self.tried.append(batch_size)
        return batch_size <= self.runs


def search(limit: int, options: Any = None, **device: int) -> Any:
    """Return the finder and its probe after a search on a made-up device."""
    probe: Any = FakeProbe(limit, **device)
    probe.run = probe
    finder = BatchSizeFinder(**{"margin": 0.0, **(options or {})})
    finder.tune(probe)
    return finder, probe


def test_power_finds_the_largest_doubling_that_fits():
    finder, probe = search(1000)
    assert finder.batch_size == 64
    assert probe.tried == [64]
    assert probe.loader.batch_size == 64


def test_binsearch_goes_on_to_within_a_few_per_cent():
    finder, _ = search(1000, {"mode": "binsearch"})
    assert finder.batch_size is not None
    assert 97 <= finder.batch_size <= 100
    assert all(trial.fits == (trial.batch_size <= 100) for trial in finder.trials)


def test_trials_are_few_and_in_order():
    finder, _ = search(1000)
    sizes = [trial.batch_size for trial in finder.trials]
    # Of the ten powers from 2 to 1024, bisection compiles four at most.
    assert sizes == sorted(sizes)
    assert len(sizes) <= 4
    assert [t.bytes_needed for t in finder.trials] == [None if n > 900 else 10 * n for n in sizes]


def test_margin_stays_free():
    assert search(640, {"margin": 0.0})[0].batch_size == 64
    assert search(640, {"margin": 0.01})[0].batch_size == 32


def test_size_that_runs_out_of_memory_is_halved():
    finder, probe = search(1000, runs=20)
    assert probe.tried == [64, 32, 16]
    assert finder.batch_size == 16
    assert {t.batch_size: t.fits for t in finder.trials}[64] is False


def test_sizes_are_multiples_of_the_devices():
    finder, _ = search(2000, {"mode": "binsearch"}, num_shards=6)
    assert all(trial.batch_size % 6 == 0 for trial in finder.trials)
    assert finder.batch_size in (192, 198)


@pytest.mark.parametrize(("options", "expected"), [({"max_val": 40}, 32), ({"init_val": 3}, 96)])
def test_sizes_stay_within_the_bounds(options: Any, expected: int):
    assert search(1000, options)[0].batch_size == expected


def test_nothing_that_fits_is_refused():
    with pytest.raises(ConfigError) as caught:
        search(10)
    assert_says(caught.value, "no batch size fits", "2 samples need 20 B", "has 10 B")


def test_no_step_that_runs_is_refused():
    with pytest.raises(ConfigError) as caught:
        search(1000, {"init_val": 3}, runs=1)
    # Tried with 96, 48, ... 6, 3.
    assert_says(caught.value, "3 samples need 30 B by the compiler's account, and ran out")


@pytest.mark.parametrize(
    ("num_samples", "words"), [(1 << 10, "sizes compiled)"), (100, "none too large)")]
)
def test_notice_says_what_was_found(num_samples: int, words: str):
    _, probe = search(1000, num_samples=num_samples)
    (line,) = probe.notices
    assert line.startswith("batch size 64: needs 640 B of the 1000 B of a device")
    assert words in line


@pytest.mark.slow
def test_more_memory_finds_a_larger_batch():
    small, large = (BatchSizeFinder(memory_bytes=LINE * k) for k in (1, 4))
    tuned(small)
    tuned(large)
    assert small.batch_size is not None
    assert large.batch_size is not None
    assert small.batch_size < large.batch_size


def test_size_that_is_found_fits_and_twice_does_not():
    finder = BatchSizeFinder(memory_bytes=LINE, margin=0.0)
    loader = data.from_arrays(tiny.make_arrays(512), batch_size=2, device_resident=False)
    tuned(finder, loader)
    size = finder.batch_size
    assert size is not None
    trainer, module = tiny.make_trainer(), tiny.Tiny()
    peaks = [trainer.plan(module, tiny.make_batches(1, n)[0]).peak_bytes for n in (size, 2 * size)]
    # Beside the step's own memory there is that of the chunks that wait, 20 bytes a sample.
    waiting = [5 * 4 * 20 * n for n in (size, 2 * size)]
    assert peaks[0] + waiting[0] <= LINE < peaks[1] + waiting[1]


@pytest.mark.slow
def test_bytes_needed_are_at_least_those_of_state_data_and_batch():
    finder = BatchSizeFinder(memory_bytes=LINE * 100)
    arrays = tiny.make_arrays(512)
    tuned(finder, data.from_arrays(arrays, batch_size=2))
    state = tiny.make_trainer().plan(tiny.Tiny(), tiny.make_batches(1)[0]).state_bytes
    resident = sum(a.nbytes for a in arrays.values())
    for trial in finder.trials:
        assert trial.bytes_needed is not None
        assert trial.bytes_needed >= state + resident + 20 * trial.batch_size


@pytest.mark.slow
def test_run_after_the_finder_is_one_of_that_size():
    finder = BatchSizeFinder(memory_bytes=LINE // 2, init_val=4)
    result, state = tiny.fit(tiny.make_loader(64, 2), callbacks=[finder], max_epochs=2)
    assert finder.batch_size in (4, 8, 16, 32)  # not the whole epoch
    assert result.num_steps == 2 * 64 // finder.batch_size
    _, expected = tiny.fit(tiny.make_loader(64, finder.batch_size), max_epochs=2)
    tiny.assert_same_bits(state, expected)


def test_sizes_are_judged_by_compiling_them_once():
    seen, finder = Compilations(), BatchSizeFinder(memory_bytes=LINE)
    tiny.fit(tiny.make_loader(64, 2), callbacks=[seen, finder], max_epochs=1)
    looked_at = [f"train step for {t.batch_size} samples" for t in finder.trials]
    assert sorted(seen.names) == sorted([*looked_at, "train step"])


@pytest.mark.parametrize(("mode", "expected"), [("power", 64), ("binsearch", 100)])
def test_all_sizes_fit_up_to_the_samples_of_an_epoch(mode: str, expected: int):
    assert search(1 << 30, {"mode": mode}, num_samples=100)[0].batch_size == expected


class Numbers(DataModule):
    def __init__(self, make: Callable[[int], Any] = lambda n: tiny.make_loader(64, n)) -> None:
        self.batch_size = 2
        self.make = make

    def train_dataloader(self) -> Any:
        return self.make(self.batch_size)


def test_data_module_is_asked_for_a_loader_of_that_size():
    finder, numbers = BatchSizeFinder(memory_bytes=LINE), Numbers()
    trainer = tiny.make_trainer([finder], max_epochs=1)
    result = trainer.fit(tiny.Tiny(), datamodule=numbers)
    assert numbers.batch_size == finder.batch_size
    assert result.num_steps == 64 // numbers.batch_size


def test_module_with_loaders_of_its_own_is_asked():
    finder = BatchSizeFinder(memory_bytes=LINE)
    module = module_with(train_dataloader=lambda self: tiny.make_loader(64, self.batch_size))
    setattr(module, "batch_size", 2)  # noqa: B010
    tiny.make_trainer([finder], max_epochs=1).fit(module)
    assert getattr(module, "batch_size") == finder.batch_size  # noqa: B009


def test_function_makes_the_loader():
    finder = BatchSizeFinder(lambda n: iter(tiny.make_batches(4, n)), memory_bytes=LINE)
    result, _ = tiny.fit(iter(tiny.make_batches(1)), callbacks=[finder], max_epochs=1)
    # Its size is looked at in the first batch, which is trained on nevertheless.
    assert result.num_steps == 4
    assert result.num_samples == 4 * (finder.batch_size or 0)


@pytest.mark.slow
def test_transform_on_the_device_stays():
    halved = data.on_device(tiny.make_loader(64, 2), lambda b: {**b, "x": b["x"] / 2})
    finder = BatchSizeFinder(memory_bytes=LINE)
    _, state = tiny.fit(halved, callbacks=[finder], max_epochs=1)
    plain = tiny.make_loader(64, finder.batch_size or 0)
    same = data.on_device(plain, lambda b: {**b, "x": b["x"] / 2})
    tiny.assert_same_bits(state, tiny.fit(same, max_epochs=1)[1])


@pytest.mark.slow
def test_size_is_found_on_several_devices():
    finder = BatchSizeFinder(memory_bytes=LINE)
    tuned(finder, mesh={"data": 8})
    assert finder.batch_size is not None
    assert finder.batch_size % 8 == 0
    tuned(alone := BatchSizeFinder(memory_bytes=LINE))
    # A device holds its part of the batch only.
    assert finder.batch_size > (alone.batch_size or 0)


@pytest.mark.slow
def test_resumed_run_goes_on_with_the_size_that_was_found(tmp_path: Any):
    def make() -> Any:
        return BatchSizeFinder(memory_bytes=LINE, max_val=8), Checkpoint(tmp_path / "run")

    loader = tiny.make_loader(64, 2)
    _, expected = tiny.fit(loader, callbacks=make()[:1], max_epochs=2)
    tiny.fit(loader, callbacks=make(), max_steps=5)
    (finder, saver), seen = make(), Compilations()
    callbacks = [seen, finder, saver]
    _, state = tiny.fit(loader, callbacks=callbacks, max_epochs=2, ckpt_path="last")
    assert seen.names == ["train step"]
    assert finder.batch_size == 8
    tiny.assert_same_bits(state, expected)


@pytest.mark.slow
def test_batch_size_is_found_before_the_learning_rate():
    class Rated(tiny.Tiny):
        learning_rate = 1e-3

        def configure_optimizers(self) -> Any:
            return tiny.optax.adam(self.learning_rate)

    seen = Compilations()
    finders = LearningRateFinder(num_training_steps=5), BatchSizeFinder(memory_bytes=LINE)
    trainer = tiny.make_trainer([*finders, seen])
    trainer.tune(Rated(), tiny.make_loader(64, 2))
    assert seen.names[-1] == "learning rate range test"
    assert len(seen.names) > 1


def test_list_of_batches_is_refused():
    callbacks = [BatchSizeFinder()]
    words = "cannot make a list with another batch size", "`BatchSizeFinder(lambda n:"
    refused(ConfigError, *words, callbacks=callbacks)


def test_data_module_without_the_attribute_is_refused():
    finder = BatchSizeFinder(attr="batchsize")
    with pytest.raises(ConfigError) as caught:
        tiny.make_trainer([finder]).tune(tiny.Tiny(), datamodule=Numbers())
    assert_says(caught.value, "neither the data module nor the module", "'batch_size'")


def test_data_module_that_ignores_the_attribute_is_refused():
    finder = BatchSizeFinder(memory_bytes=LINE)
    numbers = Numbers(lambda n: tiny.make_loader(64, 2))
    with pytest.raises(ConfigError) as caught:
        tiny.make_trainer([finder]).tune(tiny.Tiny(), datamodule=numbers)
    assert_says(caught.value, "asked train_dataloader", "and got 2", "`self.batch_size`")


def test_too_few_samples_for_the_devices_are_refused():
    with pytest.raises(ConfigError, match="divides over 8 devices"):
        tuned(BatchSizeFinder(), tiny.make_loader(6, 2), mesh={"data": 8})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mode": "linear"}, "use 'power' or 'binsearch'"),
        ({"margin": 1.0}, "the part of the memory to leave free"),
        ({"init_val": 0}, "init_val"),
        ({"init_val": 8, "max_val": 4}, "max_val"),
        ({"max_trials": 0}, "max_trials"),
        ({"memory_bytes": 1.5}, "memory_bytes"),
        ({"make_loader": []}, "a function from a batch size to a loader"),
    ],
)
def test_options_that_cannot_work_are_refused(options: Any, words: str):
    with pytest.raises(ConfigError, match=words):
        BatchSizeFinder(**options)


def test_option_of_another_library_is_explained():
    options: Any = {"steps_per_trial": 3}
    with pytest.raises(OptionError, match="One step tells"):
        BatchSizeFinder(**options)


def test_cpu_devices_share_the_memory_of_the_host():
    devices = jax.local_devices()
    assert free_bytes(devices[:1]) == host_bytes() > 1 << 27
    assert free_bytes(devices) == host_bytes() // len(devices)


def test_device_that_knows_its_limit_is_asked():
    class Device:
        def __init__(self, limit: int, used: int) -> None:
            self.stats = {"bytes_limit": limit, "bytes_in_use": used}

        def memory_stats(self) -> dict[str, int]:
            return self.stats

    assert free_bytes([Device(100, 10), Device(100, 30)]) == 70


def test_running_out_of_memory_is_told_from_other_errors():
    kind = jax.errors.JaxRuntimeError
    assert is_out_of_memory(kind("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes"))
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(kind("INVALID_ARGUMENT: shapes"))
    assert not is_out_of_memory(ValueError("RESOURCE_EXHAUSTED"))


def test_bisection_asks_few_sizes():
    asked: list[int] = []

    def fits(size: int) -> bool:
        asked.append(size)
        return size <= 700

    assert last_that(fits, list(range(1, 1001))) == 700
    assert len(asked) <= 10
    assert last_that(lambda size: False, [1, 2]) is None


@pytest.mark.parametrize("unit", [1, 8])
def test_sizes_between_two_are_even_multiples_up_to_the_end(unit: int):
    sizes = between(512, 1000, unit)
    assert sizes[-1] == 1000
    assert len(sizes) <= 32
    assert all(n % unit == 0 for n in sizes)
    assert np.all(np.diff([512, *sizes]) > 0)
