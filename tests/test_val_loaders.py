"""Several loaders in one call: each exact on its own, and named in its series.

Tolerance: inputs are small integers, so that sums are exact in float32; what remains is one
rounding of the mean of a batch. Between two runs of one program the law is equal numbers.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrainer import Callback, Run, TrainModule
from jaxtrainer.callbacks import Accuracy, Checkpoint, EarlyStopping
from jaxtrainer.errors import ConfigError, DataError
from tests import tiny
from tests.bad_input import Compilations, module_with, refused

pytestmark = pytest.mark.usefixtures("compiled_once")

ROUNDING = 1e-6


class Means(TrainModule):
    """Logs the mean of `x`, which is an integer."""

    def configure_model(self, rngs: Any) -> Any:
        return tiny.line(rngs)

    def validation_step(self, model: Any, batch: Any) -> None:
        self.log("mean", jnp.mean(batch["x"]))

    def predict_step(self, model: Any, batch: Any) -> Any:
        return batch["x"]


def integers(rows: int, seed: int, size: int = 8) -> list[dict[str, np.ndarray]]:
    """A plain list of batches of `size` rows, the last one smaller."""
    x = np.random.default_rng(seed).integers(-20, 20, rows).astype(np.float32)
    return [{"x": x[i : i + size]} for i in range(0, rows, size)]


def mean_of(batches: list[dict[str, np.ndarray]]) -> float:
    return float(np.concatenate([batch["x"] for batch in batches]).astype(np.float64).mean())


@pytest.mark.parametrize("stage", ["val", "test"])
def test_means_of_each_loader_are_exact_over_ragged_batches(stage: str):
    loaders = {"clean": integers(27, 0), "noisy": integers(43, 1), "few": integers(3, 2)}
    trainer = tiny.make_trainer()
    call = trainer.validate if stage == "val" else trainer.test
    got = call(Means(), loaders, verbose=False)
    want = {f"{stage}/{name}/mean": mean_of(batches) for name, batches in loaders.items()}
    assert got == pytest.approx(want, rel=ROUNDING)


def test_values_of_a_loader_are_those_of_it_alone():
    loaders = {"a": tiny.make_batches(3, ragged=2), "b": tiny.make_loader(20, shuffle=False)}
    module = tiny.Tiny()
    tiny.fit(module=module, max_steps=1)
    trainer = tiny.make_trainer()
    together = trainer.validate(module, loaders, verbose=False)
    alone = {n: trainer.validate(module, loader, verbose=False) for n, loader in loaders.items()}
    assert together == {f"val/{name}/loss": values["val/loss"] for name, values in alone.items()}


def test_fit_validates_every_loader_each_time():
    loaders = {"clean": tiny.make_batches(2), "noisy": tiny.make_batches(1, ragged=3)}
    module = tiny.Tiny()
    result, _ = tiny.fit(val_loader=loaders, module=module, max_epochs=2, steps_per_dispatch=1)
    assert set(result.metrics) == {"train/loss", "val/clean/loss", "val/noisy/loss"}
    assert result.history["val/noisy/loss"].steps == [8, 16]
    after = tiny.make_trainer().validate(module, loaders, verbose=False)
    assert after == {name: result.metrics[name] for name in after}


@pytest.mark.parametrize(
    ("given", "series"),
    [
        ("loss", "val/clean/loss"),
        ("val/loss", "val/clean/loss"),
        ("val_loss", "val_loss/clean"),
        ("top/acc", "top/clean/acc"),
    ],
)
def test_name_of_the_loader_comes_after_the_first_part(given: str, series: str):
    step = lambda self, model, batch: self.log(given, jnp.mean(batch["x"]))  # noqa: E731
    module = module_with(validation_step=step)
    loaders = {"clean": tiny.make_batches(1)}
    assert [*tiny.make_trainer().validate(module, loaders, verbose=False)] == [series]


class Hooks(Callback):
    """Keeps the validation hooks with the loader's name and the batch's index."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def _keep(self, name: str, run: Run, *rest: Any) -> None:
        self.seen.append((name, run.loader_name, *rest))

    def on_validation_start(self, run: Run) -> None:
        self._keep("start", run)

    def on_validation_epoch_start(self, run: Run) -> None:
        self._keep("epoch_start", run)

    def on_validation_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._keep("batch_end", run, batch_idx, float(outputs["mean"]), run.num_eval_batches)

    def on_validation_epoch_end(self, run: Run) -> None:
        self._keep("epoch_end", run)

    def on_validation_end(self, run: Run) -> None:
        self._keep("end", run)


