"""`BatchSizeFinder`: the largest batch that fits, by the compiler's own account of memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import jax

from jaxtrainer.callback import Callback
from jaxtrainer.display.text import format_bytes
from jaxtrainer.errors import ConfigError, checks_options, did_you_mean
from jaxtrainer.options import check_count
from jaxtrainer.probe import Probe

_RESOLUTION = 32
"""`binsearch` looks at sizes one part in this many apart: each that it tries is a compilation."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One batch size that was looked at.

    Attributes:
        batch_size: Samples.
        bytes_needed: Bytes that training with it needs on a device; None where the compiler
            refused it.
        fits: Whether it fits.
    """

    batch_size: int
    bytes_needed: int | None
    fits: bool


class BatchSizeFinder(Callback):
    """Find the largest batch size with which a training step fits the memory of a device.

    Runs in `fit` before the step is compiled, and in `Trainer.tune`. The step is compiled for a
    few candidate sizes from shapes alone, and the compiler says what each needs; nothing is
    allocated. The largest that fits is then tried with one step on zeros, and halved while the
    device runs out of memory all the same. Memory that validation needs beyond that of training
    is not counted. On a resumed run the size comes from the checkpoint. `fast_dev_run` keeps the
    loader as it is. A `LearningRateFinder` beside it goes second.

    The training loader is made again with the size that was found: by `make_loader`; or by the
    `train_dataloader` of the data module or module, which reads the attribute; or, if it is one
    of `data.from_arrays`, from the same arrays.

    Args:
        make_loader: Function from a batch size to the training loader, which takes the place of
            the one that was passed to `fit`.
        mode: `"power"` doubles the size, `"binsearch"` then goes on to within a few per cent.
        init_val: The smallest size; rounded up to a multiple of the devices.
        max_val: The largest; no size is larger than the samples of an epoch either.
        max_trials: Most doublings, and most sizes that are compiled.
        margin: Part of the memory that is left free.
        attr: Attribute of the data module, or else of the module, that is set to the size. It has
            to be there only if `train_dataloader` makes the loader.
        memory_bytes: Memory of one device. None asks the device; CPU devices share the host's.

    Attributes:
        batch_size: The size that was found; None before.
        trials: What was looked at, by size.

    Raises:
        ConfigError: If no size fits, or the loader cannot be made again.

    Example:
        >>> finder = BatchSizeFinder(mode="binsearch", max_val=1024)
    """

    # Before the learning rate, which depends on it.
    order = -2
    _elsewhere: ClassVar[dict[str, str]] = {
        "steps_per_trial": "One step tells; most sizes are judged without running any.",
        "batch_arg_name": "It is called `attr`.",
    }

    @checks_options
    def __init__(
        self,
        make_loader: Callable[[int], Any] | None = None,
        *,
        mode: Literal["power", "binsearch"] = "power",
        init_val: int = 2,
        max_val: int = 8192,
        max_trials: int = 25,
        margin: float = 0.05,
        attr: str = "batch_size",
        memory_bytes: int | None = None,
    ) -> None:
        if make_loader is not None and not callable(make_loader):
            raise ConfigError(
                f"make_loader={make_loader!r}: pass a function from a batch size to a loader: "
                "`lambda n: data.from_arrays(arrays, batch_size=n)`."
            )
        if mode not in ("power", "binsearch"):
            raise ConfigError(f"mode={mode!r}: use 'power' or 'binsearch'.")
        if not 0 <= margin < 1:
            raise ConfigError(
                f"margin={margin!r} is the part of the memory to leave free: pass 0 to 1."
            )
        self.make_loader = make_loader
        self.mode = mode
        self.init_val = check_count("init_val", init_val)
        self.max_val = check_count("max_val", max_val, self.init_val)
        self.max_trials = check_count("max_trials", max_trials)
        self.margin = margin
        self.attr = attr
        self.memory_bytes = memory_bytes
        if memory_bytes is not None:
            check_count("memory_bytes", memory_bytes)
        self._reset()

    def _reset(self) -> None:
        self.batch_size: int | None = None
        self._trials: dict[int, Trial] = {}

    @property
    def trials(self) -> list[Trial]:
        """Return what was looked at, by size."""
        return [self._trials[size] for size in sorted(self._trials)]

    def tune(self, probe: Probe) -> None:
        """Find the size, and put a loader of that size in place."""
        if probe.is_resumed:
            if self.batch_size is not None:
                self._check_loader(probe)
                self._set(probe, self.batch_size)
            return
        self._reset()
        if self.memory_bytes is None and jax.process_count() > 1:
            raise ConfigError(
                "BatchSizeFinder: each process would ask its own devices, and they may find "
                "different sizes; pass `BatchSizeFinder(memory_bytes=...)`."
            )
        limit = probe.free_bytes() if self.memory_bytes is None else self.memory_bytes
        size = self._search(probe, limit)
        self._set(probe, size)
        self.batch_size = size
        needed = format_bytes(self._trials[size].bytes_needed or 0)
        end = "" if not all(t.fits for t in self.trials) else ", none too large"
        probe.run.notice(
            f"batch size {size}: needs {needed} of the {format_bytes(limit)} of a device "
            f"({len(self.trials)} sizes compiled{end})"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return the size that was found."""
        return {"batch_size": self.batch_size}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take it back."""
        self.batch_size = state["batch_size"]

    def _search(self, probe: Probe, limit: int) -> int:
        """Return the largest size that fits, by the compiler's account and by one step."""
        self._check_loader(probe)
        usable = int(limit * (1 - self.margin))
        smallest, top, unit = self._bounds(probe)
        powers = [smallest << i for i in range(self.max_trials) if smallest << i <= top]

        def fits(size: int) -> bool:
            needed = probe.step_bytes(size)
            is_small = needed is not None and needed <= usable
            self._trials[size] = Trial(batch_size=size, bytes_needed=needed, fits=is_small)
            return is_small

        size = last_that(fits, powers)
        if size is not None and self.mode == "binsearch":
            finer = between(size, min(2 * size - 1, top), unit)
            size = last_that(fits, finer) or size
        while size is not None and size >= smallest and fits(size):
            if probe.try_step(size):
                return size
            self._trials[size] = replace(self._trials[size], fits=False)
            size = size // 2 // unit * unit
        raise ConfigError(self._none_fits(limit))

    def _bounds(self, probe: Probe) -> tuple[int, int, int]:
        """Return the smallest and the largest size, and what sizes are multiples of."""
        _, num_samples, num_shards = probe.sizes()
        smallest = -(-self.init_val // num_shards) * num_shards
        top = self.max_val if num_samples is None else min(self.max_val, num_samples)
        if top < smallest:
            raise ConfigError(
                f"BatchSizeFinder: no batch size from init_val={self.init_val} to {top} (max_val="
                f"{self.max_val}, {num_samples} samples) divides over {num_shards} devices; pass "
                "a smaller init_val, or `Trainer(mesh={'data': 1})`."
            )
        return smallest, top, num_shards

    def _check_loader(self, probe: Probe) -> None:
        """Raise ConfigError unless the loader can be made with another size."""
        if self.make_loader is not None:
            probe.loader = self.make_loader(self.init_val)
        elif probe.asks_for_loader:
            self._owner(probe)
        elif not hasattr(probe.loader, "with_batch_size"):
            raise ConfigError(
                f"BatchSizeFinder cannot make a {type(probe.loader).__name__} with another batch "
                "size; say how: `BatchSizeFinder(lambda n: make_my_loader(batch_size=n))`."
            )

    def _set(self, probe: Probe, size: int) -> None:
        if probe.asks_for_loader or hasattr(probe.module, self.attr):
            setattr(self._owner(probe), self.attr, size)
        if self.make_loader is not None:
            probe.loader = self.make_loader(size)
        elif probe.asks_for_loader:
            probe.reload()
        else:
            probe.loader = probe.loader.with_batch_size(size)
        if (got := probe.sizes().batch_size) != size:
            where = "make_loader" if self.make_loader else "train_dataloader"
            raise ConfigError(
                f"BatchSizeFinder asked {where} for batches of {size} samples and got {got}; use "
                + ("its argument." if self.make_loader else f"`self.{self.attr}` in it.")
            )

    def _owner(self, probe: Probe) -> Any:
        """Return who has the attribute: the data module, or else the module."""
        owners = [o for o in (probe.datamodule, probe.module) if o is not None]
        for owner in owners:
            if hasattr(owner, self.attr):
                return owner
        names = [name for owner in owners for name in vars(owner)]
        raise ConfigError(
            f"BatchSizeFinder(attr={self.attr!r}): neither the data module nor the module has it; "
            f"write `self.{self.attr} = {self.init_val}` in `__init__`, and use it in "
            f"`train_dataloader`.{did_you_mean(self.attr, names)}"
        )

    def _none_fits(self, limit: int) -> str:
        trial = self.trials[0]
        needs = "more than the compiler allows"
        if trial.bytes_needed is not None:
            needs = format_bytes(trial.bytes_needed)
            if trial.bytes_needed <= limit * (1 - self.margin):
                needs += " by the compiler's account, and ran out of memory"
        return (
            f"BatchSizeFinder: no batch size fits. {trial.batch_size} samples need {needs}; a "
            f"device has {format_bytes(limit)}, of which {self.margin:.0%} stays free. Use a "
            "smaller model, or `Trainer(precision='bf16-mixed')`."
        )


def last_that(fits: Callable[[int], bool], sizes: Sequence[int]) -> int | None:
    """Return the last of the sizes that fits, by bisection: those before it fit, those after not.

    Example:
        >>> last_that(lambda size: size <= 20, [2, 4, 8, 16, 32, 64])
        16
    """
    low, high = -1, len(sizes)
    while high - low > 1:
        middle = (low + high) // 2
        if fits(sizes[middle]):
            low = middle
        else:
            high = middle
    return sizes[low] if low >= 0 else None


def between(low: int, high: int, unit: int) -> list[int]:
    """Return sizes above `low` up to `high`, multiples of `unit` a few per cent of `low` apart.

    Example:
        >>> between(64, 80, 8), between(64, 66, 1)
        ([72, 80], [66])
    """
    step = max(unit, low // _RESOLUTION // unit * unit)
    last = high // unit * unit
    sizes = [size for size in range(low + step, high + 1, step) if size % unit == 0]
    return sizes if not last > max([low, *sizes]) else [*sizes, last]
