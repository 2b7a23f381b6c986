"""When a process counts as stuck, dead or slow, by rows and a clock of the test's own."""

from __future__ import annotations

from typing import Any

import pytest

from jaxtrainer.stragglers import Stragglers
from jaxtrainer.watchdog import Progress, Watchdog
from jaxtrainer.whereabouts import Place

HOOK = Place("hook", "Upload.on_save_point")


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def dog(clock: Clock, *, count: int = 2, **options: Any) -> Watchdog:
    return Watchdog(0, count, **{"timeout_s": 30.0, "silence_s": 10.0, **options}, clock=clock)


def row(**values: Any) -> Progress:
    defaults = {"beat": 1, "stage": "train", "step": 40, "batches": 40, "phase": "device"}
    return Progress(**{**defaults, "is_armed": True, **values})


def look(watchdog: Watchdog, clock: Clock, place: Place, for_s: float, batches: int = 5) -> Any:
    """Be in one place for so long, after the first step; returns what is wrong with that."""
    watchdog.look(Place("compile"), (0, "fit"))
    watchdog.look(place, (batches, "train"))
    clock.now += for_s
    return watchdog.own_verdict(place, watchdog.look(place, (batches, "train")), 40)


def test_process_that_is_stuck_in_a_hook_accuses_itself():
    clock = Clock()
    watchdog = dog(clock)
    reason = look(watchdog, clock, HOOK, 31.0)
    where = "phase hook (Upload.on_save_point) of step 40"
    assert reason == f"process 0 of 2 has been in {where} for 31 s"


@pytest.mark.parametrize(("place", "for_s"), [(HOOK, 29.0), (Place("compile"), 9e9)])
def test_process_may_take_its_time(place: Place, for_s: float):
    clock = Clock()
    assert look(dog(clock), clock, place, for_s) is None


def test_process_is_not_judged_before_its_first_step():
    clock = Clock()
    assert look(dog(clock), clock, HOOK, 9e9, batches=0) is None


def test_progress_begins_the_time_anew():
    clock = Clock()
    watchdog = dog(clock)
    assert look(watchdog, clock, HOOK, 29.0) is None
    assert look(watchdog, clock, HOOK, 29.0, batches=6) is None


def test_process_without_a_new_row_is_silent():
    clock = Clock()
    watchdog = dog(clock)
    for beat in (1, 2, 2):
        clock.now += 9.0
        watchdog.take({1: row(beat=beat)})
    assert watchdog.verdict() is None
    clock.now += 1.0
    last = "last in phase device of step 40"
    assert watchdog.verdict() == f"process 1 of 2 gives no sign of life for 10 s, {last}"


@pytest.mark.parametrize("values", [{"phase": "ended"}, {"is_armed": False}])
def test_silence_is_right_after_the_call_and_before_the_first_step(values: Any):
    clock = Clock()
    watchdog = dog(clock)
    watchdog.take({1: row(**values)})
    clock.now += 1e6
    assert watchdog.verdict() is None


def test_all_processes_waiting_for_their_devices_hang():
    watchdog = dog(Clock())
    watchdog.take({0: row(since_s=31.0), 1: row(since_s=30.0)})
    reason = watchdog.verdict()
    assert reason is not None
    assert reason.startswith("all 2 processes have waited for their devices in step 40 for 30 s")


def test_waiting_for_a_process_with_something_to_do_is_no_hang():
    watchdog = dog(Clock())
    watchdog.take({0: row(since_s=9e9), 1: row(phase="data", since_s=9e9)})
    assert watchdog.verdict() is None


def test_process_that_has_ended_while_others_wait_is_named():
    watchdog = dog(Clock())
    watchdog.take({0: row(since_s=31.0), 1: row(phase="ended")})
    assert (watchdog.verdict() or "").startswith("process 1 of 2 has ended its call")


def test_no_limit_is_no_verdict():
    clock = Clock()
    watchdog = dog(clock, timeout_s=None, silence_s=None)
    watchdog.take({0: row(since_s=9e9), 1: row(since_s=9e9)})
    assert look(watchdog, clock, HOOK, 9e9) is None
    assert watchdog.verdict() is None


def test_row_survives_the_way_through_the_store():
    sent = row(detail="A.setup", since_s=1.5, data_s=0.25)
    assert Progress.from_text(sent.to_text()) == sent


def interval(number: int, own_s: dict[int, float], data_s: float = 0.0) -> dict[int, Progress]:
    """Rows after some intervals of 10 batches of a second each."""
    return {
        process: row(
            batches=10 * number,
            elapsed_s=10.0 * number,
            waited_s=10.0 * number * (1 - own),
            data_s=10.0 * number * data_s,
        )
        for process, own in own_s.items()
    }


def test_slow_process_is_told_once_after_two_intervals():
    stragglers = Stragglers(10, lambda process: f"process {process} of 3")
    own_s = {0: 0.1, 1: 0.9, 2: 0.12}
    heard = [stragglers.compare(interval(n, own_s, data_s=0.5))[1] for n in range(5)]
    says = (
        "process 1 of 3 holds the others up: a batch takes it 900 ms of its own, 500 ms of these "
        "waiting for its loader, and the others 110 ms"
    )
    assert heard == [[], [], [says], [], []]


def test_processes_alike_are_not_told_and_their_times_are_given():
    stragglers = Stragglers(10, str)
    heard = [stragglers.compare(interval(n, {0: 0.4, 1: 0.5})) for n in range(4)]
    assert not any(news for _, news in heard)
    first, second = heard[-1][0]
    assert (first.own_s, second.own_s, second.batch_s) == pytest.approx((0.4, 0.5, 1.0))


def test_times_come_once_in_an_interval():
    stragglers = Stragglers(25, str)
    heard = [bool(stragglers.compare(interval(n, {0: 0.4, 1: 0.5}))[0]) for n in range(7)]
    assert heard == [False, False, False, True, False, False, True]