@pytest.mark.parametrize("steps", [1, 4], ids=["single", "fused"])
def test_hooks_run_once_for_all_loaders_and_batch_hooks_for_each(steps: int):
    loaders, hooks = {"a": integers(20, 0), "b": integers(16, 1)}, Hooks()
    tiny.make_trainer(hooks, steps_per_dispatch=steps).validate(Means(), loaders, verbose=False)
    batches = [
        ("batch_end", name, i, pytest.approx(mean_of([batch]), rel=ROUNDING), 5)
        for name, loader in loaders.items()
        for i, batch in enumerate(loader)
    ]
    first, last = [("start", None), ("epoch_start", None)], [("epoch_end", None), ("end", None)]
    assert hooks.seen == [*first, *batches, *last]


def test_batch_start_knows_the_loader_too():
    seen: list[Any] = []

    class Starts(Callback):
        def on_test_batch_start(self, run: Run, batch: Any, batch_idx: int) -> None:
            seen.append((run.loader_name, batch_idx, run.eval_batch_idx))

    loaders = {"a": integers(16, 0), "b": integers(12, 1)}
    tiny.make_trainer(Starts()).test(Means(), loaders, verbose=False)
    # The index begins anew with each loader; the count of the bar goes on.
    assert seen == [("a", 0, 0), ("a", 1, 1), ("b", 0, 2), ("b", 1, 3)]


TRACED: list[str] = []


class ByName(Means):
    """Treats the batches of one loader otherwise."""

    def validation_step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model: Any, batch: Any, loader_name: str
    ) -> None:
        factor = 10.0 if loader_name == "large" else 1.0
        self.log(f"{loader_name}_mean", factor * jnp.mean(batch["x"]))
        TRACED.append(loader_name)


@pytest.mark.parametrize("stage", ["val", "test"])
def test_step_may_take_the_name_of_the_loader(stage: str):
    TRACED.clear()
    loaders, trainer = {"plain": integers(16, 0), "large": integers(16, 1)}, tiny.make_trainer()
    call = trainer.validate if stage == "val" else trainer.test
    got = call(ByName(), loaders, verbose=False)
    means = {name: mean_of(batches) for name, batches in loaders.items()}
    assert got == pytest.approx(
        {
            f"{stage}/plain/plain_mean": means["plain"],
            f"{stage}/large/large_mean": 10 * means["large"],
        },
        rel=ROUNDING,
    )
    assert TRACED == ["plain", "large"]


def test_loader_without_a_name_is_refused_for_a_step_that_wants_one():
    module = module_with(validation_step=ByName.validation_step)
    parts = ("Mine.validation_step takes `loader_name`", "`{'clean': loader}`")
    refused(ConfigError, *parts, module=module, val_loader=tiny.make_batches(1))


def test_loader_without_a_name_leaves_the_default():
    def validation_step(self: Any, model: Any, batch: Any, loader_name: str | None = None) -> None:
        assert loader_name is None
        self.log("seen", 1.0)

    module = module_with(validation_step=validation_step)
    got = tiny.make_trainer().validate(module, tiny.make_batches(1), verbose=False)
    assert got == {"val/seen": 1.0}


def announced(loaders: Any, module: TrainModule | None = None) -> list[str]:
    seen = Compilations()
    tiny.make_trainer(seen).validate(module or Means(), loaders, verbose=False)
    return seen.names


def test_loaders_of_one_spec_share_a_program():
    loaders = {"a": integers(19, 0), "b": integers(27, 1), "c": integers(21, 1)}
    own = "validate step of 'a'"
    assert announced(loaders) == [
        own,
        f"{own} for the last 3 rows",
        f"{own} for the last 5 rows",
    ]


