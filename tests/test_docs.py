"""The documents: their programs run, and the names in their tables exist."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.nnx
import jax
import optax
import pytest

import jaxtrainer
from jaxtrainer import (
    Callback,
    DataModule,
    FitResult,
    Run,
    Trainer,
    TrainModule,
    callbacks,
    loggers,
)
from jaxtrainer.callback import HOOKS
from jaxtrainer.errors import OptionError
from jaxtrainer.vocabulary import IN_THE_STEP, OF_THE_MODULE, OF_THE_TRAINER, RENAMED

DOCS = Path(__file__).parents[1] / "docs"
FROM_LIGHTNING = (DOCS / "from-lightning.md").read_text(encoding="utf-8")


def programs(text: str) -> list[str]:
    """The blocks of a document that are marked to be run."""
    return re.findall(r"^```python run\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def spans(text: str) -> list[str]:
    """The pieces of code in a text, blocks left out."""
    without_blocks = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"`([^`]+)`", without_blocks)


def rows(text: str) -> Iterator[list[str]]:
    """The cells of the rows of all tables."""
    for line in text.splitlines():
        if line.startswith("|") and not line.startswith(("|---", "| Lightning |")):
            yield [cell.strip() for cell in line.strip("|").split(" | ")]


SLOW = {"callbacks", "checkpoints", "data", "debugging", "guarantees", "loggers", "module"}
SLOW |= {"from-keras", "from-lightning", "performance", "precision", "trainer"}
"""Pages whose programs compile for some seconds; `make test-docs` runs those of all pages."""

DOCUMENTS = [
    pytest.param(path, marks=[pytest.mark.slow] * (path.stem in SLOW), id=path.stem)
    for path in sorted(DOCS.glob("*.md"))
]


@pytest.mark.parametrize("path", DOCUMENTS)
def test_programs_of_a_document_run(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    namespace: dict[str, Any] = {"__name__": "document"}
    # As in a user's program: only the tests are strict about mixed dtypes and ranks.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for number, program in enumerate(programs(path.read_text(encoding="utf-8"))):
            exec(compile(program, f"{path.name}[{number}]", "exec"), namespace)


ROOTS: dict[str, Any] = {
    "data": jaxtrainer.data,
    "jax": jax,
    "jnp": jax.numpy,
    "module": TrainModule,
    "nnx": flax.nnx,
    "optax": optax,
    "result": FitResult,
    "run": Run(),
    "self": TrainModule,
    "trainer": Trainer,
}
OWNERS = (jaxtrainer, callbacks, loggers, TrainModule, Callback, DataModule, Run(), TrainModule())
"""Where a name without a root is looked for."""

WORDS = {
    *("True", "False", "None", "teardown", "model", "loader", "outputs", "order", "rngs"),
    *("JAX_PLATFORMS", "jax_debug_nans", "step_N", "_step", "_epoch", "loader_name", "callbacks"),
    *("batch_idx", "dataloader_idx", "sync_dist", "batch_size", "flops_per_batch", "ckpt_path"),
    *("save_hyperparameters", "wrt", "acc", "loss", "state_key"),
}
"""Words in code that are no public names: arguments, Lightning's, parts of names."""


def resolve(node: ast.AST) -> Any:
    """What a name in the documents stands for; raises LookupError if there is no such thing."""
    if isinstance(node, ast.Attribute):
        owner = resolve(node.value)
        # What the value of a field has is not known here.
        if owner is Ellipsis or node.attr in getattr(owner, "__dataclass_fields__", {}):
            return Ellipsis
        return _member(owner, node.attr)
    assert isinstance(node, ast.Name)
    if node.id in ROOTS:
        return ROOTS[node.id]
    for owner in OWNERS:
        if hasattr(owner, node.id):
            return getattr(owner, node.id)
    raise LookupError(f"there is no {node.id}")


def _member(owner: Any, name: str) -> Any:
    if not hasattr(owner, name):
        raise LookupError(f"{owner} has no {name}")
    return getattr(owner, name)


def check(span: str) -> None:
    """Raise if a piece of code names what is not there, or passes what is not taken."""
    tree = ast.parse(span, mode="eval").body
    if isinstance(tree, ast.Name) and tree.id in WORDS:
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func) != "model":
            taken = inspect.signature(resolve(node.func)).parameters
            kinds = {p.kind for p in taken.values()}
            unknown = {k.arg for k in node.keywords} - {*taken}
            assert inspect.Parameter.VAR_KEYWORD in kinds or not unknown, (span, unknown)
    if isinstance(tree, ast.Name | ast.Attribute):
        resolve(tree)


def is_code(span: str) -> bool:
    """Whether it is an expression, and no string, number, option or part of a path."""
    try:
        tree = ast.parse(span, mode="eval").body
    except SyntaxError:
        return False
    return isinstance(tree, ast.Name | ast.Attribute | ast.Call)


