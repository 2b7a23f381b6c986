"""Whether the processes of a run read the same batches; one that does not would train on others.

Compared are counts, shapes and a digest of the first batch, before anything compiles; of a loader
whose length nobody knows each chunk too. Through the store of `jax.distributed`: the feed's thread
may run no collective. May import levels 0 to 2.
"""

from __future__ import annotations

import itertools
import json
import socket
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from jax._src import distributed as runtime

from jaxtrainer import distributed, errors
from jaxtrainer.chunks import HostChunk
from jaxtrainer.data import IndexedSource
from jaxtrainer.distributed import TIMEOUT_S
from jaxtrainer.errors import DataError, DistributedTimeoutError
from jaxtrainer.grain_source import MapSource
from jaxtrainer.rows import digest_of
from jaxtrainer.types import PyTree

_FOREVER_S = 7 * 24 * 3600.0
_serial = itertools.count()


def check_alike(label: str, make: Callable[[], Any], limit_s: float | None) -> Any:
    """Return the feed that `make` returns, once every process has opened one of the same facts.

    Args:
        label: Of the loader, for messages.
        make: Opens it.
        limit_s: How long to wait for the others.

    Raises:
        DataError: On every process, naming what differs.
    """
    if distributed.count() == 1:
        return make()
    name, limit_s = f"loader/{label}", limit_s or _FOREVER_S
    try:
        feed = make()
    except Exception as error:
        distributed.gather({"error": f"{type(error).__name__}: {error}"}, name, limit_s)
        raise
    _check(label, distributed.gather(feed.facts, name, limit_s))
    return feed


def once_per_host(job: Callable[[], None], name: str, limit_s: float = TIMEOUT_S) -> None:
    """Run a job in the first process of each host, while the others wait for its end.

    Args:
        job: E.g. what downloads data.
        name: Of it, for messages.
        limit_s: How long to wait.

    Raises:
        JaxTrainerError: In the processes that have waited the same one, or DistributedError where
            it is none of this package, saying where it failed.
    """
    hosts = distributed.gather(socket.gethostname(), f"{name}/host")
    _run_in(hosts.index(hosts[distributed.index()]) == distributed.index(), job, name, limit_s)


def in_first(job: Callable[[], None], name: str, limit_s: float = TIMEOUT_S) -> None:
    """Run a job in process 0, while the others wait for its end; as `once_per_host`."""
    _run_in(distributed.is_first(), job, name, limit_s)


def _run_in(is_chosen: bool, job: Callable[[], None], name: str, limit_s: float) -> None:
    error: Exception | None = None
    if is_chosen:
        try:
            job()
        except Exception as caught:
            error = caught
    told = None if error is None else [type(error).__name__, str(error)]
    failures = distributed.gather(told, name, limit_s)
    if error is not None:
        raise error
    for process, failure in enumerate(failures):
        if failure is not None:
            kind, text = failure
            raise _as_told(kind, text, f"{name} failed in process {process}")


def _as_told(kind: str, text: str, where: str) -> Exception:
    """Return the error of another process: one of this package is raised as that on all."""
    own = getattr(errors, kind, None)
    if isinstance(own, type) and issubclass(own, errors.JaxTrainerError):
        return own(text)
    return errors.DistributedError(f"{where}: {kind}: {text}")


def facts_of(
    first: PyTree, kind: str, rows: int, num_batches: int | None, *, is_own: bool
) -> dict[str, Any]:
    """Return what the processes compare of a loader, as JSON."""
    return {
        "type": kind,
        "rows of a batch": rows,
        "batches an epoch": num_batches,
        "each process reads its own part": is_own,
        "first batch": digest_of(first),
    }


def needs_agreement(source: Any) -> bool:
    """Return whether a chunk may be of another length in another process: nothing says it before.

    Arrays, lists and Grain's `MapDataset` have the length that they say.
    """
    is_known = isinstance(source, IndexedSource | MapSource)
    return distributed.count() > 1 and not (is_known or isinstance(source.loader, list | tuple))


def _check(label: str, found: Sequence[dict[str, Any]]) -> None:
    for process, facts in enumerate(found):
        if "error" in facts:
            raise DataError(
                f"process {process} could not read the {label} loader: {facts['error']}"
            )
    digests = [facts.pop("first batch") for facts in found]
    for process, facts in enumerate(found):
        for name in facts:
            if facts[name] != found[0][name]:
                raise DataError(
                    f"the {label} loader is not the same in all processes: {name}: "
                    f"{found[0][name]} in process 0, {facts[name]} in process {process}. {_HOW}"
                )
    _check_digests(label, digests, is_own=found[0]["each process reads its own part"])


