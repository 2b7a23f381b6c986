"""The configuration of a run as data: plain, short, without secrets."""

from __future__ import annotations

import json
from datetime import timedelta
from pathlib import Path

import numpy as np
import optax

from jaxtrainer import Callback, TrainModule
from jaxtrainer.callbacks import Checkpoint, EarlyStopping
from jaxtrainer.settings import flat, plain, settings_of
from tests import tiny


class Trap:
    """Raises whatever is asked of it."""

    def __getattr__(self, name: str):
        raise RuntimeError(name)


def test_settings_have_options_hyperparameters_and_callbacks():
    class Mine(TrainModule):
        def __init__(self) -> None:
            self.width = 8
            self._private = 1

    callbacks = [EarlyStopping("val/loss", patience=5), Callback()]
    found = settings_of(tiny.make_trainer(max_epochs=3).options, Mine(), callbacks)
    assert found["module"]["width"] == 8
    assert "_private" not in found["module"]
    assert found["trainer"]["limits"]["max_epochs"] == 3
    assert found["callbacks"]["EarlyStopping"]["patience"] == 5


def test_settings_are_json_whatever_the_attributes_are(tmp_path: Path):
    class Mine(TrainModule):
        def __init__(self) -> None:
            self.tx = optax.adam(1e-3)
            self.weights = np.ones((3, 2), np.float32)
            self.path = tmp_path
            self.span = timedelta(hours=1)
            self.trap = Trap()
            self.loop = {"self": self}

    found = settings_of(tiny.make_trainer().options, Mine(), [Checkpoint(tmp_path / "run")])
    module = json.loads(json.dumps(found))["module"]
    assert (module["weights"], module["span"]) == ("float32[3, 2]", "1:00:00")
    assert (module["path"], module["trap"]) == (str(tmp_path), "Trap")


def test_settings_hide_secrets():
    class Mine(TrainModule):
        def __init__(self) -> None:
            self.api_key = "abc"
            self.store = {"aws_secret": "abc", "token": None, "num_tokens": 7}

    module = settings_of(tiny.make_trainer().options, Mine(), [])["module"]
    assert "abc" not in json.dumps(module)
    assert module["store"] == {"aws_secret": "(hidden)", "token": None, "num_tokens": 7}


def test_plain_keeps_long_lists_short():
    assert len(plain([1] * 1000)) == 50


def test_flat_names_are_dotted():
    assert flat({"a": {"b": {"c": 1}}, "d": []}) == {"a.b.c": 1, "d": []}
