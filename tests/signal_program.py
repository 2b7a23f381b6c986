"""A program for `test_signal_matrix`: runs calls that linger in one phase, and says how each ended.

It prints `PHASE name` where it lingers, and gets a signal there; then the next call begins, so
that one process answers for a whole row of the matrix. With `--leave` the exception is not caught.
"""

from __future__ import annotations

import functools
import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jaxtrainer import Callback, Run, Trainer, assemble, waiting, watch
from jaxtrainer.callbacks import Checkpoint
from jaxtrainer.rundir import saved_steps
from jaxtrainer.store import CheckpointStore
from tests import tiny

PATIENCE_S = 60.0


def linger(phase: str, run: Run | None = None, at_most_s: float = PATIENCE_S) -> None:
    """Wait in a phase for a signal: until the run has it, or an exception comes."""
    print(f"PHASE {phase}", flush=True)
    ends = time.monotonic() + at_most_s
    while (run is None or run.stop_reason != "interrupted") and time.monotonic() < ends:
        time.sleep(0.01)


class At(Callback):
    """Lingers in one hook, once, and with `blocks` does not return; counts what ends a call."""

    may_log = False

    def __init__(self, phase: str, hook: str | None = None, blocks: bool = False) -> None:
        self.phase, self.hook, self.blocks = phase, hook, blocks
        self.is_spent = False
        self.teardowns = 0
        if hook is not None:
            setattr(self, hook, self.act)

    def act(self, run: Run, *_: Any) -> None:
        if self.is_spent or (self.hook == "on_train_batch_end" and run.global_step < 3):
            return
        self.is_spent = True
        # After the end of training a signal is no reason to stop any more.
        linger(self.phase, run, 2.0 if self.phase == "ending" else PATIENCE_S)
        if self.blocks:
            print(f"PHASE {self.phase}", flush=True)
            time.sleep(PATIENCE_S)

    def teardown(self, run: Run) -> None:
        self.teardowns += 1


class Tunes(Callback):
    def tune(self, probe: Any) -> None:
        linger("tuning", probe.run)


class SlowModel(tiny.Tiny):
    def configure_model(self, rngs: Any) -> Any:
        linger("initialisation")
        return super().configure_model(rngs)


class Tested(tiny.Tiny):
    test_step = tiny.Tiny.validation_step


class Stuck:
    """A loader that gives eight batches, and then nothing until the program ends."""

    def __iter__(self) -> Iterator[Any]:
        yield from tiny.make_batches(8)
        # Those that it has given are trained on by then, but for the two that are held back.
        time.sleep(1.0)
        print("PHASE data", flush=True)
        time.sleep(PATIENCE_S)


