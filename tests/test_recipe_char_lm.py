"""The language model: shrunk to a few steps, its cache, its windows, its score."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import char_lm
from char_lm import CharLM, Transformer, make_loaders
from jaxtrainer import Trainer
from jaxtrainer.testing import check_resume


@pytest.fixture(autouse=True)
def shrunk(in_tmp_path, monkeypatch):
    """A model of a few hundred parameters, and runs and programs kept nowhere else."""
    sizes = {"DEPTH": 2, "FEATURES": 8, "HEADS": 2, "WINDOW": 16, "BATCH": 8, "VALIDATED": 8}
    for name, size in sizes.items():
        monkeypatch.setattr(char_lm, name, size)


@pytest.fixture
def mixed_dtypes():
    """Flax's norms compute in float32 and mix it with bfloat16, which the tests else refuse."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "numbers.txt"
    path.write_text(" ".join(map(str, range(2000))))
    return str(path)


@pytest.fixture
def make_model():
    return lambda: Transformer(nnx.Rngs(0))


def random_tokens(shape):
    return jnp.asarray(np.random.default_rng(0).integers(0, 256, shape), jnp.int32)


def test_recipe_trains_resumes_and_writes(text, capsys):
    char_lm.main(["--text", text, "--steps", "1"])
    perplexity: Any = char_lm.main(["--text", text, "--steps", "2", "--resume"])
    texts: Any = char_lm.main(["--prompt", "1 2", "--seed", "5"])
    assert f"perplexity: {perplexity:.3f}, or" in capsys.readouterr().out
    assert [text[:3] for text in texts] == 3 * ["1 2"]
    assert len(set(texts)) == 3


def test_recipe_refuses_to_train_anew_where_a_run_is(in_tmp_path, capsys):
    (in_tmp_path / "runs/char_lm/step_1").mkdir(parents=True)
    with pytest.raises(SystemExit, match="2"):
        char_lm.main([])
    assert "runs/char_lm has a run; add --resume to go on from it" in capsys.readouterr().err


@pytest.mark.slow
def test_recipe_trains_in_bfloat16_with_remat_and_shows_speed(text, mixed_dtypes, capsys):
    options = ["--precision", "bf16-mixed", "--remat"]
    perplexity: Any = char_lm.main(["--text", text, "--steps", "2", *options])
    assert 0 < perplexity < 300
    assert "tokens_per_s=" in capsys.readouterr().out


@pytest.mark.slow
def test_recipe_divides_its_parameters_over_the_devices(text, monkeypatch):
    monkeypatch.setattr(char_lm, "FEATURES", 32)
    monkeypatch.setattr(char_lm, "DEPTH", 1)
    seen = []
    look = lambda self, run: seen.append(run.state.params)  # noqa: E731
    monkeypatch.setattr(CharLM, "on_train_end", look, raising=False)
    perplexity: Any = char_lm.main(["--text", text, "--steps", "1", "--fsdp"])
    assert 0 < perplexity < 300
    assert seen[0]["blocks"]["0"]["up"]["kernel"].sharding.spec == jax.P(None, "data")


@pytest.mark.slow
def test_a_model_in_bfloat16_computes_in_it(make_model, mixed_dtypes):
    graphdef, state = nnx.split(make_model())
    model = nnx.merge(graphdef, jax.tree.map(lambda a: a.astype(jnp.bfloat16), state))
    x_BTE, _ = model.blocks[0](model.embed[random_tokens((1, 16))], None, 0)
    assert x_BTE.dtype == jnp.bfloat16


@pytest.mark.slow
def test_cached_logits_are_those_of_the_whole_text(make_model):
    model, token_BT = make_model(), random_tokens((3, 16))
    whole_BTV, _ = model(token_BT)
    caches = 2 * [jnp.zeros((3, 16, 2, 2, 4))]
    first_BTV, caches = model(token_BT[:, :5], caches)
    parts = [first_BTV]
    for time in range(5, 16):
        logits_BTV, caches = model(token_BT[:, time : time + 1], caches, time)
        parts.append(logits_BTV)
    # Sums over the keys in another order, in float32.
    np.testing.assert_allclose(jnp.concatenate(parts, axis=1), whole_BTV, atol=1e-5)


@pytest.mark.slow
def test_a_byte_changes_no_logits_before_it(make_model):
    model, token_BT = make_model(), random_tokens((1, 16))
    before_BTV, _ = model(token_BT)
    after_BTV, _ = model(token_BT.at[0, 9].add(1))
    np.testing.assert_array_equal(before_BTV[0, :9], after_BTV[0, :9])
    assert (before_BTV[0, 9] != after_BTV[0, 9]).any()


def test_a_text_too_short_for_a_window_of_each_kind_is_refused(tmp_path):
    for size in (340, 339):
        (tmp_path / str(size)).write_bytes(bytes(size))
    train_loader, val_loader = make_loaders(tmp_path / "340", seed=0)
    batch: Any = train_loader[0]
    assert batch["text"].shape == (8, 17)
    assert len(val_loader) == 1
    with pytest.raises(SystemExit, match="339 has 339 bytes, expected at least 340"):
        make_loaders(tmp_path / "339", seed=0)


def test_windows_are_of_the_text_and_new_in_each_epoch(text):
    loader, _ = make_loaders(text, seed=0)
    whole = Path(text).read_bytes()
    epochs: Any = loader.repeat(2)
    first, again = (epochs[i]["text"] for i in (0, len(loader)))
    assert all(row.tobytes() in whole for row in first)
    assert (first != again).any()


def test_validation_windows_overlap_in_one_byte_only(text):
    _, val_loader = make_loaders(text, seed=0)
    rows = val_loader[0]["text"]
    assert rows.shape == (8, 17)
    np.testing.assert_array_equal(rows[:-1, -1], rows[1:, 0])


@pytest.mark.slow
def test_a_resumed_run_reads_the_very_next_window(text):
    check_resume(
        lambda: Trainer(max_steps=6, accumulate_grad_batches=2, enable_progress_bar=False),
        CharLM,
        lambda: make_loaders(text, seed=0)[0],
    )


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_recipe_reaches_its_score(tmp_path, monkeypatch):
    monkeypatch.undo()  # to the sizes of the recipe
    monkeypatch.chdir(tmp_path)
    perplexity: Any = char_lm.main([])
    assert perplexity <= 4.8
