"""The configuration of a run as data: plain, short, without secrets."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrainer import Callback, Run, TrainModule
from jaxtrainer.callbacks import Checkpoint, EarlyStopping
from jaxtrainer.settings import HIDDEN, flat, hide, of_module, plain, settings_of
from tests import tiny


class Trap:
    """Raises whatever is asked of it."""

    def __getattr__(self, name: str):
        raise RuntimeError(name)


class Module(TrainModule):
    def __init__(self, width: int = 3, act: Any = None, token: str = "", **rest: Any) -> None:
        self.width, self.act, self.token = width, act, token
        self.made = "here"
        self.table = {"not": "an argument"}
        self._private = 1
        self.rest = rest


def test_hyperparameters_are_arguments_and_plain_attributes():
    module = Module(4, act=jnp.tanh, token="abc", lr=1e-3)
    module.run = Run()
    want = {"width": 4, "act": "tanh", "token": HIDDEN, "made": "here", "rest": {"lr": 1e-3}}
    assert of_module(module) == want


def test_hyperparameters_of_a_dataclass_are_its_fields():
    @dataclass
    class Fields(TrainModule):
        sizes: tuple[int, ...] = (1, 2)
        path: Path = Path("x")

    assert of_module(Fields()) == {"sizes": [1, 2], "path": "x"}


def test_settings_have_options_hyperparameters_and_callbacks():
    callbacks = [EarlyStopping("val/loss", patience=5), Callback()]
    found = settings_of(tiny.make_trainer(max_epochs=3).options, Module(8), callbacks)
    assert found["module"]["width"] == 8
    assert "_private" not in found["module"]
    assert found["trainer"]["limits"]["max_epochs"] == 3
    assert found["callbacks"]["EarlyStopping"]["patience"] == 5


def test_settings_are_json_whatever_the_attributes_are(tmp_path: Path):
    given = {
        "tx": optax.adam(1e-3),
        "weights": np.ones((3, 2), np.float32),
        "path": tmp_path,
        "span": timedelta(hours=1),
        "trap": Trap(),
        "nan": float("nan"),
    }
    given["loop"] = {"self": given}
    found = settings_of(
        tiny.make_trainer().options, Module(**given), [Checkpoint(tmp_path / "run")]
    )
    module = json.loads(json.dumps(found, allow_nan=False))["module"]["rest"]
    assert (module["weights"], module["span"]) == ("float32[3, 2]", "1:00:00")
    assert (module["path"], module["trap"]) == (str(tmp_path), "Trap")
    assert (module["tx"], module["nan"]) == ("GradientTransformationExtraArgs", "nan")


SECRETS: Any = {
    **{name: "x" for name in ("api_key", "HF_TOKEN", "db_password", "secret", "AccessKey", "auth")},
    "aws_secret": "abc",
    "hub": "hf_abcdefghijklmnopqrstuv",
    "url": "postgres://me:pw@host/db",
    "key": "-----BEGIN RSA PRIVATE KEY-----",
    "aws": "AKIAABCDEFGHIJKLMNOP",
}


@pytest.mark.parametrize("name", SECRETS)
def test_secret_is_hidden_wherever_it_is(name: str):
    assert plain({"a": [{name: SECRETS[name]}]}) == {"a": [{name: HIDDEN}]}
    assert hide({"a": [{name: SECRETS[name]}]}) == {"a": [{name: HIDDEN}]}


def test_what_is_no_secret_is_shown():
    values = {"tokens": "no", "max_tokens": 3, "tokenizer": "bpe", "key": "a", "author": "me"}
    values |= {"token": None, "num_tokens": 7}
    assert plain(values) == values
    assert plain({"url": "http://host/path"}) == {"url": "http://host/path"}


def test_plain_keeps_long_lists_short_and_hide_keeps_them_whole():
    assert len(plain([1] * 1000)) == 50
    assert len(hide([1] * 1000)) == 1000


def test_flat_names_have_the_separator():
    assert flat({"a": {"b": {"c": 1}}, "d": []}) == {"a.b.c": 1, "d": []}
    assert flat({"a": {"b": None}}, "/") == {"a/b": None}