class Program:
    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.saver = Checkpoint(directory)
        self.at = At("")
        self.steps, self.sanity_steps = 1, 0
        self.at_run: Run | None = None

    def trainer(self, *callbacks: Callback, at: Callback | None = None) -> Trainer:
        self.at = at if isinstance(at, At) else At("")
        others = [at] if at is not None and at is not self.at else []
        options = {"max_epochs": 2, "steps_per_dispatch": self.steps}
        options["num_sanity_val_steps"] = self.sanity_steps
        cache = self.directory.parent / "cache"
        return tiny.make_trainer([self.at, *others, *callbacks], compilation_cache=cache, **options)

    def fit(self, *, at: Callback | None = None, **options: Any) -> Any:
        module = options.pop("module", None) or tiny.Tiny(make=tiny.line)
        loader = options.pop("loader", None) or tiny.make_batches(4)
        trainer = self.trainer(self.saver, at=at)
        result = trainer.fit(module, loader, tiny.make_batches(2), **options)
        assert tiny.params_of(module)
        return result

    def setup(self) -> Any:
        return self.fit(at=At("setup", "setup"))

    def initialisation(self) -> Any:
        return self.fit(module=SlowModel(make=tiny.line))

    def tuning(self) -> Any:
        return self.fit(at=Tunes())

    def compilation(self) -> Any:
        return self.fit(at=At("compilation", "on_compile_start"))

    def sanity(self) -> Any:
        self.sanity_steps = 1
        return self.fit(at=At("sanity", "on_sanity_check_start"))

    def restore(self) -> Any:
        cache = self.directory.parent / "cache"
        options = {"max_steps": 2, "steps_per_dispatch": 1, "compilation_cache": cache}
        trainer = tiny.make_trainer(self.saver, **options)
        trainer.fit(tiny.Tiny(make=tiny.line), tiny.make_batches(4))
        real = assemble.restore_state

        def restore_state(*args: Any) -> Any:
            linger("restore")
            return real(*args)

        with replaced(assemble, "restore_state", restore_state):
            return self.fit(ckpt_path="last")

    def start(self) -> Any:
        return self.fit(at=At("start", "on_train_start"))

    def training(self) -> Any:
        return self.fit(at=At("training", "on_train_batch_end"))

    def validation(self) -> Any:
        return self.fit(at=At("validation", "on_validation_batch_end"))

    def saving(self) -> Any:
        return self.fit(at=At("saving", "on_save_checkpoint"))

    def writing(self) -> Any:
        real = CheckpointStore._save_once

        def save(store: Any, step: int, *args: Any) -> None:
            if step == 4:
                linger("writing", self.at_run)
            real(store, step, *args)

        with replaced(CheckpointStore, "_save_once", save):
            return self.fit(at=self.keep_run())

    def keep_run(self) -> Callback:
        def on_train_start(run: Run) -> None:
            self.at_run = run

        at = At("")
        at.on_train_start = on_train_start  # pyright: ignore[reportAttributeAccessIssue]
        return at

    def data(self) -> Any:
        self.steps, waiting._HURRY_S = 2, 0.5
        return self.fit(loader=Stuck())

    def ending(self) -> Any:
        return self.fit(at=At("ending", "on_fit_end"))

    def hook(self) -> Any:
        return self.fit(at=At("hook", "on_train_batch_end", blocks=True))

    def validate(self) -> Any:
        at = At("validate", "on_validation_batch_end")
        return self.trainer(at=at).validate(tiny.Tiny(make=tiny.line), tiny.make_batches(2))

    def test(self) -> Any:
        at = At("test", "on_test_epoch_start")
        module = Tested(make=tiny.line)
        return self.trainer(at=at).test(module, tiny.make_batches(2), verbose=False)

    def predict(self) -> Any:
        at = At("predict", "on_predict_batch_end")
        return self.trainer(at=at).predict(tiny.Tiny(make=tiny.line), tiny.make_batches(2))

    def compiler(self) -> Any:
        """Be in compiled code that lets no handler run, as XLA's compiler does."""
        watch.GRACE_S = 0.5

        class Compiles(At):
            def on_compile_start(self, run: Run, name: str) -> None:
                # Said from another thread, when this one is in there.
                told = functools.partial(print, "PHASE compiler", flush=True)
                threading.Timer(1.0, told).start()
                hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)

        return self.fit(at=Compiles("compiler"))

    def stuck_save(self) -> Any:
        """Be asked twice while a save does not come to its end."""
        watch.GRACE_S = 0.5
        real = CheckpointStore._save_once

        def save(store: Any, step: int, *args: Any) -> None:
            if step == 3:
                print("PHASE stuck_save", flush=True)
                time.sleep(PATIENCE_S)
            real(store, step, *args)

        with replaced(CheckpointStore, "_save_once", save):
            self.saver = Checkpoint(self.directory, every_n_train_steps=1)
            return self.fit(at=At("stuck_save", "on_train_batch_end"))


class replaced:
    def __init__(self, owner: Any, name: str, value: Any) -> None:
        self.owner, self.name, self.value = owner, name, value

    def __enter__(self) -> None:
        self.before = getattr(self.owner, self.name)
        setattr(self.owner, self.name, self.value)

    def __exit__(self, *_: Any) -> None:
        setattr(self.owner, self.name, self.before)


def ended(call: Callable[[], Any]) -> str:
    try:
        result = call()
    except (KeyboardInterrupt, SystemExit) as error:
        return f"{type(error).__name__} {error}"
    return f"returned {getattr(result, 'stop_reason', '')}"


def main(root: str, *phases: str) -> None:
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    for phase in phases:
        program = Program(Path(root) / phase)
        if os.environ.get("LEAVE"):
            getattr(program, phase)()
            return
        outcome = {
            "phase": phase,
            "how": ended(getattr(program, phase)),
            "saved": saved_steps(program.directory),
            "teardowns": program.at.teardowns,
            "is_restored": handlers
            == [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)],
            "threads": [t.name for t in threading.enumerate() if t.name.startswith("jaxtrainer")],
            "children": len(multiprocessing.active_children()),
        }
        print("ENDED " + json.dumps(outcome), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
