"""Updates that a training step makes itself: what `TrainModule.minimize` does, while tracing.

Works on the model's arrays by name, so that it is the same for every kind of model. May import
levels 0 and 1, `state`, `optim`, `outputs` and `update`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state

from jaxtrainer.errors import ConfigError, StepError, did_you_mean
from jaxtrainer.handed import handed_back
from jaxtrainer.loss_scale import scaled_grad
from jaxtrainer.optim import Optimizer, owners, select
from jaxtrainer.outputs import scalar_loss
from jaxtrainer.precision import Precision
from jaxtrainer.state import Adapter, Nested, flat_items, named_leaves, nest
from jaxtrainer.types import Array, PyTree
from jaxtrainer.update import OptimizerOptions, counted, update_owned


def refuse_options(options: OptimizerOptions, owner: str) -> None:
    """Raise ConfigError for options that mean nothing where the step makes its own updates."""
    why = f"{owner} has `automatic_optimization = False`, so its training_step makes the updates"
    if options.accumulate > 1:
        raise ConfigError(
            f"{why}: accumulate_grad_batches={options.accumulate} has nothing to add up. Leave it "
            "out, and give an optimizer its window: `optax.MultiSteps(optax.adam(1e-3), "
            f"every_k_schedule={options.accumulate}).gradient_transformation()`."
        )
    if options.clip_value is not None:
        by = "clip_by_global_norm" if options.clip_algorithm == "norm" else "clip"
        raise ConfigError(
            f"{why}: gradient_clip_val={options.clip_value} does not say which gradients. Leave it "
            f"out, and clip in an optimizer: `optax.chain(optax.{by}({options.clip_value}), "
            "optax.adam(1e-3))`."
        )
    if options.hooks:
        raise ConfigError(
            f"{why}: a callback that looks at updates (GradientMonitor) sees none. Leave it out, "
            "and log in training_step: `self.log('grad_norm', optax.tree.norm(grads))`."
        )


class Updates:
    """The updates of one training step, while it is traced.

    Args:
        options: The optimisers.
        adapter: Of the model.
        precision: The dtype in which the step sees the parameters.
        where: The step's name, for messages.
        params: As they are kept, before the step.
        opt_state: By name of the optimiser, before the step.
        epoch: Index of the epoch: `[]`, int32.
        scale: Of the loss, for its derivative: `[]`, float32; None for none.

    Attributes:
        checked: What must be finite for the updates to count, beside the parameters.
        given: The parameters as the step's model has them at first.
        model: The model after the latest update; to be set to the one that the step gets.
        opt_state: By name, after the latest update.
    """

    def __init__(
        self,
        options: OptimizerOptions,
        adapter: Adapter,
        precision: Precision,
        where: str,
        params: Nested,
        opt_state: Mapping[str, PyTree],
        epoch: Array,
        scale: Array | None = None,
    ) -> None:
        self.given = precision.cast_params(params)
        self.model: Any = None
        self.opt_state = dict(opt_state)
        self._all = options.optimizers
        self._adapter = adapter
        self._precision = precision
        self._where = where
        self._epoch = epoch
        self._scale = scale
        self.checked: list[Array] = []
        self._kept = dict(flat_items(params))
        self._shown = dict(flat_items(self.given))
        self._replaced: list[Any] = []
        self._num_changes = 0
        self._trace = get_opaque_trace_state(convention="nnx")

    @property
    def params(self) -> Nested:
        """Return the parameters as they are kept, after the latest update."""
        return nest(self._kept)

    def minimize(
        self, loss_fn: Callable[[Any], Any], model: Any, name: str | None, *, has_aux: bool
    ) -> tuple[Any, Any]:
        """See `TrainModule.minimize`."""
        optimizers = self._find(name, "minimize")
        before = self._read(model, "minimize(loss_fn, model)")
        where = f"the loss function of {self._where}"

        def value(owned: Nested) -> tuple[Array, Any]:
            shown = dict(flat_items(self._precision.cast_params(owned)))
            given = nest({**self._shown, **shown})

            def run(given: Nested) -> tuple[Any, Nested, Nested]:
                inside = self._adapter.merge(given, before, training=True)
                return loss_fn(inside), *self._adapter.read_back(inside, where=where)

            returned, after, changed = run(given)
            returned, aux = _split_aux(returned, where, has_aux)
            loss = scalar_loss(returned, f"{where} returned", "end it with `return loss`")
            refuse_changed_params(given, after, where, lambda given: run(given)[1])
            _refuse_unrelated(loss, owned, where, optimizers)
            return loss, (aux, changed)

        owned = select(self.params, owners(optimizers))
        (loss, (aux, after)), grads = scaled_grad(value, self._scale)(owned)
        if self._scale is not None:
            # A transformation may make finite updates of what is not (`optax.zero_nans`).
            self.checked += jax.tree.leaves(grads)
        model = self._apply(optimizers, model, after, grads, value=loss)
        return ((loss, aux) if has_aux else loss), model

    def apply_gradients(
        self, model: Any, grads: PyTree, name: str | None, extra: Mapping[str, Any]
    ) -> Any:
        """See `TrainModule.apply_gradients`."""
        optimizers = self._find(name, "apply_gradients")
        if self._scale is not None:
            raise StepError(
                f"{self._where} calls apply_gradients with gradients of its own, and with "
                "precision '16-mixed' the loss has to be scaled for them: call `loss, model = "
                "self.minimize(loss_fn, model)`, which does, or use `precision='bf16-mixed'`."
            )
        model_state = self._read(model, "apply_gradients(model, grads)")
        found = named_leaves(grads)
        owned = nest({path: self._grad(found, path) for path in owners(optimizers)})
        return self._apply(optimizers, model, model_state, owned, **extra)

    def finish(self, params: Nested) -> None:
        """Take the parameters of the model with which the step ended.

        Raises:
            StepError: If the step has changed none.
        """
        self._take_over(params)
        if not self._num_changes:
            raise StepError(
                f"{self._where} changed no parameter, and with `automatic_optimization = False` "
                "nothing else does: call `loss, model = self.minimize(loss_fn, model)` in it."
            )
        self.opt_state = {name: counted(state) for name, state in self.opt_state.items()}

    def _apply(
        self,
        optimizers: Mapping[str, Optimizer],
        model: Any,
        model_state: Nested,
        grads: Nested,
        **extra: Any,
    ) -> Any:
        params, before = self.params, [*self._shown.values()]
        for name, optimizer in optimizers.items():
            state = self.opt_state[name]
            change = update_owned(optimizer, params, state, grads, self._epoch, **extra)
            self.opt_state[name] = change.state
            self._kept.update(flat_items(change.params))
            self._shown.update(flat_items(self._precision.cast_params(change.params)))
        self.model = self._adapter.write(model, nest(self._shown), model_state)
        if self.model is not model:
            self._replaced += before
        self._num_changes += 1
        return self.model

    def _find(self, name: str | None, what: str) -> dict[str, Optimizer]:
        """Return the optimiser of that name, with those that a callback has divided it into."""
        if get_opaque_trace_state(convention="nnx") != self._trace:
            raise StepError(
                f"{what}() was called inside a nested transform (grad, scan, vmap, jit, ...), "
                "which its update cannot leave. Call it in the step itself, several times or in "
                "a Python loop."
            )
        roots = sorted({key.split(".")[0] for key in self._all})
        if name is None and len(roots) > 1:
            arguments = "loss_fn, model" if what == "minimize" else "model, grads"
            raise ConfigError(
                f"{what}() does not say which of the optimizers {_quoted(roots)} is to update; "
                f"write `self.{what}({arguments}, {roots[0]!r})`."
            )
        key = roots[0] if name is None else name
        found = {k: o for k, o in self._all.items() if k == key or k.startswith(f"{key}.")}
        if not found:
            hint = did_you_mean(str(key), self._all)
            raise ConfigError(
                f"{what}() got the optimizer {key!r}; configure_optimizers returned "
                f"{_quoted(self._all)}.{hint}"
            )
        return found

    def _read(self, model: Any, call: str) -> Nested:
        """Return the model's other arrays, and take over what the step assigned to parameters."""
        if type(model) is not type(self.model):
            raise StepError(
                f"{self._where} called `self.{call}` with a {type(model).__name__} for the model, "
                f"expected the whole model, a {type(self.model).__name__}, as the step gets it."
            )
        params, model_state = self._adapter.read_back(model, where=self._where)
        self._take_over(params)
        return model_state

    def _take_over(self, params: Nested) -> None:
        for name, leaf in flat_items(params):
            shown, kept = self._shown[name], self._kept[name]
            if leaf is shown:
                continue
            if any(leaf is old for old in self._replaced):
                raise StepError(
                    f"{self._where} used the model as it was before an update, which a model that "
                    "cannot be changed in place still has. Go on with the one that is returned: "
                    "`loss, model = self.minimize(loss_fn, model)`."
                )
            if leaf.shape != kept.shape:
                raise StepError(
                    f"{self._where} assigned {leaf.dtype}{list(leaf.shape)} to the parameter "
                    f"{name}, which is {kept.dtype}{list(kept.shape)}."
                )
            new = leaf.astype(kept.dtype)
            # What the step left alone keeps the digits that a narrower compute dtype has not.
            is_narrow = shown.dtype != kept.dtype
            self._kept[name] = jnp.where(leaf == shown, kept, new) if is_narrow else new
            self._shown[name] = leaf
            self._num_changes += 1

    def _grad(self, found: Mapping[str, Any], name: str) -> Array:
        kept, grad = self._kept[name], found.get(name)
        if grad is None or grad.shape != kept.shape:
            got = "none" if grad is None else f"{grad.dtype}{list(grad.shape)}"
            raise StepError(
                f"apply_gradients got {got} for the parameter {name}, expected a gradient of shape "
                f"{list(kept.shape)}. Pass them for the whole model, as `nnx.grad(loss_fn)(model)` "
                "returns them, or of a pytree `jax.grad(loss_fn)(model)`."
            )
        return grad.astype(kept.dtype)


