"""Operations of each module in `ModelSummary` and `Trainer.plan`, for every kind of model."""

from __future__ import annotations

import io
import pickle
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen, nnx
from flax.nnx import bridge
from rich.console import Console

from jaxtrainer import Callback, Run
from jaxtrainer.callbacks import ModelSummary, Throughput
from jaxtrainer.errors import AttributeChangedError
from jaxtrainer.flops import ModuleFlops
from tests import tiny

ROWS, IN, OUT = 8, tiny.FEATURES, tiny.CLASSES


def flops_of(make: Any, **options: Any) -> dict[str, ModuleFlops]:
    plan = tiny.make_trainer(**options).plan(tiny.Tiny(make), tiny.make_batches(1)[0])
    return dict(plan.module_flops)


def summary_of(module: Any, **options: Any) -> Any:
    callback = ModelSummary(max_depth=-1, console=Console(file=io.StringIO(), width=100))
    tiny.make_trainer([callback], max_epochs=1, **options).fit(module, tiny.make_batches(2))
    return callback.summary


def linear(rows: int, size: int, to: int) -> int:
    """Forward operations of a layer with bias."""
    return 2 * rows * size * to + rows * to


def test_layers_have_their_products():
    flops = flops_of(tiny.Net)
    assert flops["first"].forward == linear(ROWS, IN, 8)
    assert flops["last"].forward == linear(ROWS, 8, OUT)
    # The last layer's input has a gradient, the batch has none.
    assert 2 * ROWS * IN * 8 <= flops["first"].backward < 2 * ROWS * IN * 8 + 2 * ROWS * 8
    assert 4 * ROWS * 8 * OUT <= flops["last"].backward < 4 * ROWS * 8 * OUT + 2 * ROWS * OUT
    parts = sum(flops[name].total for name in ("first", "norm", "dropout", "last"))
    assert parts < flops[""].total


