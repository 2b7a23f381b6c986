"""`Peers`: the other processes during a call: what they learn of this one, and when it leaves them.

One thread talks to JAX's coordination service: it publishes this process's row, reads the others'
and waits for the reason to leave. A second one asks nobody, so that nothing keeps it from looking
at the clock. The loop does not know of them. Judging is `watchdog.py`'s. May import level 2.
"""

from __future__ import annotations

import itertools
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from jax._src import distributed as _runtime

from jaxtrainer import distributed
from jaxtrainer.aborts import DelayedAbort
from jaxtrainer.blame import failure, is_refused, line_of, may_follow
from jaxtrainer.ending import ENDING, EXIT_RESTART, LINGER_S
from jaxtrainer.run import Run
from jaxtrainer.stragglers import Stragglers
from jaxtrainer.table import CoordinatedTable, Table, bounded
from jaxtrainer.watch import leave_process, tell
from jaxtrainer.watchdog import Progress, Watchdog
from jaxtrainer.whereabouts import Place, place_of

TICK_S = 0.5
CLEAN_UP_S = 6.0
"""How long the clean-up of a process may take that leaves, or has failed alone."""

_OWN_ERROR_S = 1.0
_SEEK_S = 5.0
_PROBE_S = 1.0
_ALL_READ = 32
"""Up to so many processes everyone reads the table; of more, process 0 alone."""

_calls = itertools.count()


class NoPeers:
    """Stands in for `Peers` where there is one process."""

    def __init__(self, teardown: Callable[[], None]) -> None:
        self.teardown = teardown

    def start(self) -> None:
        """Do nothing."""

    def fail(self, error: BaseException | None) -> None:
        """Do nothing."""

    def close(self, error: BaseException | None) -> None:
        """Do nothing."""