def refuse_changed_params(
    before: Nested, after: Nested, where: str, again: Callable[[Nested], Nested]
) -> None:
    """Raise StepError if parameters were assigned to, where an update would overwrite them.

    Args:
        before: Those that the step got.
        after: Those that it left.
        where: The step, for the message.
        again: Gives the latter from the former once more.
    """
    now, given = dict(flat_items(after)), dict(flat_items(before))
    assigned = [name for name, value in given.items() if now[name] is not value]
    if assigned:
        # Some of them may only be handed back by a transform, which another trace tells.
        jaxpr = jax.make_jaxpr(lambda x: dict(flat_items(again(nest(x)))))(given)
        is_same = dict(zip(sorted(given), handed_back(jaxpr), strict=True))
        assigned = [name for name in assigned if not is_same[name]]
    if assigned:
        raise StepError(
            f"{where} assigned to the parameters {', '.join(assigned)}; the optimiser's update "
            "would overwrite them. Change parameters through the loss, or keep what the step "
            "assigns in an `nnx.Variable`."
        )


def _split_aux(returned: Any, where: str, has_aux: bool) -> tuple[Any, Any]:
    is_pair = isinstance(returned, tuple) and len(returned) == 2
    if has_aux and not is_pair:
        raise StepError(f"{where} must end with `return loss, aux`, because of `has_aux=True`.")
    if is_pair and not has_aux:
        raise StepError(
            f"{where} returned a tuple; to get what comes with the loss write "
            "`(loss, aux), model = self.minimize(loss_fn, model, has_aux=True)`."
        )
    return returned if has_aux else (returned, None)


def _refuse_unrelated(
    loss: Array, owned: Nested, where: str, optimizers: Mapping[str, Optimizer]
) -> None:
    # Only what was computed from the arguments of `grad` belongs to its trace.
    trace = getattr(jax.tree.leaves(owned)[0], "_trace", None)
    if trace is not None and getattr(loss, "_trace", None) is not trace:
        raise StepError(
            f"{where} returned a loss that does not depend on a parameter of the optimizer "
            f"{_quoted(optimizers)}, so that there is no gradient. Compute it with the model that "
            "the function gets as its argument: `def loss_fn(model): ...`."
        )


def _quoted(names: Any) -> str:
    return ", ".join(map(repr, names))
