"""Checkpoints that are missing, damaged or another model's, and directories of other runs."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import optax
import pytest
from flax import nnx

from jaxtrainer import Callback, Run
from jaxtrainer.callbacks import Checkpoint, LambdaCallback
from jaxtrainer.errors import (
    CheckpointCorruptError,
    CheckpointError,
    CheckpointMismatchError,
    CheckpointNotFoundError,
    ConfigError,
    RunDirError,
)
from tests import tiny
from tests.bad_input import loss_of, module_with, refused


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A run directory with the checkpoint of a linear model after three steps."""
    folder = tmp_path_factory.mktemp("runs") / "line"
    tiny.fit(
        tiny.make_batches(3), module=module_with(), callbacks=[Checkpoint(folder)], max_epochs=1
    )
    return folder


@pytest.mark.parametrize(
    ("path", "parts"),
    [
        ("nothing", ("no checkpoint at", "/runs0/nothing", "has line", "`step_N` directories")),
        ("line/step_99", ("no checkpoint at", "line/step_99", "has step_3")),
        ("line/step_3/params", ("no checkpoint at", "line/step_3/params")),
        ("a/b", ("no checkpoint at", "has nothing")),
    ],
)
@pytest.mark.parametrize("stage", ["fit", "test", "predict"])
def test_path_without_a_checkpoint_is_refused(saved, path, parts, stage):
    where = saved.parent / path
    parts = [part.replace("/runs0", str(saved.parent)) for part in parts]
    refused(CheckpointNotFoundError, *parts, ckpt_path=where, stage=stage)


@pytest.mark.parametrize("which", ["last", "best"])
def test_named_checkpoint_needs_a_checkpoint_callback(which):
    parts = (f"ckpt_path='{which}'", "pass `Trainer(callbacks=[Checkpoint('runs/...')])`")
    refused(CheckpointNotFoundError, *parts, ckpt_path=which)


@pytest.mark.parametrize("which", ["last", "best"])
def test_named_checkpoint_of_an_empty_directory_is_refused(tmp_path, which):
    callbacks = [Checkpoint(tmp_path / "new")]
    refused(CheckpointNotFoundError, "no checkpoint at", ckpt_path=which, callbacks=callbacks)


def test_misspelt_checkpoint_name_is_refused():
    part = "ckpt_path='latest' is no directory. Did you mean 'last'?"
    refused(CheckpointNotFoundError, part, ckpt_path="latest")


def test_checkpoint_path_of_another_type_is_refused():
    refused(ConfigError, "ckpt_path=True: pass 'last', 'best' or a directory", ckpt_path=True)