class Nested(nnx.Module):
    """Layers at three depths, one of them called twice and one never."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(IN, IN, rngs=rngs)
        self.pair = nnx.List([nnx.Linear(IN, IN, rngs=rngs), nnx.Linear(IN, OUT, rngs=rngs)])
        self.unused = nnx.Linear(IN, IN, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.pair[1](self.pair[0](self.first(self.first(x))))


def test_module_holds_those_below_it():
    flops = flops_of(Nested)
    below = [flops[f"pair/{i}"] for i in range(2)]
    assert flops["pair"] == ModuleFlops(*map(sum, zip(*below, strict=True)))
    assert flops["pair"].forward == linear(ROWS, IN, IN) + linear(ROWS, IN, OUT)


def test_module_that_is_called_twice_counts_twice_and_one_that_is_not_has_none():
    flops = flops_of(Nested)
    assert flops["first"].forward == 2 * linear(ROWS, IN, IN)
    assert flops["unused"] == ModuleFlops(0.0, 0.0)


class Scanned(nnx.Module):
    """Five layers in one, run by a scan."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        make = nnx.vmap(lambda rngs: nnx.Linear(IN, IN, rngs=rngs))
        self.layers = nnx.split_rngs(splits=5)(make)(rngs)
        self.last = nnx.Linear(IN, OUT, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        graphdef, layers = nnx.split(self.layers)
        step = lambda x, layer: (nnx.merge(graphdef, layer)(x), None)  # noqa: E731
        return self.last(jax.lax.scan(step, x, layers)[0])


def test_layers_of_a_scan_count_as_often_as_it_runs():
    assert flops_of(Scanned)["layers"].forward == 5 * linear(ROWS, IN, IN)


class Method(nnx.Module):
    """A layer behind a method of another name, with checkpointing and a compiled call."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.inner = nnx.Linear(IN, OUT, rngs=rngs)

    def encode(self, x: jax.Array) -> jax.Array:
        graphdef, state = nnx.split(self.inner)
        return jax.checkpoint(lambda state, x: nnx.merge(graphdef, state)(x))(state, x)


class Methods(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.outer = Method(rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.outer.encode(x) * 2.0


def test_methods_and_modules_made_anew_are_known():
    flops = flops_of(Methods)
    assert flops["outer"].forward == flops["outer/inner"].forward == linear(ROWS, IN, OUT)


class Bridged(nnx.Module):
    """A layer of Linen between two others."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(IN, IN, rngs=rngs)
        dense = bridge.ToNNX(linen.Dense(OUT), rngs=rngs)
        self.dense = bridge.lazy_init(dense, jnp.ones((1, IN)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.dense(self.first(x))


def test_linen_in_a_bridge_is_a_module_too():
    flops = flops_of(Bridged)
    assert flops["first"].forward == linear(ROWS, IN, IN)
    assert flops["dense"].forward >= linear(ROWS, IN, OUT)


class Shares(nnx.Module):
    def __init__(self, rngs: nnx.Rngs) -> None:
        self.last = self.first = nnx.Linear(IN, IN, rngs=rngs)
        self.head = nnx.Linear(IN, OUT, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.head(self.last(self.first(x)))


def test_shared_module_has_one_row():
    flops = flops_of(Shares)
    assert flops["first"].forward == 2 * linear(ROWS, IN, IN)
    assert "last" not in flops


def test_devices_share_the_operations():
    one, four = flops_of(tiny.Net), flops_of(tiny.Net, mesh={"data": 4})
    assert {path: flops.divided(4) for path, flops in one.items()} == four


def test_sum_is_about_what_xla_counts_of_the_step():
    wide = lambda rngs: nnx.Sequential(  # noqa: E731
        nnx.Linear(IN, 256, rngs=rngs), nnx.relu, nnx.Linear(256, OUT, rngs=rngs)
    )
    module = tiny.Tiny(wide, optax.sgd(0.1))
    batch = tiny.make_batches(1, size=64)[0]
    plan = tiny.make_trainer().plan(module, batch)
    # The update, which is of no module, has two for each parameter.
    update = 2 * plan.num_params
    assert plan.module_flops[""].total + update == pytest.approx(plan.flops, rel=0.01)


def test_summary_shows_them():
    summary = summary_of(tiny.Tiny(Nested))
    plan = tiny.make_trainer().plan(tiny.Tiny(Nested), tiny.make_batches(2))
    rows = {row.path: row.flops for row in summary.rows}
    assert rows == {path: f.total for path, f in plan.module_flops.items() if path}
    assert "FLOPs" in str(summary)
    assert rows["unused"] == 0.0


def test_plan_shows_the_modules_below_the_root():
    plan = tiny.make_trainer().plan(tiny.Tiny(Nested), tiny.make_batches(1))
    table = [line.split() for line in str(plan).splitlines()[-6:]]
    rows = {line[0]: line[-1] for line in table if len(line) > 1}
    share = plan.module_flops["first"].total / plan.module_flops[""].total
    assert list(rows) == ["module", "in", "first", "pair", "unused"]
    assert (rows["in"], rows["first"], rows["unused"]) == ("100.0%", f"{share:.1%}", "0.0%")


def test_plan_can_be_pickled():
    plan = tiny.make_trainer().plan(tiny.Tiny(Nested), tiny.make_batches(1))
    again = pickle.loads(pickle.dumps(plan))
    assert again == plan
    assert again.module_flops == plan.module_flops


class EquinoxNet(eqx.Module):
    layer: eqx.nn.Linear

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.layer = eqx.nn.Linear(IN, OUT, key=rngs.params())

    def __call__(self, x: jax.Array) -> jax.Array:
        return jax.vmap(self.layer)(x)


def test_model_of_other_modules_has_no_such_column():
    summary = summary_of(tiny.Tiny(EquinoxNet))
    assert {row.flops for row in summary.rows} == {None}
    assert "FLOPs" not in str(summary)


class TracedOnce(tiny.Tiny):
    """Its step needs what only the first trace has."""

    def __init__(self, values: Any) -> None:
        super().__init__()
        self.next_value = values.__next__

    def training_step(self, model: Any, batch: Any) -> Any:
        self.next_value()
        return super().training_step(model, batch)


def test_model_that_cannot_be_traced_again_trains_without_the_column():
    before = dict(vars(tiny.Net)), dict(vars(nnx.Linear))
    summary = summary_of(TracedOnce(iter([1])))
    assert {row.flops for row in summary.rows} == {None}
    assert "FLOPs" not in str(summary)
    assert summary.figures["batch"] == "8 samples"
    assert (dict(vars(tiny.Net)), dict(vars(nnx.Linear))) == before


@pytest.mark.slow
def test_training_is_the_same_with_a_summary():
    _, plain = tiny.fit(max_epochs=1)
    module = tiny.Tiny()
    callback = ModelSummary(console=Console(file=io.StringIO()))
    _, state = tiny.fit(module=module, callbacks=[callback], max_epochs=1)
    tiny.assert_same_bits(state, plain)
    assert not [n for m in (module.model, module.model.first) for n in vars(m) if "path" in n]


def test_attributes_stay_frozen_after_the_trace():
    class Changes(Callback):
        def on_train_start(self, run: Run) -> None:
            module.make = module.scale = 2.0

    class Scaled(tiny.Tiny):
        scale: float = 1.0

        def training_step(self, model: Any, batch: Any) -> Any:
            return super().training_step(model, batch)["loss"] * self.scale

    module = Scaled()
    callbacks = [ModelSummary(console=Console(file=io.StringIO())), Changes()]
    with pytest.raises(AttributeChangedError, match="scale"):
        tiny.make_trainer(callbacks, max_epochs=1).fit(module, tiny.make_batches(2))


def test_they_are_counted_when_they_are_asked_for():
    class Plans(Callback):
        def on_train_start(self, run: Run) -> None:
            self.plan = run.plan

    plans = Plans()
    trainer = tiny.make_trainer([plans, Throughput()], max_epochs=1)
    trainer.fit(tiny.Tiny(), tiny.make_batches(2))
    assert "counted" not in vars(plans.plan)
    assert plans.plan.module_flops["first"].forward == linear(ROWS, IN, 8)


class ByHand(tiny.Tiny):
    """Makes its own update."""

    automatic_optimization = False

    def training_step(self, model: Any, batch: Any) -> Any:
        take = super().training_step
        loss, model = self.minimize(lambda model: take(model, batch)["loss"], model)
        return loss


def test_step_that_makes_its_own_updates_is_counted():
    trainer = tiny.make_trainer()
    flops = trainer.plan(ByHand(), tiny.make_batches(1)).module_flops
    assert flops["first"].forward == linear(ROWS, IN, 8)
    assert flops["last"].backward >= 4 * ROWS * 8 * OUT
