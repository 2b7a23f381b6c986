"""What users of other trainers complain about most, and the tests that show it does not happen.

`SHOWN` says where each is shown; what no other file shows is tested here.
"""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import optax
import pytest

from jaxtrainer import Callback, Run
from jaxtrainer.callbacks import Checkpoint, EarlyStopping
from jaxtrainer.checkpoint import find_checkpoint, read_record
from tests import tiny
from tests.bad_input import module_with
from tests.places import missing_tests

pytestmark = pytest.mark.usefixtures("compiled_once")

HERE = "test_complaints.py"
SHOWN: list[tuple[int, str, list[str]]] = [
    (
        1,
        "a run resumed in the middle of an epoch starts the epoch's data again",
        ["test_resume.py::test_resume_in_the_middle_of_an_epoch_is_the_uninterrupted_run"],
    ),
    (
        2,
        "a resumed run draws other random numbers",
        [
            "test_resume.py::test_resume_of_an_interrupted_run_is_the_uninterrupted_one",
            "test_determinism.py::test_global_random_state_is_left_alone",
        ],
    ),
    (
        3,
        "logging and callbacks wait for the device at every step",
        [
            "test_steady_step.py::test_steps_between_reports_read_nothing",
            "test_steady_step.py::test_report_reads_once_and_one_interval_late",
        ],
    ),
    (
        4,
        "one value is logged under several names, twice, or not at all before step 50",
        [f"{HERE}::test_a_value_is_one_series_and_no_point_comes_twice"],
    ),
    (
        5,
        "epoch means are wrong, because the batch size is guessed",
        [
            "test_evaluate.py::test_validate_is_exact_over_ragged_batches",
            "test_val_loaders.py::test_means_of_each_loader_are_exact_over_ragged_batches",
        ],
    ),
    (
        6,
        "a checkpoint is decided before the validation that it should go by",
        ["test_val_interval.py::test_checkpoint_is_decided_after_the_validation"],
    ),
    (
        7,
        "the interval of validation means different things, and none comes at the end",
        [
            "test_val_interval.py::test_interval_says_when",
            "test_val_interval.py::test_stop_within_an_epoch_validates_the_last_state",
        ],
    ),
    (
        8,
        "a last window of accumulated gradients that is not full is divided by a full one",
        [
            "test_accumulation.py::test_window_cut_short_is_weighed_by_what_it_has",
            "test_accumulation.py::test_micro_batches_are_one_batch",
        ],
    ),
    (
        9,
        "with two optimisers each batch counts as two steps",
        [f"{HERE}::test_two_optimizers_make_one_step_of_a_batch"],
    ),
    (
        10,
        "evaluation on several devices counts samples twice",
        ["test_devices.py::test_evaluation_of_a_ragged_batch_is_exact_on_eight_devices"],
    ),
    (
        12,
        "learning-rate schedules are counted in epochs, or in batches",
        ["test_accumulation.py::test_schedule_counts_updates"],
    ),
    (
        13,
        "Ctrl-C and SIGTERM lose the model, or end the interpreter",
        [
            "test_interrupts.py::test_first_ctrl_c_stops_the_fit_and_keeps_the_model",
            "test_on_exception_checkpoint.py::test_interrupted_run_is_saved",
        ],
    ),
    (
        14,
        "a checkpoint is a pickle, which executes what is in it",
        [f"{HERE}::test_checkpoint_is_read_without_pickle"],
    ),
    (
        15,
        "predictions fill the memory",
        ["test_prediction_writer.py::test_predictions_held_do_not_grow_with_the_batches"],
    ),
    (
        16,
        "a resumed run forgets the patience, or stops for ever",
        [
            "test_early_stopping.py::test_resumed_run_goes_on_counting",
            f"{HERE}::test_checkpoint_has_the_state_after_the_checks_of_its_epoch",
            f"{HERE}::test_run_that_was_stopped_early_can_go_on",
        ],
    ),
    (
        17,
        "a module must be picklable, or is made again from arguments found in frames",
        [f"{HERE}::test_module_may_hold_what_no_file_could"],
    ),
    (
        18,
        "the progress bar costs time at every batch, and fills log files",
        [
            "test_progress_bar.py::test_bar_in_a_log_prints_whole_lines_only",
            "test_progress_bar.py::test_bar_has_no_hook_that_runs_once_a_batch",
        ],
    ),
    (
        20,
        "a run writes files, prints tips and trains for ever without being asked to",
        [
            f"{HERE}::test_run_writes_and_prints_nothing_that_was_not_asked_for",
            "test_bad_options.py::test_fit_refuses_a_value_before_compiling",
            "test_evaluate.py::test_validation_in_fit_is_that_of_validate",
        ],
    ),
]
NOT_SHOWN = {
    11: "processes that log different things wait for each other: a step is one program for all",
    19: "hooks come and go between versions: what the public names are is pinned in test_exports",
}