def test_names_that_the_tables_mention_exist():
    named = [span for row in rows(FROM_LIGHTNING) for span in spans(" ".join(row[1:2]))]
    code = [span for span in named if is_code(span)]
    assert len(code) > 120
    for span in code:
        check(span)


@pytest.mark.parametrize(
    "span", ["Trainer(max_epoch=3)", "run.globalstep", "on_train_begin(run)", "EMAs", "optax.adamm"]
)
def test_names_that_do_not_exist_are_found(span: str):
    with pytest.raises((LookupError, AssertionError)):
        check(span)


def test_every_hook_is_in_the_document_with_its_parameters():
    text = {*spans(FROM_LIGHTNING)}
    methods = [n for n, x in vars(Callback).items() if inspect.isfunction(x) and n[0] != "_"]
    assert {*HOOKS} <= {*methods}
    for name in methods:
        parameters = list(inspect.signature(getattr(Callback, name)).parameters)[1:]
        assert f"{name}({', '.join(parameters)})" in text, name


def test_every_public_callback_and_name_is_in_the_document():
    for name in (*callbacks.__all__, *loggers.__all__, *jaxtrainer.__all__):
        assert re.search(rf"\b{name}\b", FROM_LIGHTNING), name


LIGHTNING_OPTIONS = """
accelerator strategy devices num_nodes precision logger callbacks fast_dev_run max_epochs min_epochs
max_steps min_steps max_time limit_train_batches limit_val_batches limit_test_batches
limit_predict_batches overfit_batches val_check_interval check_val_every_n_epoch
num_sanity_val_steps log_every_n_steps enable_checkpointing enable_progress_bar
enable_model_summary accumulate_grad_batches gradient_clip_val gradient_clip_algorithm
deterministic benchmark inference_mode use_distributed_sampler profiler detect_anomaly barebones
plugins sync_batchnorm reload_dataloaders_every_n_epochs default_root_dir enable_autolog_hparams
model_registry suggest_integrations
"""

LIGHTNING_MODULE = """
forward training_step validation_step test_step predict_step configure_optimizers
configure_callbacks configure_model prepare_data setup teardown train_dataloader val_dataloader
test_dataloader predict_dataloader on_before_batch_transfer transfer_batch_to_device
on_after_batch_transfer backward on_before_zero_grad on_before_backward on_after_backward
on_before_optimizer_step optimizer_step optimizer_zero_grad configure_gradient_clipping
clip_gradients lr_scheduler_step on_fit_start on_fit_end on_train_start on_train_end
on_train_epoch_start on_train_epoch_end on_train_batch_start on_train_batch_end
on_validation_start on_validation_end on_validation_epoch_start on_validation_epoch_end
on_validation_batch_start on_validation_batch_end on_test_start on_test_end on_test_epoch_start
on_test_epoch_end on_test_batch_start on_test_batch_end on_predict_start on_predict_end
on_predict_epoch_start on_predict_epoch_end on_predict_batch_start on_predict_batch_end
on_validation_model_eval on_validation_model_train on_validation_model_zero_grad
on_test_model_eval on_test_model_train on_predict_model_eval on_predict_model_train
on_sanity_check_start on_sanity_check_end on_exception state_dict load_state_dict state_key
on_save_checkpoint on_load_checkpoint log log_dict print all_gather manual_backward optimizers
lr_schedulers toggle_optimizer untoggle_optimizer toggled_optimizer freeze unfreeze
save_hyperparameters load_from_checkpoint to_onnx to_torchscript to_tensorrt trainer fabric
current_epoch global_step global_rank local_rank logger loggers device dtype device_mesh hparams
hparams_initial example_input_array automatic_optimization strict_loading on_gpu from_datasets
"""


def missing_words(words: str) -> list[str]:
    return [name for name in words.split() if not re.search(rf"\b{name}\b", FROM_LIGHTNING)]


def test_every_word_of_lightning_is_in_the_document():
    assert not missing_words(LIGHTNING_OPTIONS)
    assert not missing_words(LIGHTNING_MODULE)
    assert missing_words("max_epochs max_epoches") == ["max_epoches"]


def test_every_option_of_lightning_is_there_or_says_what_takes_its_place():
    make: Any = Trainer
    absent = {*LIGHTNING_OPTIONS.split()} - {*inspect.signature(Trainer).parameters}
    assert absent == {*OF_THE_TRAINER}
    for name in absent:
        with pytest.raises(OptionError, match=re.escape(OF_THE_TRAINER[name])):
            make(**{name: None})


def test_no_word_is_both_there_and_refused():
    there = {*HOOKS, *dir(TrainModule), *dir(Callback), *dir(DataModule)}
    assert not there & ({*IN_THE_STEP} | {*RENAMED} | {*OF_THE_MODULE})


def test_attribute_of_a_lightning_module_says_what_takes_its_place():
    for name, instead in OF_THE_MODULE.items():
        with pytest.raises(AttributeError, match=re.escape(instead)):
            getattr(TrainModule(), name)
