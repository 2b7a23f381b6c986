"""Callbacks that are not critical: the run goes on without them, and says why."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from jaxtrainer import Callback, Run
from tests import tiny


class Fragile(Callback):
    """Fails in one hook, each time; counts the calls of its hooks."""

    def __init__(self, hook: str, error: type[BaseException] = ZeroDivisionError) -> None:
        self.hook, self.error = hook, error
        self.calls: list[str] = []
        for name in ("setup", "on_train_epoch_start", "on_train_epoch_end", "teardown"):
            setattr(self, name, lambda run, name=name: self.called(name))

    critical = False

    def called(self, name: str) -> None:
        self.calls.append(name)
        if name == self.hook:
            raise self.error("on purpose")

    def state_dict(self) -> dict[str, Any]:
        self.called("state_dict")
        return {}


def fit(callback: Callback) -> Any:
    return tiny.fit(tiny.make_batches(2), callbacks=[callback], max_epochs=3)


def test_callback_that_is_not_critical_is_left_out_after_it_fails():
    callback = Fragile("on_train_epoch_end")
    with pytest.warns(RuntimeWarning, match=r"Fragile.on_train_epoch_end failed .*left out"):
        result, _ = fit(callback)
    assert result.stop_reason == "max_epochs"
    calls = [name for name in callback.calls if name != "state_dict"]
    assert calls == ["setup", "on_train_epoch_start", "on_train_epoch_end", "teardown"]


def test_warning_comes_once_and_has_the_traceback():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(Fragile("on_train_epoch_start"))
    texts = [str(w.message) for w in caught if "not critical" in str(w.message)]
    assert len(texts) == 1
    assert "ZeroDivisionError: on purpose" in texts[0]
    assert "in called" in texts[0]


@pytest.mark.parametrize("hook", ["setup", "teardown"])
def test_callback_that_is_not_critical_may_fail_at_the_ends(hook: str):
    with pytest.warns(RuntimeWarning, match=f"Fragile.{hook} failed"):
        result, _ = fit(Fragile(hook))
    assert result.num_steps == 6


def test_signal_in_a_callback_that_is_not_critical_ends_the_run():
    with pytest.raises(KeyboardInterrupt):
        fit(Fragile("on_train_epoch_end", KeyboardInterrupt))


@pytest.mark.slow
def test_next_fit_tries_the_callback_again():
    callback = Fragile("on_train_epoch_end")
    for _ in range(2):
        with pytest.warns(RuntimeWarning, match="left out"):
            fit(callback)
    assert callback.calls.count("on_train_epoch_end") == 2


def test_callbacks_are_critical_unless_they_say_otherwise():
    class Critical(Callback):
        def on_train_epoch_end(self, run: Run) -> None:
            raise ZeroDivisionError("on purpose")

    with pytest.raises(ZeroDivisionError, match="on purpose"):
        fit(Critical())
