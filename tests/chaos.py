"""Chaos: runs that are killed with SIGKILL at random moments, and must end on the same bits.

    python tests/chaos.py                          20 seeds of both models, two at a time
    python tests/chaos.py --seeds 3 --model norm   fewer, of one

Each seed starts a run in a process of its own, kills it at moments that the seed decides, starts
it again with `ckpt_path="last"`, and compares the digest of the final state with that of a run
that nobody disturbed. Saves come every few steps, so that many kills fall into one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MODELS = ("mnist", "norm")
KILLS = 3
PATIENCE_S = 200


@dataclass(kw_only=True)
class Outcome:
    """What became of one seed.

    Attributes:
        kills: Phase in which each kill fell: what the run had last told.
        in_save: How many of them left a save that was not finished.
        digest: Of the final state.
    """

    model: str
    seed: int
    kills: list[str] = field(default_factory=list)
    in_save: int = 0
    digest: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        killed = ", ".join(self.kills) or "never"
        saves = f" ({self.in_save} within a save)" if self.in_save else ""
        head = f"{self.model} seed {self.seed}: digest {self.digest[:16]}, {self.seconds:.1f} s"
        return f"{head}, killed {killed}{saves}"


def disturbed(model: str, seed: int, folder: Path, kills: int = KILLS) -> Outcome:
    """Run a model to its end, killed on the way, and return what became of it."""
    began, outcome = time.monotonic(), Outcome(model=model, seed=seed)
    moments = random.Random(f"{model} {seed}")
    for _ in range(kills):
        # Most kills fall into training; some hit the restore and the compilation before it.
        early = moments.random() < 0.2
        delay = moments.uniform(0.5, 2.5) if early else moments.uniform(0.0, 1.0)
        with _child(model, folder) as child:
            phase = child.follow(until=None if early else "training", delay_s=delay)
            if phase == "ended":
                break
            child.kill()
            outcome.kills.append(phase)
        outcome.in_save += any("tmp" in path.name for path in folder.glob("*"))
    outcome.digest = undisturbed(model, folder)
    outcome.seconds = time.monotonic() - began
    return outcome


def undisturbed(model: str, folder: Path) -> str:
    """Run a model to its end from where the folder is, and return the digest."""
    with _child(model, folder) as child:
        child.follow(until="ended", delay_s=0.0)
        return child.digest()


class Child:
    """A training run in a process of its own, which prints a line for each phase."""

    def __init__(self, process: subprocess.Popen[str], errors: Path) -> None:
        self.process = process
        self.errors = errors
        self.lines: list[str] = []
        self.told = threading.Condition()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            with self.told:
                self.lines.append(line.strip())
                self.told.notify()
        with self.told:
            self.lines.append("ended")
            self.told.notify()

    def follow(self, until: str | None, delay_s: float) -> str:
        """Wait for a phase, or the end, and then a time; return the phase that it is in."""
        with self.told:
            if until is not None and not self.told.wait_for(
                lambda: until in self.lines or "ended" in self.lines, PATIENCE_S
            ):
                # Python then prints where each thread is.
                self.process.send_signal(signal.SIGABRT)
                self.process.wait()
                stuck = f"{self.process.args}: no {until!r} after {PATIENCE_S} s"
                raise TimeoutError(f"{stuck}\n{self.lines}\n{self.errors.read_text()}")
            self.told.wait_for(lambda: "ended" in self.lines, delay_s)
            last = self.lines[-1] if self.lines else "starting"
            return "ending" if last.startswith("{") else last

    def kill(self) -> None:
        """Send SIGKILL."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def digest(self) -> str:
        """Return the digest that it printed last."""
        code = self.process.wait(PATIENCE_S)
        found = [json.loads(line)["digest"] for line in self.lines if line.startswith("{")]
        if code or not found:
            raise RuntimeError(f"exit {code}: {self.lines}\n{self.errors.read_text()}")
        return found[-1]