def _check_digests(label: str, digests: Sequence[str], *, is_own: bool) -> None:
    for process, digest in enumerate(digests):
        first = digests.index(digest)
        if is_own and first != process:
            raise DataError(
                f"the {label} loader is marked `data.process_local`, and processes {first} and "
                f"{process} read the same rows. Divide what each reads, e.g. "
                "`dataset[jax.process_index()::jax.process_count()]` before `.batch`; or pass the "
                "whole loader without the mark."
            )
        if not is_own and first:
            raise DataError(
                f"the {label} loader gives process {first} another first batch than process 0. "
                f"{_HOW}"
            )


_HOW = (
    "Every process must read the same batches, of which the trainer takes the rows of its own "
    "devices: the same files, the same seed, no division by process. If each process reads its "
    "own part of every batch, say so: `data.process_local(loader)`."
)


class Together:
    """Lets the feeds of all processes hand out the same chunks, or all end with an error.

    Args:
        label: Of the loader, for messages.
        closed: Set when nobody wants the answer any more.
        limit_s: How long to wait for the others.
        is_own: Whether each process reads its own part of the batches.
    """

    def __init__(
        self, label: str, closed: threading.Event, limit_s: float | None, is_own: bool
    ) -> None:
        # Feeds are started in one order by the main threads of all processes.
        self._name = f"jaxtrainer/feed/{next(_serial)}"
        self._label, self._closed, self._is_own = label, closed, is_own
        self._limit_s = limit_s or _FOREVER_S
        self._said = 0

    def check(self, epoch: int, chunk: HostChunk) -> None:
        """Wait until all processes have such a chunk; raise DataError if one has another."""
        mine = {
            "batches": chunk.size,
            "rows of a batch": chunk.rows,
            "end of the epoch": chunk.is_last,
        }
        found = self._exchange({**mine, "digest": chunk.digest})
        for process, theirs in enumerate(found):
            if "error" in theirs:
                raise DataError(f"process {process} failed in epoch {epoch}: {theirs['error']}")
            for name in mine:
                if theirs[name] != found[0][name]:
                    raise DataError(
                        f"the {self._label} loader of process {process} went another way than "
                        f"that of process 0 in epoch {epoch}: {name} of the next chunk: "
                        f"{theirs[name]}, there {found[0][name]}. Give all processes as many "
                        f"batches, of the same sizes. {_HOW}"
                    )
        if not self._is_own and len({x["digest"] for x in found}) > 1:
            raise DataError(
                f"the {self._label} loader does not give all processes the same batches in epoch "
                f"{epoch}. {_HOW}"
            )

    def fail(self, error: BaseException) -> None:
        """Tell the others that there is no next chunk."""
        self._say({"error": f"{type(error).__name__}: {error}"})

    def _say(self, value: dict[str, Any]) -> str:
        key = f"{self._name}/{self._said}"
        self._said += 1
        _client().key_value_set(f"{key}/{distributed.index()}", json.dumps(value))
        return key

    def _exchange(self, value: dict[str, Any]) -> list[dict[str, Any]]:
        key, pause_s = self._say(value), 1e-3
        ends = time.monotonic() + self._limit_s
        while len(found := _client().key_value_dir_get(key)) < distributed.count():
            if self._closed.wait(pause_s):
                return []
            if time.monotonic() > ends:
                raise self._late({int(k.rpartition("/")[2]) for k, _ in found})
            pause_s = min(pause_s * 2, 0.05)
        # Who has said this has read what was said before.
        if self._said > 1:
            _client().key_value_delete(f"{self._name}/{self._said - 2}/{distributed.index()}")
        by_process = {int(k.rpartition("/")[2]): json.loads(v) for k, v in found}
        return [by_process[i] for i in range(distributed.count())]

    def _late(self, here: set[int]) -> DistributedTimeoutError:
        missing = ", ".join(str(i) for i in range(distributed.count()) if i not in here)
        return DistributedTimeoutError(
            f"in the data phase: process {missing} has read no next chunk of the {self._label} "
            f"loader within {self._limit_s:g} s of this one. Its loader is stuck, or slower than "
            "that: `Trainer(data_timeout=...)`."
        )


def _client() -> Any:
    return runtime.global_state.client
