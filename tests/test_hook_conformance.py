"""The order of hooks in every call, as explicit lists, against Lightning's.

Where ours is another, and why:

- Callbacks with `order` 1 (they judge metrics) and 2 (they save) come after the module at every
  hook; in Lightning at `on_train_epoch_end` only, and savers last in the list. What a module logs
  in any hook is thus seen by those that act on it.
- `on_save_point` is where checkpoints are saved: the one place at which the batch, its validation
  and the other callbacks are all done. Lightning saves within `on_train_batch_end`,
  `on_validation_end` or `on_train_epoch_end`, depending on the options.
- Loaders are asked for, and model and optimiser made, before `on_fit_start`: what they return
  decides what is compiled, and `on_fit_start` has the state. The training loader comes first.
- `on_load_checkpoint` is called at once after `setup`, of callbacks and then module, and before
  any step is traced, because what a step has read cannot change later.
- After an exception `teardown` is called; Lightning leaves it out.
- What happens inside the compiled step (batch transfer, backward, optimiser) has no hooks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from jaxtrainer import Callback, DataModule, Run
from jaxtrainer.callback import HOOKS
from jaxtrainer.callbacks import Checkpoint
from tests import tiny
from tests.bad_input import assert_says, module_with, own_threads

pytestmark = pytest.mark.usefixtures("compiled_once")

NOT_LISTED = {"on_compile_start", "on_compile_end", "on_report"}
"""They come when a program compiles and when values arrive, which is no matter of order."""

CALLBACKS = {"saver": 2, "first": 0, "monitor": 1, "second": 0}
"""The callbacks in the order in which they are passed, with their `order`."""

OWNERS = ("first", "second", "module", "monitor", "saver")
CALLED = {
    "configure_callbacks": ("module",),
    "prepare_data": ("data", "module"),
    "setup": ("data", *OWNERS),
    "teardown": ("data", *OWNERS),
    "on_exception": (*OWNERS, "data"),
    "data.load_state_dict": ("data",),
    "load_state_dict": ("saver", "first", "monitor", "second"),
    **dict.fromkeys(("configure_model", "configure_optimizers"), ("module",)),
    **dict.fromkeys(
        (f"{kind}_dataloader" for kind in ("train", "val", "test", "predict")), ("data",)
    ),
}
"""Who is called at a hook, in this order; all `OWNERS` where it is not said."""

PREPARED = ["configure_callbacks", "prepare_data", "setup"]
BATCH = ["on_train_batch_start", "on_train_batch_end"]


def expanded(hooks: Sequence[str]) -> list[str]:
    """Each hook, once for each of those that it is called on."""
    return [
        f"{owner}.{hook.removeprefix('data.')}"
        for hook in hooks
        for owner in CALLED.get(hook, OWNERS)
    ]


def evaluation(stage: str, batches: int) -> list[str]:
    name = f"on_{stage}"
    return [
        f"{name}_start",
        f"{name}_epoch_start",
        *[f"{name}_batch_start", f"{name}_batch_end"] * batches,
        f"{name}_epoch_end",
        f"{name}_end",
    ]


class Recorder:
    """Callbacks, a module and a data module that note each call; `fails` says which raises."""

    def __init__(self, fails: Mapping[str, BaseException] | None = None) -> None:
        self.seen: list[str] = []
        self.fails = dict(fails or {})
        self.callbacks = [self.watched(Named(name), name) for name in CALLBACKS]
        self.data = Data(self.note)
        self.module = self.watched(Module(self.note), "module")

    def note(self, label: str, *arguments: Any) -> None:
        # It is traced once for the shapes and once for the program.
        if label != "module.configure_model" or label not in self.seen:
            self.seen.append(label)
        if label in self.fails:
            raise self.fails.pop(label)

    def watched(self, owner: Any, name: str) -> Any:
        hooks = [hook for hook in HOOKS if hook not in NOT_LISTED]
        for hook in (*hooks, *(["load_state_dict"] if isinstance(owner, Callback) else [])):
            setattr(owner, hook, functools.partial(self.note, f"{name}.{hook}"))
        return owner

    def fit(self, *others: Callback, ckpt_path: Any = None, **options: Any) -> Any:
        trainer = self.trainer(*others, **options)
        return trainer.fit(self.module, self.data, ckpt_path=ckpt_path)

    def trainer(self, *others: Callback, **options: Any) -> Any:
        return tiny.make_trainer([*self.callbacks, *others], **{"max_epochs": 1, **options})


class Named(Callback):
    def __init__(self, name: str) -> None:
        self.name = name
        self.order = CALLBACKS[name]

    @property
    def state_key(self) -> str:
        return self.name

    def state_dict(self) -> dict[str, Any]:
        return {"name": self.name}


class Module(tiny.Tiny):
    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__(make=tiny.line)
        self.note = note

    def configure_callbacks(self) -> list[Callback]:
        self.note("module.configure_callbacks")
        return []

    def prepare_data(self) -> None:
        self.note("module.prepare_data")

    def configure_model(self, rngs: Any) -> Any:
        self.note("module.configure_model")
        return super().configure_model(rngs)

    def configure_optimizers(self) -> Any:
        self.note("module.configure_optimizers")
        return super().configure_optimizers()

    def training_step(self, model: Any, batch: Any) -> Any:
        if self.fails_in_step:
            raise ZeroDivisionError("on purpose")
        return super().training_step(model, batch)

    fails_in_step = False


class Batches:
    """Four batches, or an error in place of one of them."""

    def __init__(self, fails_at: int | None) -> None:
        self.fails_at = fails_at

    def __len__(self) -> int:
        return 4

    def __iter__(self) -> Iterator[Any]:
        for i, batch in enumerate(tiny.make_batches(4)):
            if i == self.fails_at:
                raise ZeroDivisionError("on purpose")
            yield batch


class Data(DataModule):
    fails_at: int | None = None

    def __init__(self, note: Callable[[str], None]) -> None:
        self.note = note

    def prepare_data(self) -> None:
        self.note("data.prepare_data")

    def setup(self, stage: str) -> None:
        self.note("data.setup")

    def train_dataloader(self) -> Any:
        self.note("data.train_dataloader")
        return Batches(self.fails_at)

    def val_dataloader(self) -> Any:
        self.note("data.val_dataloader")
        return tiny.make_batches(2)

    def test_dataloader(self) -> Any:
        self.note("data.test_dataloader")
        return tiny.make_batches(2)

    def predict_dataloader(self) -> Any:
        self.note("data.predict_dataloader")
        return tiny.make_batches(2)

    def teardown(self, stage: str) -> None:
        self.note("data.teardown")

    def on_exception(self, exception: BaseException) -> None:
        self.note("data.on_exception")

    def state_dict(self) -> dict[str, Any]:
        return {"split": 3}

    def load_state_dict(self, state: Any) -> None:
        assert state == {"split": 3}
        self.note("data.load_state_dict")


MADE = ["train_dataloader", "val_dataloader", "configure_model", "configure_optimizers"]
SANITY = ["on_sanity_check_start", *evaluation("validation", 1), "on_sanity_check_end"]
ENDED = ["on_train_end", "on_fit_end", "teardown"]


def test_fit_calls_hooks_in_this_order():
    recorder = Recorder()
    recorder.fit(num_sanity_val_steps=1, val_check_interval=2, accumulate_grad_batches=2)
    validation = evaluation("validation", 2)
    assert recorder.seen == expanded(
        [
            *PREPARED,
            *MADE,
            "on_fit_start",
            *SANITY,
            "on_train_start",
            "on_train_epoch_start",
            *[*BATCH, "on_save_point"],
            *[*BATCH, *validation, "on_save_point"],
            *[*BATCH, "on_save_point"],
            *[*BATCH, *validation],
            "on_train_epoch_end",
            "on_save_point",
            *ENDED,
        ]
    )


def test_fit_calls_each_epoch_in_this_order():
    recorder = Recorder()
    recorder.fit(max_epochs=2)
    epoch = ["on_train_epoch_start", *[*BATCH, "on_save_point"] * 3, *BATCH]
    epoch += [*evaluation("validation", 2), "on_train_epoch_end", "on_save_point"]
    before = [*PREPARED, *MADE, "on_fit_start", "on_train_start"]
    assert recorder.seen == expanded([*before, *epoch, *epoch, *ENDED])


def test_checkpoint_saves_what_hooks_add_after_all_others_have_acted(tmp_path: Path):
    recorder = Recorder()
    recorder.fit(Checkpoint(tmp_path), limit_val_batches=0)
    saved = expanded(["on_train_epoch_end", "on_save_point", "on_save_checkpoint", *ENDED])
    assert recorder.seen[-len(saved) :] == saved


def test_resume_within_an_epoch_calls_hooks_in_this_order(tmp_path: Path):
    Recorder().fit(Checkpoint(tmp_path), max_steps=2)
    recorder = Recorder()
    recorder.fit(Checkpoint(tmp_path), ckpt_path="last", num_sanity_val_steps=1)
    assert recorder.seen == expanded(
        [
            *PREPARED,
            "data.load_state_dict",
            "on_load_checkpoint",
            *MADE,
            "load_state_dict",
            "on_fit_start",
            "on_train_start",
            *[*BATCH, "on_save_point"],
            *[*BATCH, *evaluation("validation", 2)],
            "on_train_epoch_end",
            "on_save_point",
            "on_save_checkpoint",
            *ENDED,
        ]
    )


@pytest.mark.parametrize("call", ["validate", "test"])
def test_evaluation_calls_hooks_in_this_order(call: str):
    recorder = Recorder()
    getattr(recorder.trainer(), call)(recorder.module, recorder.data, verbose=False)
    stage, loader = {"validate": ("validation", "val"), "test": ("test", "test")}[call]
    middle = [f"{loader}_dataloader", "configure_model", *evaluation(stage, 2)]
    assert recorder.seen == expanded([*PREPARED, *middle, "teardown"])


def test_predict_calls_hooks_in_this_order():
    # Two batches are dispatched ahead, so that the starts come before the ends.
    starts, ends = ["on_predict_batch_start"] * 2, ["on_predict_batch_end"] * 2
    recorder = Recorder()
    recorder.trainer().predict(recorder.module, recorder.data)
    assert recorder.seen == expanded(
        [
            *PREPARED,
            "configure_model",
            "predict_dataloader",
            "on_predict_start",
            "on_predict_epoch_start",
            *[*starts, *ends],
            "on_predict_epoch_end",
            "on_predict_end",
            "teardown",
        ]
    )


@pytest.mark.parametrize("call", ["validate", "test", "predict"])
def test_evaluation_from_a_checkpoint_hands_out_what_hooks_saved(call: str, tmp_path: Path):
    Recorder().fit(Checkpoint(tmp_path), limit_val_batches=0)
    recorder = Recorder()
    getattr(recorder.trainer(), call)(recorder.module, recorder.data, ckpt_path=tmp_path)
    loaded = expanded([*PREPARED, "data.load_state_dict", "on_load_checkpoint"])
    assert recorder.seen[: len(loaded)] == loaded
    assert not [label for label in recorder.seen if label == "first.load_state_dict"]


class Tunes(Callback):
    def __init__(self, recorder: Recorder, order: int) -> None:
        self.recorder, self.order = recorder, order

    def tune(self, probe: Any) -> None:
        self.recorder.note(f"tune {self.order}")


def test_callbacks_that_tune_come_before_all_that_depends_on_it():
    recorder = Recorder()
    tuners = [Tunes(recorder, order) for order in (0, -1)]
    recorder.fit(*tuners, max_steps=1, limit_val_batches=0)
    made = expanded(["configure_model", "configure_optimizers", "on_fit_start"])
    prepared = expanded([*PREPARED, "train_dataloader"])
    assert recorder.seen[: len(prepared)] == prepared
    assert recorder.seen[len(prepared) :][: 2 + len(made)] == ["tune -1", "tune 0", *made]


def test_stream_of_predictions_that_is_left_early_is_torn_down():
    recorder = Recorder()
    stream = recorder.trainer().predict(recorder.module, recorder.data, stream=True)
    next(stream)
    assert "data.teardown" not in recorder.seen
    stream.close()
    assert recorder.seen[-6:] == expanded(["teardown"])
    assert not [label for label in recorder.seen if label.endswith("on_exception")]


FAILING = {
    "data.prepare_data": "Data.prepare_data, fit",
    "data.setup": "Data.setup, fit",
    "second.setup": "in fit",
    "data.val_dataloader": "Data.val_dataloader, fit",
    "module.configure_optimizers": "in fit",
    "first.on_fit_start": "in fit",
    "module.on_sanity_check_end": "in sanity",
    "first.on_train_start": "in train, epoch 0, step 0",
    "second.on_train_batch_end": "in train, epoch 0, step 1",
    "module.on_validation_batch_end": "in validate, epoch 0, step 4",
    "saver.on_save_point": "in train, epoch 0, step 1",
    "monitor.on_train_epoch_end": "epoch 0, step 4",
    "module.on_fit_end": "step 4",
}


def assert_ended_once(recorder: Recorder) -> None:
    """Everybody was told, and torn down, once and in this order; nothing else came after."""
    ends = expanded(["on_exception", "teardown"])
    assert recorder.seen[-len(ends) :] == ends
    assert not {*ends} & {*recorder.seen[: -len(ends)]}
    assert not own_threads()


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize(("label", "where"), FAILING.items(), ids=FAILING)
def test_exception_in_a_hook_ends_the_fit_in_this_order(label: str, where: str, kind: Any):
    recorder = Recorder({label: kind("on purpose")})
    with pytest.raises(kind, match="on purpose") as caught:
        recorder.fit(num_sanity_val_steps=int("sanity" in label))
    assert type(caught.value) is kind
    assert_says(caught.value, where)
    assert_ended_once(recorder)


@pytest.mark.parametrize("place", ["step", "loader"])
def test_exception_outside_of_hooks_ends_the_fit_in_this_order(place: str):
    recorder = Recorder()
    recorder.module.fails_in_step = place == "step"
    recorder.data.fails_at = 2 if place == "loader" else None
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        recorder.fit()
    assert_ended_once(recorder)


EVALUATIONS = {
    "validate": "module.on_validation_batch_end",
    "test": "second.on_test_epoch_end",
    "predict": "first.on_predict_batch_end",
}


@pytest.mark.parametrize("kind", [ZeroDivisionError, KeyboardInterrupt])
@pytest.mark.parametrize(("call", "label"), EVALUATIONS.items(), ids=EVALUATIONS)
def test_exception_in_a_hook_ends_an_evaluation_in_this_order(call: str, label: str, kind: Any):
    recorder = Recorder({label: kind("on purpose")})
    with pytest.raises(kind, match="on purpose"):
        getattr(recorder.trainer(), call)(recorder.module, recorder.data)
    assert_ended_once(recorder)


def test_exception_names_the_hook_that_it_came_from():
    class Culprit(Callback):
        def on_train_start(self, run: Run) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError) as caught:
        tiny.make_trainer(Culprit(), max_epochs=1).fit(module_with(), tiny.make_batches(1))
    assert_says(caught.value, "in Culprit.on_train_start, train, epoch 0, step 0")


@pytest.mark.parametrize("hook", ["on_exception", "teardown"])
def test_exception_of_an_ending_hook_does_not_hide_the_first(hook: str):
    fails = {"first.on_train_start": ZeroDivisionError(), f"second.{hook}": KeyError("later")}
    recorder = Recorder(fails)
    with pytest.raises(ZeroDivisionError) as caught:
        recorder.fit()
    assert_says(caught.value, "and then KeyError while ending the run: 'later'")
    assert_ended_once(recorder)


def test_exception_of_a_teardown_alone_is_raised():
    recorder = Recorder({"first.teardown": KeyError("later")})
    with pytest.raises(KeyError, match="later"):
        recorder.fit()
    assert recorder.seen[-6:] == expanded(["teardown"])
