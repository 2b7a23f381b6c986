"""What all processes of a run decide together, so that they do it after the same step.

A signal, a clock or a value of one host is known to one process; the others must stop, save or
validate where it does, or wait for it for ever. Whoever wants something says so; each process says
how far it has come; what is wanted then happens at the furthest of these points, which all have
still before them. Nothing is asked in a steady step: a tick counts. Imports `distributed` only.
"""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import threading
from typing import Any, NamedTuple, final

import jax

from jaxtrainer import distributed
from jaxtrainer.errors import DistributedError, DistributedTimeoutError

_calls = itertools.count()
_LISTEN_S = 5.0
_ANSWER_S = 120.0
"""How long a process may take to say how far it is; a thread of its own does so."""

_END = "end"
"""What ends the listening: of all processes, or with an index of that one."""


class Wish(NamedTuple):
    """Something that a process wants all to do.

    Attributes:
        kind: `"stop"`, or `"event"` for what `Agreement.is_agreed` asks for.
        text: Why to stop, or the name of the event.
        signal: The number of the signal that asks to stop; 0 for none.
    """

    kind: str
    text: str
    signal: int = 0


class _Decision(NamedTuple):
    at: int
    wishes: list[Wish]


@final
class Agreement:
    """Brings the wishes of single processes to all of them, at the same tick.

    All processes make the same calls of `tick` and `is_agreed` in the same order; `ask` is for
    any of them, at any time, in a signal's handler too. What all of them ask for between the same
    two ticks happens at the second one, as it would in one process.
    """

    def __init__(self) -> None:
        self._base = f"jaxtrainer/agreement/{next(_calls)}"
        self._client: Any = distributed.client()
        self._wishes: list[Wish] = []
        self._events: set[str] = set()
        self._asked: set[str] = set()
        self._changed = threading.Condition()
        # Guarded by it, because a thread of its own says how far this process is.
        self._ticks = 0
        self._rounds = 0
        self._decisions: collections.deque[_Decision] = collections.deque()
        self._error: Exception | None = None
        self._is_closed = False
        self._thread = threading.Thread(target=self._listen, name="jaxtrainer-agree", daemon=True)
        self._thread.start()

    def ask(self, kind: str, text: str, signal: int = 0) -> None:
        """Want something; it is told to the others at the next tick."""
        wish = Wish(kind, text, signal)
        if wish not in self._wishes:
            self._wishes.append(wish)

    def tick(self) -> list[Wish]:
        """Return what all processes are to do here, mostly nothing."""
        agreed: list[Wish] = []
        while True:
            if self._wishes:
                self._tell()
            with self._changed:
                if not self._decisions or self._decisions[0].at > self._ticks:
                    self._ticks += 1
                    break
                agreed += self._decisions.popleft().wishes
        self._events.update(wish.text for wish in agreed if wish.kind == "event")
        return [wish for wish in agreed if wish.kind == "stop"]

    def is_agreed(self, name: str, wanted: bool) -> bool:
        """Return whether something is to happen here, that process 0 wanted to happen a while ago.

        Args:
            name: Of the event; it happens once for each time that it is wanted.
            wanted: Of process 0, whose clock is the one that counts.
        """
        if name in self._events:
            self._events.discard(name)
            self._asked.discard(name)
            return True
        if wanted and distributed.is_first() and name not in self._asked:
            self._asked.add(name)
            self.ask("event", name)
        return False

    def close(self, *, is_clean: bool = True) -> None:
        """Listen no longer; after a clean end the processes wait for each other."""
        if is_clean:
            # Somebody may still want to know how far this process is.
            distributed.barrier(f"{self._base}/end")
        self._is_closed = True
        if not is_clean or distributed.is_first():
            # A thread that is left waiting in the runtime's code aborts the process at its exit.
            who = "" if is_clean else str(distributed.index())
            with contextlib.suppress(DistributedError), self._failing():
                self._client.key_value_set(self._key("ask"), _END + who)
        self._thread.join(2 * _LISTEN_S)

    def _tell(self) -> None:
        """Tell the others what is wanted, and wait until it is decided where it happens."""
        while self._wishes:
            number, text = self._rounds, json.dumps(self._wishes)
            with self._failing():
                self._client.key_value_set(self._key("ask", number), text)
            with self._changed:
                known = self._changed.wait_for(
                    lambda number=number: self._rounds > number or self._error, _ANSWER_S
                )
                if self._error is not None:
                    raise self._error
                if not known:
                    raise DistributedTimeoutError(
                        f"the processes did not agree on {text} within {_ANSWER_S:g} s"
                    )
                decided = [wish for d in self._decisions for wish in d.wishes]
            # Another process may have been first: what it did not want is asked for again.
            for wish in decided:
                # In place: a signal's handler may be adding one.
                if wish in self._wishes:
                    self._wishes.remove(wish)

    def _listen(self) -> None:
        try:
            while not self._is_closed:
                text = self._next_wishes()
                if text == _END:
                    return
                if text is None:
                    continue
                if text.startswith(_END):
                    self._pass_over()
                else:
                    self._decide([Wish(*wish) for wish in json.loads(text)])
        except Exception as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _next_wishes(self) -> str | None:
        try:
            key, wait_ms = self._key("ask"), int(_LISTEN_S * 1000)
            return self._client.blocking_key_value_get(key, wait_ms)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" in str(error):
                return None
            raise DistributedError(f"the coordinator does not answer: {error}") from error

    def _decide(self, wishes: list[Wish]) -> None:
        # The loop is held at its next tick meanwhile: this process comes no further than it says.
        with self._changed:
            here = self._key("ticks")
            self._client.key_value_set(f"{here}/{distributed.index()}", str(self._ticks))
            distributed.wait_at(here, _ANSWER_S)
            at = max(int(ticks) for _, ticks in self._client.key_value_dir_get(here))
            self._decisions.append(_Decision(at, wishes))
            self._rounds += 1
            self._changed.notify_all()
        if distributed.is_first() and self._rounds > 1:
            # All have read what was said in the round before: they were at this one's barrier.
            for name in ("ask", "ticks"):
                self._client.key_value_delete(self._key(name, self._rounds - 2))

    def _pass_over(self) -> None:
        with self._changed:
            self._rounds += 1
            self._changed.notify_all()

    def _key(self, name: str, number: int | None = None) -> str:
        return f"{self._base}/{self._rounds if number is None else number}/{name}"

    @contextlib.contextmanager
    def _failing(self) -> Any:
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            # The first to ask opens the round; the others ask again in the next one.
            if "ALREADY_EXISTS" not in str(error):
                raise DistributedError(f"the coordinator does not answer: {error}") from error
