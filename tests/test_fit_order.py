"""The drawing of the loop in `Trainer.fit`'s docstring is what a recorded run does."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from jaxtrainer import Callback, Run, Trainer
from jaxtrainer.callback import HOOKS
from tests import tiny

pytestmark = pytest.mark.usefixtures("compiled_once")

EPOCHS, BATCHES, VAL_BATCHES, SANITY_BATCHES = 2, 4, 3, 1

WHEN_IT_HAPPENS = {
    "on_compile_start",
    "on_compile_end",
    "on_report",
    "on_exception",
    "on_save_checkpoint",
    "on_load_checkpoint",
}


@dataclass
class Line:
    """A line of the drawing, and those indented under it."""

    text: str
    below: list[Line] = field(default_factory=list)


def read_drawing() -> list[Line]:
    docstring = inspect.getdoc(Trainer.fit) or ""
    _, _, rest = docstring.partition("hooks included::\n\n")
    drawing = rest.partition("\n\nWhere several steps")[0]
    return nest(textwrap.dedent(drawing).splitlines())


def nest(lines: list[str]) -> list[Line]:
    found: list[Line] = []
    while lines:
        text, rest = lines[0], lines[1:]
        under = rest[: _until_dedent(rest)]
        found.append(Line(text.strip(), nest([line.removeprefix("    ") for line in under])))
        lines = rest[len(under) :]
    return found


def _until_dedent(lines: list[str]) -> int:
    return next((i for i, line in enumerate(lines) if not line.startswith(" ")), len(lines))


class Play:
    """Carries the drawing out, as a list of hooks.

    Args:
        drawing: Lines of the docstring.
        is_due: Whether validation is due after batch `i` of an epoch.
    """

    def __init__(self, drawing: list[Line], is_due: Callable[[int], bool]) -> None:
        self.drawing = drawing
        self.is_due = is_due

    def hooks(self) -> list[str]:
        return list(self._play(self.drawing, batches=BATCHES, batch=0))

    def _play(self, lines: list[Line], batches: int, batch: int) -> Iterator[str]:
        for line in lines:
            if line.text == "for each epoch:":
                for _ in range(EPOCHS):
                    yield from self._play(line.below, batches, batch)
            elif line.text == "for each batch:":
                for i in range(batches):
                    yield from self._play(line.below, batches, i)
            elif line.text == "if validation is due:":
                if self.is_due(batch):
                    yield from self._play(line.below, VAL_BATCHES, batch)
            elif line.text == "if another batch follows:":
                if batch < BATCHES - 1:
                    yield from self._play(line.below, batches, batch)
            elif " ... " in line.text:
                (validation,) = _find(self.drawing, "if validation is due:")
                first, last = line.text.split(" ... ")
                assert [validation[0].text, validation[-1].text] == [first, last]
                yield from self._play(validation, SANITY_BATCHES, batch)
            else:
                yield from [line.text] if line.text in HOOKS else []
                yield from self._play(line.below, batches, batch)


def _find(lines: list[Line], text: str) -> list[list[Line]]:
    here = [line.below for line in lines if line.text == text]
    return here + [found for line in lines for found in _find(line.below, text)]


def recorder(names: set[str]) -> Any:
    """A callback that overrides the hooks named, and keeps the order of the calls."""

    def keep(name: str) -> Callable[..., None]:
        def hook(self: Any, *arguments: Any) -> None:
            self.seen.append(name)

        hook.__signature__ = inspect.signature(getattr(Callback, name))  # type: ignore[attr-defined]
        return hook

    callback: Any = type("Recorder", (Callback,), {name: keep(name) for name in names})()
    callback.seen = []
    return callback


def record(names: set[str], **options: Any) -> list[str]:
    callback = recorder(names)
    val_loader = tiny.make_batches(VAL_BATCHES)
    defaults = {"max_epochs": EPOCHS, "num_sanity_val_steps": SANITY_BATCHES}
    tiny.fit(
        tiny.make_batches(BATCHES), val_loader, callbacks=[callback], **{**defaults, **options}
    )
    return callback.seen


def drawn_hooks() -> set[str]:
    return {name for name in HOOKS if name in inspect.getdoc(Trainer.fit).split()}  # type: ignore[union-attr]


@pytest.mark.parametrize("steps", [1, 4], ids=["single", "fused"])
def test_drawing_is_the_recorded_run(steps: int):
    played = Play(read_drawing(), is_due=lambda batch: batch == BATCHES - 1).hooks()
    assert record(drawn_hooks(), steps_per_dispatch=steps) == played
    assert len(played) > 50


def test_drawing_is_the_recorded_run_with_validation_within_epochs():
    played = Play(read_drawing(), is_due=lambda batch: batch % 2 == 1).hooks()
    assert record(drawn_hooks(), val_check_interval=2) == played


def test_drawing_without_validation_is_the_recorded_run():
    drawing = [line for line in read_drawing() if "sanity" not in line.text]
    drawing = [line for line in drawing if " ... " not in line.text]
    played = Play(drawing, is_due=lambda batch: False).hooks()
    callback = recorder(drawn_hooks())
    tiny.fit(tiny.make_batches(BATCHES), callbacks=[callback], max_epochs=EPOCHS)
    assert callback.seen == played


def test_every_hook_is_drawn_or_comes_when_it_happens():
    of_other_calls = {name for name in HOOKS if name.startswith(("on_test", "on_predict"))}
    assert drawn_hooks() | WHEN_IT_HAPPENS | of_other_calls == set(HOOKS)
    assert not drawn_hooks() & (WHEN_IT_HAPPENS | of_other_calls)


def test_fused_steps_are_ended_one_by_one_after_their_dispatch():
    seen = record({"on_train_batch_end", "on_save_point", "on_train_epoch_end"}, max_epochs=1)
    assert seen == [*["on_train_batch_end"] * BATCHES, "on_train_epoch_end", "on_save_point"]


def test_callbacks_come_before_the_module_and_savers_after_it():
    order: list[str] = []

    class Named(Callback):
        def __init__(self, name: str, order: int) -> None:
            self.name, self.order = name, order

        def on_train_epoch_end(self, run: Run) -> None:
            order.append(self.name)

    class Module(tiny.Tiny):
        def on_train_epoch_end(self, run: Run) -> None:
            order.append("module")

    callbacks = [Named("saves", 2), Named("acts", 1), Named("first", 0), Named("second", 0)]
    tiny.fit(module=Module(), callbacks=callbacks, max_epochs=1)
    assert order == ["first", "second", "module", "acts", "saves"]