class Deep(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(tiny.FEATURES, 2, rngs=rngs)
        self.norm = nnx.BatchNorm(2, rngs=rngs)

    def __call__(self, x: Any) -> Any:
        return self.norm(self.first(x))


def wide(rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(tiny.FEATURES, 5, rngs=rngs)


def bare(rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(tiny.FEATURES, tiny.CLASSES, use_bias=False, rngs=rngs)


@pytest.mark.parametrize(
    ("make", "lines"),
    [
        (
            wide,
            [
                "params/bias: saved as float32[3], here float32[5]",
                "params/kernel: saved as float32[4, 3], here float32[4, 5]",
            ],
        ),
        (bare, ["params/bias: saved as float32[3], not in this model"]),
        (
            Deep,
            [
                "params/kernel: saved as float32[4, 3], not in this model",
                "params/first/kernel: float32[4, 2] here, not saved",
                "model_state/norm/mean: float32[2] here, not saved",
            ],
        ),
    ],
)
@pytest.mark.parametrize("stage", ["fit", "predict"])
def test_checkpoint_of_another_model_is_refused_with_every_difference(saved, make, lines, stage):
    module = module_with(configure_model=lambda self, rngs: make(rngs))
    parts = ("was saved by another model or optimiser", *lines)
    refused(CheckpointMismatchError, *parts, module=module, ckpt_path=saved, stage=stage)


@pytest.mark.parametrize(
    ("tx", "line"),
    [
        (optax.sgd(0.1), "opt_state/default/0/mu/bias: saved as float32[3], not in this model"),
        (optax.sgd(0.1, momentum=0.9), "opt_state/default/0/trace/bias: float32[3] here, not sav"),
    ],
)
def test_checkpoint_of_another_optimizer_is_refused(saved, tx, line):
    module = module_with(configure_optimizers=lambda self: tx)
    refused(CheckpointMismatchError, line, module=module, ckpt_path=saved)


def test_checkpoint_of_another_optimizer_can_be_tested(saved):
    module = module_with(configure_optimizers=lambda self: optax.sgd(0.1))
    trainer = tiny.make_trainer()
    metrics = trainer.test(module, tiny.make_batches(2), ckpt_path=saved, verbose=False)
    assert metrics["test/loss"] > 0


def test_checkpoint_without_accumulation_is_refused_with_it(saved):
    part = "accumulated: saved without accumulate_grad_batches"
    refused(CheckpointMismatchError, part, ckpt_path=saved, accumulate_grad_batches=2)


def test_resume_with_other_metrics_is_refused(saved):
    def training_step(self, model, batch):
        self.log("more", 1.0)
        return loss_of(model, batch)

    module = module_with(training_step=training_step)
    parts = ("saved with 1 logged metrics, now there are 2", "Log the same names")
    refused(CheckpointMismatchError, *parts, module=module, ckpt_path=saved)


def test_resume_with_another_batch_size_is_refused(saved):
    parts = ("batch_size=8, now it is 4", "Use the same loader")
    refused(CheckpointMismatchError, *parts, loader=tiny.make_batches(6, size=4), ckpt_path=saved)


@pytest.mark.parametrize(
    ("change", "part"),
    [({"seed": 2}, "seed=1, now it is 2"), ({"rows": 32}, "num_samples=64, now it is 32")],
)
def test_resume_with_other_samples_is_refused(tmp_path, change, part):
    tiny.fit(tiny.make_loader(seed=1), callbacks=[Checkpoint(tmp_path)], max_epochs=1)
    loader = tiny.make_loader(**{"seed": 1, **change})
    refused(CheckpointMismatchError, part, loader=loader, module=tiny.Tiny(), ckpt_path=tmp_path)


def damage_record(step: Path) -> None:
    for file in (step / "record").iterdir():
        file.write_bytes(file.read_bytes()[:20])


def remove_record(step: Path) -> None:
    shutil.rmtree(step / "record")


def age_record(step: Path) -> None:
    for file in (step / "record").iterdir():
        if b"format_version" in (text := file.read_bytes()):
            file.write_text(json.dumps({**json.loads(text), "format_version": 99}))


@pytest.mark.parametrize(
    ("damage", "kind", "part"),
    [
        (damage_record, CheckpointCorruptError, "reading the record of"),
        (remove_record, CheckpointCorruptError, "reading the record of"),
        (age_record, CheckpointError, "has checkpoint format 99"),
    ],
)
def test_checkpoint_with_a_bad_record_is_refused(saved, tmp_path, damage, kind, part):
    shutil.copytree(saved, tmp_path / "copy")
    damage(tmp_path / "copy" / "step_3")
    refused(kind, part, "copy/step_3", ckpt_path=tmp_path / "copy")


def test_run_directory_of_another_run_is_refused(saved):
    parts = ("already has 1 checkpoint(s)", "the last at step 3", "`fit(..., ckpt_path='last')`")
    refused(RunDirError, *parts, callbacks=[Checkpoint(saved)])


def test_run_directory_below_a_file_is_refused(tmp_path):
    (tmp_path / "notes").write_text("no directory")
    parts = (f"cannot write in {tmp_path}/notes/run", "a directory that can be written")
    refused(RunDirError, *parts, callbacks=[Checkpoint(tmp_path / "notes" / "run")])


def test_run_directory_that_is_read_only_is_refused(tmp_path, monkeypatch):
    # Simulated, because who runs the tests as root may write anywhere.
    def write_bytes(self: Path, content: bytes) -> int:
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    parts = (f"cannot write in {tmp_path}", "Read-only file system")
    refused(RunDirError, *parts, callbacks=[Checkpoint(tmp_path)])


def test_run_directory_may_hold_other_files(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    result, _ = tiny.fit(tiny.make_batches(3), callbacks=[Checkpoint(tmp_path)], max_epochs=1)
    assert result.last_checkpoint == str(tmp_path / "step_3")


@pytest.mark.parametrize(
    ("monitor", "part"),
    [
        ("train/los", "Did you mean 'train/loss'?"),
        ("loss", "Did you mean 'val/loss'?"),
        ("val_loss", "Did you mean 'val/loss'?"),
        ("perplexity", "which no step logs; logged: train/loss, val/loss."),
    ],
)
def test_monitored_series_that_no_step_logs_is_refused(tmp_path, monitor, part):
    callbacks = [Checkpoint(tmp_path, monitor=monitor)]
    parts = (f"Checkpoint monitors {monitor!r}", part)
    refused(ConfigError, *parts, callbacks=callbacks, val_loader=tiny.make_batches(1))


class LogsScore(Callback):
    def on_train_epoch_end(self, run: Run) -> None:
        run.log("score", float(run.epoch))


def test_monitored_series_may_come_from_a_hook(tmp_path):
    checkpoint = Checkpoint(tmp_path, monitor="score", mode="max")
    tiny.fit(tiny.make_batches(3), callbacks=[LogsScore(), checkpoint], max_epochs=2)
    assert checkpoint.best_model_score == 1.0


def test_two_checkpoints_of_one_directory_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="several callbacks keep their state under"):
        tiny.make_trainer([Checkpoint(tmp_path), Checkpoint(tmp_path)])


def test_monitored_series_may_come_from_a_callback_of_the_package(tmp_path):
    checkpoint = Checkpoint(tmp_path, monitor="score", mode="max")
    logs = LambdaCallback(on_train_epoch_end=lambda run: run.log("score", float(run.epoch)))
    tiny.fit(tiny.make_batches(3), callbacks=[logs, checkpoint], max_epochs=2)
    assert checkpoint.best_model_score == 1.0