def test_loader_of_another_spec_has_its_own_program():
    loaders = {"a": integers(16, 0), "b": integers(16, 1, size=4), "c": integers(16, 2)}
    assert announced(loaders) == ["validate step of 'a'", "validate step of 'b'"]
    assert announced({"a": integers(16, 0), "b": integers(16, 1)}, ByName()) == [
        "validate step of 'a'",
        "validate step of 'b'",
    ]


@pytest.mark.parametrize(("limit", "rows"), [(2, (16, 16)), (0.5, (8, 24)), (9, (24, 48))])
def test_limit_applies_to_each_loader(limit: Any, rows: tuple[int, int]):
    loaders = {"a": integers(24, 0), "b": integers(48, 1)}
    got = tiny.make_trainer(limit_val_batches=limit).validate(Means(), loaders, verbose=False)
    want = {
        f"val/{name}/mean": mean_of(loader[: n // 8])
        for (name, loader), n in zip(loaders.items(), rows, strict=True)
    }
    assert got == pytest.approx(want, rel=ROUNDING)


LOADERS = {"clean": tiny.make_batches(1), "noisy": tiny.make_batches(2)}


def test_checkpoint_and_early_stopping_monitor_one_loader(tmp_path):
    stopping = EarlyStopping("val/noisy/loss", patience=1, min_delta=100.0)
    saver = Checkpoint(tmp_path, monitor="val/clean/loss")
    result, _ = tiny.fit(val_loader=LOADERS, callbacks=[stopping, saver], max_epochs=5)
    assert result.stop_reason.startswith("early_stopping: val/noisy/loss did not improve")
    assert saver.best_model_score == min(result.history["val/clean/loss"].values)


class User(Callback):
    """A hook of the user's: monitored series may then be logged by it."""

    def on_train_epoch_start(self, run: Run) -> None:
        pass


@pytest.mark.parametrize("others", [[], [User()]], ids=["alone", "with_a_hook"])
@pytest.mark.parametrize("name", ["val/claen/loss", "val/loss", "val_loss", "clean/loss"])
def test_monitor_that_no_loader_logs_is_refused_with_the_close_match(name: str, others: Any):
    parts = (f"monitors {name!r}, which no step logs", "'val/clean/loss'")
    callbacks = [EarlyStopping(name), *others]
    refused(ConfigError, *parts, val_loader=LOADERS, callbacks=callbacks)


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ({}, ("the validate loaders are an empty dict",)),
        ({"a/b": [1]}, ("a validate loader is called 'a/b'", "without '/'")),
        ({"_a": [1]}, ("a validate loader is called '_a'",)),
        ({"..": [1]}, ("a validate loader is called '..'",)),
        ({0: [1]}, ("a validate loader is called 0",)),
        ({"clean": []}, ("the validate 'clean' loader has no batches",)),
        ({"clean": tiny.make_arrays(8)}, ("the validate 'clean' loader is of type dict",)),
        (tiny.make_arrays(8), ("the validate loader is of type dict", "data.from_arrays")),
        ([tiny.make_loader()] * 2, ("a list of 2 loaders", "{'name_0': loader_0")),
        ((tiny.make_loader(),), ("a tuple of 1 loaders", "{'name_0': loader_0}")),
    ],
    ids=[
        "empty",
        "slash",
        "private",
        "dots",
        "number",
        "no_batch",
        "batch",
        "arrays",
        "list",
        "tuple",
    ],
)
def test_what_are_no_loaders_is_refused(given: Any, parts: tuple[str, ...]):
    refused(DataError, *parts, val_loader=given)


@pytest.mark.parametrize("make", [lambda a, b: {"a": a, "b": b}, lambda a, b: [a, b]])
def test_several_training_loaders_are_refused(make: Any):
    loader = make(tiny.make_loader(), tiny.make_loader())
    refused(DataError, "of 2 loaders; training takes one", "MapDataset.mix", loader=loader)


def test_list_of_batches_is_one_loader():
    batches = [(batch["x"],) for batch in integers(16, 0)]
    step = lambda self, model, batch: self.log("mean", jnp.mean(batch[0]))  # noqa: E731
    got = tiny.make_trainer().validate(module_with(validation_step=step), batches, verbose=False)
    assert got == pytest.approx({"val/mean": mean_of(integers(16, 0))}, rel=ROUNDING)