@contextmanager
def _child(model: str, folder: Path) -> Iterator[Child]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    paths = os.pathsep.join([str(ROOT), str(ROOT / "recipes")])
    environment |= {"JAX_PLATFORMS": "cpu", "PYTHONPATH": paths, "PYTHONFAULTHANDLER": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--child", model, str(folder)]
    errors = folder.parent / f"{folder.name}.log"
    errors.parent.mkdir(parents=True, exist_ok=True)
    with (
        errors.open("w") as stderr,
        subprocess.Popen(command, env=environment, stdout=-1, stderr=stderr, text=True) as process,
    ):
        try:
            yield Child(process, errors)
        finally:
            process.kill()


def train(model: str, folder: Path) -> None:
    """Train a model, or go on with it; what a child does."""
    from jaxtrainer import Callback, Run, Trainer
    from jaxtrainer.callbacks import EMA, Checkpoint
    from jaxtrainer.checkpoint import saved_steps
    from jaxtrainer.testing import digest_of

    class Told(Callback):
        def on_compile_start(self, run: Run, name: str) -> None:
            print("compiling", flush=True)

        def on_train_start(self, run: Run) -> None:
            print("training", flush=True)

        def on_train_end(self, run: Run) -> None:
            print(json.dumps({"digest": digest_of(run.state)}), flush=True)

    module, loader, val_loader, options = SETUPS[model]()
    saver = Checkpoint(folder, every_n_train_steps=options.pop("save_every"))
    callbacks = [Told(), saver, *([EMA(0.99, warmup=True)] if model == "norm" else [])]
    trainer = Trainer(
        callbacks=callbacks,
        mesh={"data": 1},
        enable_progress_bar=False,
        steps_per_dispatch=8,
        compilation_cache=folder.parent / "compiled",
        **options,
    )
    path = "last" if saved_steps(folder) else None
    trainer.fit(module, loader, val_loader, ckpt_path=path)


def mnist() -> Any:
    """Return the MNIST recipe with fewer digits, so that there are more saves than work."""
    import mnist_data
    import mnist_mlp
    from jaxtrainer import data

    # The test set: it is six times sooner unpacked.
    names = list(mnist_data.SHA256)[2:]
    files = [mnist_data.DATA_DIR / f"{name}.gz" for name in names]
    arrays = dict(zip(("image", "label"), map(mnist_data.read_idx, files), strict=True))
    loader = data.from_arrays(
        arrays,
        batch_size=256,
        shuffle=True,
        drop_remainder=True,
        device_transform=mnist_data.to_float,
    )
    return mnist_mlp.MnistMLP(), loader, None, {"max_epochs": 12, "save_every": 10}


def norm() -> Any:
    """Return a model with BatchNorm and Dropout, validated, with windows of accumulation."""
    from jaxtrainer.testing import TinyModule, tiny_loader

    loader, val_loader = tiny_loader(8 * 100), tiny_loader(40, seed=1)
    options = {"max_epochs": 10, "accumulate_grad_batches": 3, "save_every": 7}
    return TinyModule(), loader, val_loader, options


SETUPS = {"mnist": mnist, "norm": norm}


def main(argv: list[str] | None = None) -> int:
    """Run the seeds, two at a time, and return how many of them ended on other bits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--model", choices=MODELS, action="append")
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--child", nargs=2, metavar=("MODEL", "FOLDER"))
    args = parser.parse_args(argv)
    if args.child:
        train(args.child[0], Path(args.child[1]))
        return 0
    models, failed = args.model or MODELS, 0
    with tempfile.TemporaryDirectory(prefix="chaos-") as root:
        for model in models:
            failed += compare(model, Path(root) / model, args.seeds, args.kills, args.jobs)
    print(f"{failed} of {args.seeds * len(models)} runs ended on other bits")
    return failed


def compare(model: str, root: Path, seeds: int, kills: int, jobs: int) -> int:
    """Return how many seeds of a model ended on other bits than an undisturbed run."""
    want, failed = undisturbed(model, root / "undisturbed"), 0
    print(f"{model} undisturbed: digest {want[:16]}", flush=True)

    def run(seed: int) -> Outcome:
        return disturbed(model, seed, root / f"seed_{seed}", kills)

    with ThreadPoolExecutor(jobs) as pool:
        for outcome in pool.map(run, range(seeds)):
            failed += outcome.digest != want
            print(outcome, "" if outcome.digest == want else "DIFFERS", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