class Peers:
    """The other processes, from the start of a call to its end.

    If an exception leaves the call here, the others are told at once; they leave with code 75 and
    a line that names it, and here it is raised as it was. If another process fails, dies or is
    stuck, this one leaves.

    Args:
        run: The record of the call.
        teardown: Closes what the hooks have opened.
        timeout_s: How long a process may keep the others waiting.
        every: Batches between two comparisons of what a batch costs each process.
        table: Where rows and reasons are.
        index: Which process this is.
        count: How many there are.
        leave: Ends the process with an exit code.

    Attributes:
        verdict: Why this process leaves, if it does because of another one or is stuck.
    """

    def __init__(
        self,
        run: Run,
        teardown: Callable[[], None],
        *,
        timeout_s: float | None,
        every: int,
        table: Table,
        index: int,
        count: int,
        leave: Callable[[int], None] = leave_process,
    ) -> None:
        self.run, self.table = run, table
        self.verdict: str | None = None
        self._error: BaseException | None = None
        self._teardowns, self._leave_process = [teardown], leave
        self._abort = DelayedAbort()
        self._interval_s = min(10.0, max(1.0, count / 100))
        self._index, self._count = index, count
        self._timeout_s, self._every = timeout_s, every
        self._main = threading.get_ident()
        self._failing, self._stopped = threading.Event(), threading.Event()
        self._lock, self._is_leaving = threading.Lock(), False
        self._answered_s = time.monotonic()

    def start(self) -> None:
        """Begin to watch."""
        self._main = threading.get_ident()
        self._abort.start()
        heartbeat_s = distributed.heartbeat_s()
        # JAX finds a dead process by its heartbeats, which need no interpreter, and aborts then. If
        # that leaves no time to say so, this has to come before.
        is_seen = self._abort.is_on
        self._unheard_s = 1.5 * heartbeat_s if is_seen else 0.6 * heartbeat_s
        self._dog = Watchdog(
            self._index,
            self._count,
            timeout_s=self._timeout_s,
            silence_s=None if is_seen else 0.6 * heartbeat_s,
            clock=time.monotonic,
        )
        self._stragglers = Stragglers(self._every, self._dog.name)
        self._answered_s = time.monotonic()
        ENDING.watch(_tell_at_exit)
        for work, name in ((self._converse, "peers"), (self._watch, "watchdog")):
            thread = threading.Thread(target=work, name=f"jaxtrainer-{name}", daemon=True)
            thread.start()
            ENDING.threads.append(thread)

    def fail(self, error: BaseException | None) -> None:
        """Tell the others that an exception leaves the call; it comes before any clean-up."""
        if error is None or self._failing.is_set():
            return
        self._error = error
        self._failing.set()
        if self._is_leaving:
            # What fails now follows from that; the other thread ends the process meanwhile.
            time.sleep(CLEAN_UP_S)
        bounded(lambda: self.table.put(self._index, self._row("ending").to_text()))
        if may_follow(error):
            self._seek_culprit()
        if self.verdict is None:
            self._accuse(failure(self._dog.name(self._index), self.run, error))
        ENDING.has_failed()
        limit = threading.Thread(target=self._limit, args=(error,), name="limit", daemon=True)
        limit.start()

    def teardown(self) -> None:
        """Close what the hooks have opened, once, whichever thread comes first."""
        with self._lock:
            left, self._teardowns = self._teardowns, []
        for teardown in left:
            teardown()

    def close(self, error: BaseException | None) -> None:
        """Watch no longer; leave the process if it has failed because of another one."""
        if error is None:
            bounded(lambda: self.table.put(self._index, self._row("ended").to_text()))
            self._abort.stop()
        self._stopped.set()
        if error is not None and self._follows(error):
            self._end_process(self.verdict or "")

    def _converse(self) -> None:
        reads = self._index == 0 or self._count <= _ALL_READ
        while not self._stopped.is_set():
            try:
                self.table.put(self._index, self._row().to_text())
                if reads:
                    self._read_table()
                self._answered_s = time.monotonic()
                reason = self.table.reason(self._interval_s)
                self._answered_s = time.monotonic()
            except Exception:
                # An outage is the business of the other thread, which sees how long it lasts.
                self._stopped.wait(self._interval_s)
                continue
            if reason is None and self._index == 0:
                reason = self._judge()
            if reason is not None:
                return self._leave(reason)

    def _read_table(self) -> None:
        rows = self.table.rows().items()
        self._dog.take({process: Progress.from_text(text) for process, text in rows})

    def _judge(self) -> str | None:
        times, news = self._stragglers.compare(self._dog.rows)
        if times:
            self.run.processes = tuple(times)
        for text in news:
            self.run.notice(text)
        reason = self._dog.verdict()
        if reason is not None:
            self._accuse(reason)
        return reason

    def _watch(self) -> None:
        while not self._stopped.wait(TICK_S):
            place = place_of(self._main)
            since_s = self._dog.look(place, self._counters())
            reason = self._dog.own_verdict(place, since_s, self.run.global_step)
            if reason is not None:
                stack = sys._current_frames().get(self._main)
                print("".join(traceback.format_stack(stack)), file=sys.stderr, end="")
                self._accuse(reason)
            elif self._abort.is_waiting():
                if self._is_answered():
                    # An error of its own: it ends as it would, but the others are told.
                    self._accuse(f"{self._dog.name(self._index)} is aborted, by its own message")
                    bounded(self.teardown)
                    return
                reason = self._why_aborted()
            elif (silent_s := time.monotonic() - self._answered_s) > self._unheard_s:
                reason = f"{self._coordinator} has not answered for {silent_s:.0f} s"
            if reason is not None:
                return self._leave(reason)

    def _is_answered(self) -> bool:
        return bounded(lambda: self.table.put(self._index, self._row().to_text()), _PROBE_S)

    @property
    def _coordinator(self) -> str:
        return f"{self._dog.name(0)}, which coordinates the others,"

    def _counters(self) -> tuple[Any, ...]:
        run = self.run
        done = run.total_batches, run.eval_batch_idx
        return done, run.stage, run.epoch, run.loader_name

    def _row(self, phase: str | None = None) -> Progress:
        run = self.run
        place = place_of(self._main) if phase is None else Place(phase)
        seconds = run.timings.seconds
        return Progress(
            beat=self._dog.next_beat(),
            stage=run.stage,
            step=run.global_step,
            batches=run.total_batches,
            phase=place.phase,
            detail=place.detail,
            since_s=self._dog.look(place, self._counters()),
            is_armed=self._dog.is_armed,
            elapsed_s=run.timings.elapsed_s,
            data_s=seconds["data"],
            waited_s=seconds["device"] + seconds["dispatch"],
        )

    def _accuse(self, reason: str) -> None:
        bounded(lambda: self.table.accuse(reason))

    def _seek_culprit(self) -> None:
        """Wait a little for news of another process: what failed here may follow from its end."""
        ends = time.monotonic() + _SEEK_S
        while self.verdict is None and time.monotonic() < ends:
            time.sleep(0.1)
            silent = self._dog.silent(2.5 * self._interval_s)
            if silent is not None:
                self.verdict = silent
                self._accuse(silent)

    def _follows(self, error: BaseException) -> bool:
        """Return whether the error comes of the end of another process."""
        # One that all raise is the same for all, and everyone's own.
        return self.verdict is not None and may_follow(error) and line_of(error) not in self.verdict

    def _leave(self, reason: str) -> None:
        """End the process, unless the main thread comes to its own end first."""
        is_own = self._error is not None and not may_follow(self._error)
        if self._abort.is_waiting() and not is_own:
            return self._end_process(reason)
        # An exception that all processes raise is raised in each; and what is computed together
        # fails soon where one has gone.
        if self._failing.wait(_OWN_ERROR_S) or self._stopped.is_set():
            self.verdict = self.verdict or reason
        else:
            self._end_process(reason)

    def _end_process(self, reason: str) -> None:
        with self._lock:
            is_first, self._is_leaving = not self._is_leaving, True
        if not is_first:
            return
        self.verdict = reason
        tell(f"{self._dog.name(self._index)} leaves with code {EXIT_RESTART}: {reason}")
        bounded(self.teardown)
        if self._index == 0 and not self._abort.is_waiting():
            time.sleep(LINGER_S)
        self._leave_process(EXIT_RESTART)

    def _limit(self, error: BaseException) -> None:
        """Leave when the clean-up takes too long, unless all processes are at it."""
        while not self._stopped.wait(CLEAN_UP_S):
            bounded(self._read_table)
            if all(self._dog.rows[p].phase == "ending" for p in self._dog.rows):
                continue
            traceback.print_exception(error)
            tell("the clean-up waits for others that have left; the process is left as it is")
            self._leave_process(EXIT_RESTART if self._follows(error) else 1)

    def _why_aborted(self) -> str:
        silent = self._dog.silent(2.5 * self._interval_s)
        if silent is None and is_refused(_runtime.global_state.coordinator_address):
            silent = f"{self._coordinator} has died"
        return silent or "another process has died, or this one has lost the network: see above"


def peers_of(run: Run, teardown: Callable[[], None], timeout_s: float | None, every: int) -> Any:
    """Return the other processes of a call, or what stands in for them where there are none."""
    if distributed.count() == 1:
        return NoPeers(teardown)
    return Peers(
        run,
        teardown,
        timeout_s=timeout_s,
        every=every,
        table=CoordinatedTable(next(_calls)),
        index=distributed.index(),
        count=distributed.count(),
    )


def _tell_at_exit(error: BaseException) -> None:
    name = f"process {distributed.index()} of {distributed.count()}"
    table = CoordinatedTable(next(_calls))
    bounded(lambda: table.accuse(f"{name} has ended: {line_of(error)}"))
