"""`NonFinite`: what happens to a batch whose loss or gradients are NaN or infinite."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from jaxtrainer.callback import Callback
from jaxtrainer.errors import ConfigError, NonFiniteError, checks_options
from jaxtrainer.guard import SKIPPED, Guard, frozen_batch
from jaxtrainer.options import check_count
from jaxtrainer.remote import refuse_url
from jaxtrainer.run import Run


class NonFinite(Callback):
    """Look at the loss and gradients of every batch, inside the compiled step.

    A batch that is not finite changes nothing: parameters, optimiser, the model's own variables
    and averages stay as they were, to the bit, and the batches after it train as if it had not
    been there (it takes no random key either). The host learns of it with the next report or at
    the end of the epoch, without asking the device more often. `run.global_step` counts such a
    batch; the optimiser's own count does not.

    With precision `"16-mixed"` a batch that overflows while the loss scale can still fall is left
    out whatever the policy; it is in `train/skipped_batches`, and in no count here.

    Under accumulation the window is the mean of its other batches. Of a training step that makes
    its own updates the loss and the new parameters are looked at.

    It costs: every gradient is read once more, 5 % of the epoch of a small network on a CPU.

    Args:
        policy: `"raise"` ends the run with a NonFiniteError. Since the first such batch nothing
            was trained, so that the module has the weights before it. The error names epoch, step
            and samples, and where forensics can tell, the line of the program. `"skip"` leaves
            out up to `max_skips` batches of the run, which the series `train/skipped_batches`
            counts, and raises at the next one. `"restore"` goes back to the last checkpoint and
            on from there without the batch; it needs a `Checkpoint`.
        max_skips: Most batches to skip, or most times to restore.
        spike_z: With `"skip"` or `"restore"`, leave out batches too whose gradients' norm is more
            than this many standard deviations above its running mean, any number of them. Mean
            and deviation are in the checkpoint.
        warm_up: Batches whose norms are learnt before any is called a spike.
        forensics: On the first batch that is not skipped, run it once more, operation by
            operation, to find the first that gave no finite number. Nothing is kept for it: the
            state stands still, and the loader is asked for the batch again.
        dirpath: Where to write what is needed to run the batch once more; None writes nothing.

    Raises:
        ConfigError: For options that contradict each other.

    Example:
        >>> callbacks = [NonFinite(), NonFinite("skip", max_skips=3)]
    """

    order = 1
    may_log = False
    _elsewhere: ClassVar[dict[str, str]] = {
        "monitor": "It looks at loss and gradients; `TerminateOnNaN` watches a series.",
    }

    @checks_options
    def __init__(
        self,
        policy: Literal["raise", "skip", "restore"] = "raise",
        *,
        max_skips: int | None = None,
        spike_z: float | None = None,
        warm_up: int = 100,
        forensics: bool = True,
        dirpath: str | os.PathLike[str] | None = "non_finite",
    ) -> None:
        if policy not in ("raise", "skip", "restore"):
            raise ConfigError(f"policy={policy!r}: use 'raise', 'skip' or 'restore'.")
        given = {"max_skips": max_skips, "spike_z": spike_z}
        for name, value in given.items() if policy == "raise" else ():
            if value is not None:
                raise ConfigError(
                    f"NonFinite({name}={value!r}): policy='raise' leaves no batch out; use "
                    f"`NonFinite('skip', {name}={value!r})`."
                )
        if spike_z is not None and not spike_z > 0:
            raise ConfigError(f"spike_z={spike_z!r}: pass a number above 0, e.g. 5.")
        self.policy = policy
        self.max_skips = 10 if max_skips is None else check_count("max_skips", max_skips)
        self.spike_z = spike_z
        self.warm_up = check_count("warm_up", warm_up)
        self.forensics = forensics
        refuse_url("NonFinite", dirpath)
        self.given_dirpath = None if dirpath is None else os.fspath(dirpath)
        self.dirpath = self.given_dirpath
        self._run: Run | None = None

    def guard(self, run: Run) -> Guard:
        """Return what the step does: `"raise"` and `"restore"` freeze the state at once."""
        skips = self.max_skips if self.policy == "skip" else 0
        return Guard(max_skips=skips, spike_z=self.spike_z, warm_up=self.warm_up)

    def setup(self, run: Run) -> None:
        """Keep the run, which has what a checkpoint is to know."""
        self._run = run

    def teardown(self, run: Run) -> None:
        """Let go of it."""
        self._run = None

    def on_report(self, run: Run, metrics: Mapping[str, float], step: int) -> None:
        """Look whether the state is frozen."""
        self._look(run, metrics)

    def on_train_epoch_end(self, run: Run) -> None:
        """Look at what came after the last report."""
        self._look(run, run.metrics)

    def on_train_end(self, run: Run) -> None:
        """Say how many batches were left out."""
        if skipped := int(run.metrics.get(SKIPPED, 0)):
            run.notice(f"NonFinite left out {skipped} batches that were not finite, or spikes")

    def state_dict(self) -> dict[str, Any]:
        """Return which batches are to be left out."""
        left_out = [] if self._run is None else sorted(self._run.left_out)
        return {"left_out": left_out} if left_out else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Leave them out again."""
        if self._run is not None:
            self._run.left_out |= set(state["left_out"])

    def _look(self, run: Run, metrics: Mapping[str, float]) -> None:
        batch = frozen_batch(metrics)
        if batch is None or run.stop_reason == "restore":
            return
        error = self._error(run, batch)
        if self.policy != "restore":
            raise error
        why = self._why_no_restore(run)
        if why:
            error.add_note(f"not restored: {why}")
            raise error
        run.left_out.add(batch)
        run.restores += 1
        run.notice(f"{error.args[0]} Going on from {run.last_checkpoint}, without the batch")
        run.stop("restore")

    def _why_no_restore(self, run: Run) -> str:
        if run.last_checkpoint is None:
            return "there is no checkpoint yet; save more often: `Checkpoint(every_n_train_steps=)`"
        if run.restores >= self.max_skips:
            return f"that was done {run.restores} times, and max_skips={self.max_skips}"
        return ""

    def _error(self, run: Run, batch: int) -> NonFiniteError:
        batch_idx = batch - (run.total_batches - run.batch_idx)
        step = _step_of(run, batch_idx)
        directory = None
        if self.dirpath is not None:
            directory = Path(self.dirpath) / f"epoch_{run.epoch}_batch_{batch_idx}"
        after = f", after {self.max_skips} that were skipped" if self.policy == "skip" else ""
        text = (
            f"the loss or the gradients of batch {batch_idx} in epoch {run.epoch} (optimiser step "
            f"{step}) are not finite{after}."
        )
        error = NonFiniteError(text)
        evidence = None
        if self.forensics and run.examine is not None:
            evidence = run.examine(run.epoch, batch_idx, directory)
            notes = (evidence.samples, evidence.finding, evidence.problem)
            for note in filter(None, notes):
                error.add_note(str(note))
            if evidence.directory is not None:
                error.add_note(f"to run it once more: python {evidence.directory / 'run.py'}")
        error.add_note("module.model has the weights before that batch")
        error.evidence = evidence
        return error


def _step_of(run: Run, batch_idx: int) -> int:
    """Return the optimiser step of a batch of this epoch."""
    ended = -(-run.batch_idx // run.accumulate) if run.is_epoch_end else None
    ended = run.batch_idx // run.accumulate if ended is None else ended
    return run.global_step - ended + batch_idx // run.accumulate + 1