def test_every_complaint_has_a_test_that_exists():
    assert sorted([number for number, _, _ in SHOWN] + [*NOT_SHOWN]) == list(range(1, 21))
    assert not missing_tests(place for _, _, places in SHOWN for place in places)


def test_a_value_is_one_series_and_no_point_comes_twice():
    # Ten steps, and a report every four: the last two are a report of their own.
    batches = tiny.make_batches(10)
    result, _ = tiny.fit(batches, batches[:2], max_epochs=1, log_every_n_steps=4)
    assert set(result.history) == {"train/loss", "val/loss"}
    assert result.history.step["train/loss"].steps == [4, 8, 10]
    assert result.history.epoch["train/loss"].steps == [10]
    assert result.history.epoch["val/loss"].steps == [10]
    assert "val/loss" not in result.history.step


def test_two_optimizers_make_one_step_of_a_batch():
    from jaxtrainer import Optimizer

    optimizers = {
        "kernel": Optimizer(optax.sgd(0.1), wrt="kernel"),
        "bias": Optimizer(optax.adam(0.1), wrt="bias"),
    }
    module = tiny.Tiny(tiny.line, optimizers)
    result, _ = tiny.fit(tiny.make_batches(6), module=module, max_epochs=2)
    assert (result.num_steps, result.num_samples) == (12, 96)
    assert result.history.epoch["train/loss"].steps == [6, 12]


def test_checkpoint_is_read_without_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tiny.fit(callbacks=[Checkpoint(tmp_path)], max_epochs=1)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files
    # How a pickle of protocol 2 or later starts and ends.
    assert not [f for f in files if f.read_bytes()[:1] == b"\x80" and f.read_bytes()[-1:] == b"."]
    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, None)
    result, _ = tiny.fit(ckpt_path=tmp_path, max_epochs=2)
    assert result.num_epochs == 2


class Rising(Callback):
    """Logs a score that gets worse with every epoch."""

    def on_train_epoch_end(self, run: Run) -> None:
        run.log("score", float(run.epoch))


def fit_stopped(directory: Path, patience: int, ckpt_path: Any = None) -> Any:
    stopping = EarlyStopping("score", patience=patience)
    # In another order than they must act in.
    callbacks = [Checkpoint(directory), stopping, Rising()]
    return tiny.fit(callbacks=callbacks, max_epochs=5, ckpt_path=ckpt_path)[0]


def test_checkpoint_has_the_state_after_the_checks_of_its_epoch(tmp_path: Path):
    result = fit_stopped(tmp_path, patience=2)
    assert (result.num_epochs, result.stop_reason[:14]) == (3, "early_stopping")
    state = read_record(find_checkpoint(tmp_path))["callbacks"]["EarlyStopping[score,min]"]
    assert state == {"best_score": 0.0, "wait_count": 2, "stopped_epoch": 2}


def test_run_that_was_stopped_early_can_go_on(tmp_path: Path):
    assert fit_stopped(tmp_path, patience=2).num_epochs == 3
    result = fit_stopped(tmp_path, patience=9, ckpt_path="last")
    assert (result.num_epochs, result.stop_reason) == (5, "max_epochs")


def test_module_may_hold_what_no_file_could(tmp_path: Path):
    module = module_with()
    module.opened = open(__file__)  # noqa: SIM115 (what it holds is the point)
    module.scale = lambda x: 2 * x
    with module.opened:
        tiny.fit(module=module, callbacks=[Checkpoint(tmp_path)], max_epochs=1)
        with pytest.raises(Exception, match="pickle"):
            pickle.dumps(module)
        result, _ = tiny.fit(module=module, ckpt_path=tmp_path, max_epochs=2)
    assert result.num_epochs == 2


def test_run_writes_and_prints_nothing_that_was_not_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    module, batches, trainer = module_with(), tiny.make_batches(2), tiny.make_trainer(max_epochs=1)
    trainer.fit(module, batches, batches)
    trainer.validate(module, batches, verbose=False)
    trainer.predict(module, batches)
    assert not [*tmp_path.rglob("*")]
    assert capfd.readouterr() == ("", "")