def test_lightnings_parameter_for_the_loader_is_refused():
    module = module_with(validation_step=lambda self, model, batch, dataloader_idx=0: None)
    refused(ConfigError, "add a parameter `loader_name`", module=module, stage="validate")
    hook = lambda self, run, outputs, batch, batch_idx, dataloader_idx=0: None  # noqa: E731
    callback = type("Mine", (Callback,), {"on_validation_batch_end": hook})()
    refused(ConfigError, "`run.loader_name` says which loader it is", callbacks=[callback])


def test_predict_of_several_loaders_is_a_dict_of_lists():
    loaders = {"a": integers(20, 0), "b": integers(8, 1)}
    got = tiny.make_trainer().predict(Means(), loaders)
    assert [*got] == ["a", "b"]
    for name, batches in loaders.items():
        assert len(got[name]) == len(batches)
        np.testing.assert_array_equal(
            np.concatenate(got[name]), np.concatenate([b["x"] for b in batches])
        )


def test_predict_streams_pairs_of_name_and_predictions():
    seen: list[Any] = []

    class Watch(Callback):
        def on_predict_batch_end(self, run: Run, outputs: Any, batch: Any, batch_idx: int) -> None:
            seen.append((run.loader_name, batch_idx))

    loaders = {"a": integers(20, 0), "b": integers(8, 1)}
    pairs = list(tiny.make_trainer(Watch()).predict(Means(), loaders, stream=True))
    assert [name for name, _ in pairs] == ["a", "a", "a", "b"]
    assert seen == [("a", 0), ("a", 1), ("a", 2), ("b", 0)]
    np.testing.assert_array_equal(pairs[-1][1], loaders["b"][0]["x"])


def test_predict_step_may_take_the_name_of_the_loader():
    def predict_step(self: Any, model: Any, batch: Any, loader_name: str) -> Any:
        return batch["x"] * (2.0 if loader_name == "b" else 1.0)

    loaders = {"a": integers(8, 0), "b": integers(8, 1)}
    got = tiny.make_trainer().predict(module_with(predict_step=predict_step), loaders)
    np.testing.assert_array_equal(got["b"][0], 2.0 * loaders["b"][0]["x"])
    np.testing.assert_array_equal(got["a"][0], loaders["a"][0]["x"])


def test_accuracy_is_logged_for_each_loader():
    accuracy, module = Accuracy(), tiny.Tiny()
    result, _ = tiny.fit(val_loader=LOADERS, module=module, callbacks=[accuracy], max_epochs=1)
    assert {"val/clean/accuracy", "val/noisy/accuracy"} <= set(result.metrics)


def test_accuracy_refuses_bad_labels_of_any_loader():
    bad = [tiny.make_batches(1)[0], {**tiny.make_batches(1)[0], "label": np.full(8, 7, np.int32)}]
    loaders = {"good": tiny.make_batches(2), "bad": bad}
    parts = ("8 labels of the validate batches",)
    refused(
        DataError,
        *parts,
        loader=loaders,
        stage="validate",
        module=tiny.Tiny(),
        callbacks=[Accuracy()],
        compiled=["validate step of 'good'"],
    )


def test_one_shot_loader_among_several_waits_for_the_first_validation():
    loaders = {"once": iter(tiny.make_batches(2)), "again": tiny.make_batches(2)}
    result, _ = tiny.fit(val_loader=loaders, max_epochs=1, num_sanity_val_steps=1)
    assert len(result.history["val/once/loss"]) == len(result.history["val/again/loss"]) == 1


def test_resume_with_several_loaders_is_the_uninterrupted_run(tmp_path):
    saver = Checkpoint(tmp_path, save_top_k=-1)
    whole, state = tiny.fit(val_loader=LOADERS, callbacks=[saver], max_epochs=3)
    resumed, same = tiny.fit(val_loader=LOADERS, ckpt_path=tmp_path / "step_8", max_epochs=3)
    tiny.assert_same_bits(same, state)
    for name in ("val/clean/loss", "val/noisy/loss"):
        assert resumed.history[name].values == whole.history[name].values[1:]
