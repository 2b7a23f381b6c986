"""How parameters are divided: the choice of FSDP, rules, annotations, and what is refused."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh
from jax.sharding import PartitionSpec as P

from jaxtrainer import Trainer
from jaxtrainer.errors import ConfigError, OptionError
from jaxtrainer.layout import Layout
from jaxtrainer.partition import build_layout, fsdp_spec
from jaxtrainer.sharding import build_mesh
from jaxtrainer.state import TrainState, adapter_for, flat_items
from tests import divided, tiny
from tests.bad_input import refused

TENSOR = {"data": 2, "model": 4}


def layout_of(make: Any, mesh: Any, sharding: Any = None) -> Layout:
    """The layout of a model whose arrays are not allocated."""
    kept: list[Any] = []

    def split() -> Any:
        with nnx.use_eager_sharding(False):
            model = make(nnx.Rngs(0))
        kept.append(adapter_for(model))
        return kept[0].split(model)[0]

    params: Any = jax.eval_shape(split)
    return build_layout(build_mesh(mesh), sharding, params, kept[0].variables(params))


@pytest.mark.parametrize(
    ("shape", "spec"),
    [
        ((256, 1024), P(None, "fsdp")),
        ((1024, 256), P("fsdp")),
        ((64, 64), P("fsdp")),  # of equal ones the first
        ((3, 3, 64, 128), P(None, None, None, "fsdp")),
        ((50257, 768), P(None, "fsdp")),  # the largest is no multiple of 8
        ((63, 65), None),
        ((63, 63, 63), None),
        ((4096,), P("fsdp")),
        ((2048,), None),
        ((), None),
    ],
)
def test_fsdp_divides_the_largest_dimension_that_is_a_multiple(shape: Any, spec: Any):
    assert fsdp_spec(shape, "fsdp", 8) == spec


@pytest.mark.parametrize(
    ("mesh", "sharding", "specs", "gathered"),
    [
        ({"data": -1}, None, {}, ()),
        ({"data": -1}, "fsdp", {"up": P(None, "data"), "down": P("data")}, ("data",)),
        ({"fsdp": 8}, None, {"up": P(None, "fsdp"), "down": P("fsdp")}, ("fsdp",)),
        ({"data": 2, "fsdp": 4}, "fsdp", {"up": P(None, "fsdp"), "down": P("fsdp")}, ("fsdp",)),
        ({"data": 2, "fsdp": 4}, "ddp", {}, ()),
        ({"data": 8, "fsdp": 1}, None, {}, ()),
    ],
)
def test_word_says_which_axis_divides(mesh: Any, sharding: Any, specs: Any, gathered: Any):
    layout = layout_of(divided.MLP, mesh, sharding)
    assert layout.specs == {f"{name}/kernel": spec for name, spec in specs.items()}
    assert layout.gathered == gathered


def test_first_rule_that_matches_counts_and_fsdp_divides_the_rest():
    rules = [("up", P()), ("*/kernel", P("model")), ("*", P())]
    layout = layout_of(divided.MLP, TENSOR, rules)
    assert layout.specs == {"down/kernel": P("model"), "last/kernel": P("model")}
    layout = layout_of(divided.MLP, divided.MESHES["mix"], {"up": P(), "last/kernel": P("model")})
    assert layout.specs == {"last/kernel": P("model"), "down/kernel": P("fsdp")}


def test_parameters_without_a_multiple_are_named():
    layout = layout_of(lambda rngs: nnx.Linear(65, 67, rngs=rngs), {"fsdp": 8})
    assert layout.is_whole
    assert layout.undivided == ("kernel",)


def annotated(*names: Any, **metadata: Any) -> Any:
    init = nnx.with_partitioning(nnx.initializers.ones, names, **metadata)
    return lambda rngs: nnx.Linear(8, 16, kernel_init=init, rngs=rngs)


@pytest.mark.parametrize(
    ("make", "sharding"),
    [
        (annotated(None, "model"), None),
        (annotated("embed", "mlp"), {"embed": None, "mlp": "model"}),
        (annotated("embed", "mlp"), [("mlp", ("model",)), ("embed", None), ("heads", "model")]),
        (annotated("embed", "mlp", sharding_rules=(("mlp", "model"), ("embed", None))), None),
        # Of two dimensions that go to one axis the first one does.
        (annotated(None, "mlp"), {"mlp": "model"}),
    ],
)
def test_annotations_of_the_model_are_followed(make: Any, sharding: Any):
    assert layout_of(make, TENSOR, sharding).specs == {"kernel": P(None, "model")}


def test_rules_and_words_overrule_annotations():
    make = annotated(None, "model")
    assert layout_of(make, {"data": 8}, "ddp").is_whole
    assert layout_of(make, {"data": 8}).is_whole
    given = {"kernel": P("model")}
    assert layout_of(make, TENSOR, given).specs == given
    assert layout_of(annotated("m", "m"), TENSOR, {"m": "model"}).specs == {
        "kernel": P("model", None)
    }


def test_annotated_model_is_trained_in_parts():
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("embed", "mlp"))
    module = divided.Classify()
    module.make = lambda rngs: nnx.Linear(divided.WIDTH, 8, kernel_init=init, rngs=rngs)
    rules = {"embed": "model", "mlp": None}
    divided.train("mlp", "tensor", module=module, sharding=rules)
    assert module.model.kernel[...].sharding.spec == P("model", None)


OPTIMIZERS = {
    "adam": optax.adam(1e-3),
    "chain": optax.chain(optax.clip(1.0), optax.add_decayed_weights(0.1), optax.lamb(1e-3)),
    "masked": optax.masked(
        optax.adam(1e-3), lambda params: jax.tree.map(lambda x: x.ndim > 1, params)
    ),
    "multi": optax.partition(
        {"a": optax.adam(1e-3), "b": optax.sgd(0.1, momentum=0.9)},
        lambda params: jax.tree.map(lambda x: "a" if x.ndim > 1 else "b", params),
    ),
    "steps": optax.MultiSteps(optax.adam(1e-3), 2).gradient_transformation(),
    "adafactor": optax.adafactor(1e-3, min_dim_size_to_factor=32, momentum=0.9),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_of_an_optimizer_follows_its_parameters(name: str):
    layout = layout_of(divided.MLP, {"fsdp": 8})
    shapes = {"up": (64, 128), "down": (128, 64), "last": (64, 8)}
    params = {k: {"kernel": jnp.zeros(s), "bias": jnp.zeros(s[1])} for k, s in shapes.items()}
    opt_state = jax.eval_shape(lambda: {"default": OPTIMIZERS[name].init(params)})
    none: Any = np.zeros((), np.float32)
    state = TrainState(none, params, {}, opt_state, none, None, {}, {}, {})
    flat, _ = jax.tree_util.tree_flatten_with_path(layout.of_state(state).opt_state)
    found = {jax.tree_util.keystr(p[-2:]): [] for p, _ in flat}
    for path, spec in flat:
        found[jax.tree_util.keystr(path[-2:])].append((spec.shape, spec.sharding.spec))
    kernels = found["['up']['kernel']"]
    assert ((64, 128), P(None, "fsdp")) in kernels
    # Whatever has another shape, as Adafactor's rows and columns, is whole.
    assert all(s == P() for shape, s in kernels if shape != (64, 128))
    others = [s for key, specs in found.items() if "kernel" not in key for _, s in specs]
    assert set(others) == {P()}
    assert len(kernels) == {"adafactor": 4, "steps": 3, "masked": 2}.get(name, 2)


@pytest.mark.parametrize(
    ("sharding", "parts"),
    [
        ({"*/kernle": P("model")}, ["'*/kernle' matches no parameter", "up/kernel"]),
        ({"upp": P("model")}, ["'upp' matches no parameter", "Did you mean 'up'?"]),
        (
            {"up/bias": P(None, "model")},
            ["'up/bias' of shape (128,)", "2 entries for 1 dim", "`jax.P(None,)`"],
        ),
        (
            {"up": P("modle")},
            [
                "no axis 'modle'",
                "data, model",
                "mesh={'data': 2, 'model': 4, 'modle': 2}",
                "'model'?",
            ],
        ),
        (
            {"*/kernel": P(None, ("data", "model"))},
            [
                "'last/kernel' of shape (64, 7)",
                "dimension 1 of 7 does not",
                "8",
                "dimension 0 does",
            ],
        ),
        ({"up/kernel": P("model", "model")}, ["'model' can divide one dimension only"]),
        ({"mlp": "model"}, ["'mlp' has 'model'", "the model has none", "jax.P(None, 'model')"]),
    ],
)
def test_rule_that_does_not_fit_is_refused(sharding: Any, parts: list[str]):
    class Odd(divided.MLP):
        def __init__(self, rngs: nnx.Rngs) -> None:
            super().__init__(rngs)
            self.last = nnx.Linear(divided.WIDTH, 7, rngs=rngs)

    module = divided.Classify()
    module.make = Odd
    options = {"mesh": TENSOR, "sharding": sharding}
    refused(ConfigError, *parts, module=module, loader=divided.batches(1), **options)


def test_unknown_logical_axis_is_refused():
    with pytest.raises(ConfigError, match=r"annotated with .*'mlp'.*knows the axis 'mlp'.*model"):
        layout_of(annotated(None, "mlp"), TENSOR, {"embed": None})


def test_axis_that_divides_nothing_is_refused_unless_the_mesh_is_ones_own():
    with pytest.raises(ConfigError, match="axis 'model' divides neither the batch nor a parameter"):
        layout_of(divided.MLP, TENSOR)
    module, own = divided.Classify(), Mesh(np.array(jax.devices()[:2]), ("model",))
    tiny.fit(divided.batches(1), module=module, mesh=own, max_epochs=1)
    assert module.model.up.kernel[...].sharding.mesh.shape == {"model": 2}


@pytest.mark.parametrize(
    ("value", "part"),
    [
        ("fdsp", r"sharding='fdsp': use 'ddp'.*Did you mean 'fsdp'\?"),
        (8, "sharding=8: expected 'ddp', 'fsdp', or rules"),
        ({"up": 3}, "'up' has 3; expected a `jax.sharding.PartitionSpec`"),
        ([("up", P()), ("up", P("model"))], "each pattern once"),
    ],
)
def test_option_that_is_no_sharding_is_refused(value: Any, part: str):
    with pytest.raises(ConfigError, match=part):
        Trainer(max_epochs=1, sharding=value)
    with pytest.raises(OptionError, match=r"strategy.*sharding"):
        Trainer(strategy="fsdp")  # pyright: ignore[reportCallIssue]


def test_mesh_of_explicit_axes_is_taken_as_automatic():
    mesh = build_mesh(jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,)))
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_state_of_every_parameter_has_a_place():
    layout = layout_of(divided.Transformer, {"fsdp": 8})
    params = jax.eval_shape(lambda: adapter_for(m := divided.Transformer(nnx.Rngs(0))).split(m)[0])
    shards = {n: s.shard_shape(x.shape) for (n, s), (_, x) in _pairs(layout, params)}
    assert shards["embed/embedding"] == (8, 64)
    assert shards["blocks/0/attention/out/kernel"] == (4, 16, 8)
    assert shards["blocks/0/norm/scale"] == (64,)


def _pairs(layout: Layout, params: Any) -> Any:
    return zip(flat_items(layout.of_params(params)), flat_items(params), strict=True)
