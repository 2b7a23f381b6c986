"""The processes of a run: how they find each other, and what they tell each other beside the maths.

`initialize` starts JAX's own runtime, `jax.distributed`; the rest goes through its key-value store
and its barriers, all with a time limit. Imports `errors` and `watch`.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
from jax._src import distributed as _runtime
from jax._src import xla_bridge

from jaxtrainer.errors import ConfigError, DistributedError, DistributedTimeoutError
from jaxtrainer.watch import tell

T = TypeVar("T")

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
"""Variables that say explicitly what no cluster says; `jaxtrainer launch` sets them."""

HEARTBEAT_S, SHUTDOWN_S, START_S = 30, 30, 300
TIMEOUT_S = 300.0
"""How long the processes wait for each other at a barrier, unless it says otherwise."""

_KNOCK_S = 5.0
_CALL = '`jaxtrainer.distributed.initialize("host:port", num_processes=4, process_id=0)`'
_counts: dict[str, itertools.count[int]] = {}
_heartbeat_s = 100.0  # JAX's own, where somebody else has called `jax.distributed.initialize`


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """What the environment says of the processes that belong together.

    Attributes:
        name: What has said it: `"environment"`, `"slurm"`, `"open mpi"`, `"kubernetes"`, `"tpu"`.
        values: Arguments for `jax.distributed.initialize`; what is missing JAX finds out itself.
        method: Its `cluster_detection_method`.
    """

    name: str
    values: Mapping[str, Any]
    method: str | None


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    local_device_ids: int | Sequence[int] | None = None,
    coordinator_bind_address: str | None = None,
    initialization_timeout_s: int = START_S,
    heartbeat_timeout_s: int = HEARTBEAT_S,
    shutdown_timeout_s: int = SHUTDOWN_S,
) -> None:
    """Join the processes of a run; to be called before anything is on a device.

    Without arguments the values come from `JAX_COORDINATOR_ADDRESS`, `JAX_NUM_PROCESSES` and
    `JAX_PROCESS_ID`, which `jaxtrainer launch` sets, or from SLURM, Open MPI, Kubernetes or a TPU
    pod, as far as JAX knows them. `Trainer()` calls it so, where there are several processes. A
    second call does nothing.

    Args:
        coordinator_address: `"host:port"` of process 0, under which the others reach it.
        num_processes: How many there are; 1 without an address starts nothing.
        process_id: Which this is: 0 to `num_processes - 1`.
        local_device_ids: GPUs of this host that this process uses; None for all of them, or one
            for each process of a host where SLURM or Open MPI say which process that is.
        coordinator_bind_address: `"host:port"` on which process 0 listens; None for the port on
            all addresses. Who reaches it can end the run: use an interface of the cluster's own.
        initialization_timeout_s: How long to wait for all processes, in seconds.
        heartbeat_timeout_s: After how long without a sign of life a process counts as dead.
        shutdown_timeout_s: How long a process waits for the others at its end.

    Raises:
        ConfigError: If values are missing, do not fit, or it comes too late.
        DistributedTimeoutError: If not all processes come in time.
        DistributedError: If the coordinator cannot be started.

    Example:
        >>> from jaxtrainer import distributed
        >>> distributed.initialize(num_processes=1)  # one process needs no coordinator
    """
    given = {
        "coordinator_address": coordinator_address,
        "num_processes": num_processes,
        "process_id": process_id,
    }
    cluster = _explicit({k: v for k, v in given.items() if v is not None}) or detect()
    if cluster is None:
        if any(v is not None for v in given.values()) or num_processes == 1:
            return
        raise ConfigError(
            "distributed.initialize() found neither `jaxtrainer launch` nor SLURM, Open MPI, "
            f"Kubernetes or a TPU pod; say it: {_CALL}."
        )
    if is_initialized():
        _check_same(cluster)
        return
    if xla_bridge.backends_are_initialized():
        raise ConfigError(
            "distributed.initialize() comes too late: JAX has its devices already. Call it before "
            "the first array is made, e.g. as the first line of the program, or start that with "
            "`jaxtrainer launch`."
        )
    global _heartbeat_s
    _heartbeat_s = heartbeat_timeout_s
    # Its handler of SIGTERM is one below Python's, which the trainer's would take the place of.
    jax.config.update("jax_enable_preemption_service", False)
    if cluster.values and cluster.values["process_id"] > 0:
        _wait_for_coordinator(cluster, initialization_timeout_s)
    # JAX ends the process, by SIGABRT, when not all come in time: this is the last moment to speak.
    late = _timed_out(cluster, initialization_timeout_s)
    warning = threading.Timer(max(0.0, initialization_timeout_s - 0.5), tell, [late])
    warning.daemon = True
    warning.start()
    try:
        jax.distributed.initialize(
            **cluster.values,
            local_device_ids=local_device_ids,
            cluster_detection_method=cluster.method,
            coordinator_bind_address=coordinator_bind_address,
            initialization_timeout=initialization_timeout_s,
            heartbeat_timeout_seconds=heartbeat_timeout_s,
            shutdown_timeout_seconds=shutdown_timeout_s,
        )
    except Exception as error:
        raise DistributedError(f"{late}. JAX says: {_first_line(error)}") from error
    finally:
        warning.cancel()


def initialize_if_needed() -> None:
    """Call `initialize` where the environment says that there are several processes."""
    # The worker processes of a loader inherit the variables, and are none of these.
    if is_initialized() or multiprocessing.parent_process() is not None:
        return
    cluster = detect()
    if cluster is not None:
        if xla_bridge.backends_are_initialized():
            raise ConfigError(
                f"this is one of several processes ({cluster.name}), and JAX has its devices "
                "already, without those of the others. Call "
                "`jaxtrainer.distributed.initialize()` as the first line of the program; if the "
                f"processes have nothing to do with each other, set {COUNT}=1."
            )
        initialize()


def is_initialized() -> bool:
    """Return whether this process has joined others."""
    return _runtime.global_state.client is not None


def is_first() -> bool:
    """Return whether this is process 0, which writes files and shows what is to be seen.

    Lightning's `rank_zero_only`. What others compute together may not depend on it.
    """
    return _runtime.global_state.process_id == 0


def index() -> int:
    """Return which process this is; no device is touched."""
    return _runtime.global_state.process_id


def count() -> int:
    """Return how many processes there are; no device is touched."""
    return _runtime.global_state.num_processes if is_initialized() else 1


def heartbeat_s() -> float:
    """Return after how long without a sign of life a process counts as dead."""
    return _heartbeat_s


def detect() -> Cluster | None:
    """Return what the environment says of the processes, or None if it is one.

    Raises:
        ConfigError: If it says only half of what is needed.
    """
    explicit = _explicit(_from_environment())
    if explicit is not None or COUNT in os.environ:
        return explicit
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        old = "OMPI_MCA_orte_hnp_uri" in os.environ
        return Cluster(name="open mpi", values={}, method="ompi" if old else "mpi4py")
    if int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_STEP_NODELIST" in os.environ:
        return Cluster(name="slurm", values={}, method="slurm")
    if "JOB_COMPLETION_INDEX" in os.environ and importlib.util.find_spec("kubernetes"):
        return Cluster(name="kubernetes", values={}, method=None)
    if "," in os.environ.get("TPU_WORKER_HOSTNAMES", ""):
        return Cluster(name="tpu", values={}, method=None)
    return None


def barrier(name: str, timeout_s: float = TIMEOUT_S) -> None:
    """Wait until all processes have come here; Lightning's `trainer.strategy.barrier`.

    Args:
        name: Of the place in the program; every process has to say the same names in order.
        timeout_s: How long to wait.

    Raises:
        DistributedTimeoutError: Naming the processes that did not come.
    """
    if is_initialized():
        _wait(f"jaxtrainer/barrier/{name}", timeout_s)


def gather(value: Any, name: str, timeout_s: float = TIMEOUT_S) -> list[Any]:
    """Return a value of every process, in the order of their indices, on each of them.

    For small things such as counts and paths; arrays belong into the compiled step.

    Args:
        value: JSON data.
        name: As in `barrier`.
        timeout_s: How long to wait for the others.
    """
    if not is_initialized():
        return [value]
    key = _key(f"jaxtrainer/gather/{name}")
    client().key_value_set(f"{key}/{index()}", json.dumps(value))
    wait_at(key, timeout_s)
    found = {int(k.rpartition("/")[2]): v for k, v in client().key_value_dir_get(key)}
    return [json.loads(found[i]) for i in range(count())]


def broadcast(value: T, name: str, timeout_s: float = TIMEOUT_S) -> T:
    """Return the value of process 0 on every process; JSON data, arguments as in `gather`."""
    if not is_initialized():
        return value
    key = _key(f"jaxtrainer/broadcast/{name}")
    if is_first():
        client().key_value_set(key, json.dumps(value))
        return value
    try:
        return json.loads(client().blocking_key_value_get(key, _ms(timeout_s)))
    except jax.errors.JaxRuntimeError as error:
        raise _late(f"process 0 did not say {name!r} within {timeout_s:g} s", error) from error


def _explicit(given: Mapping[str, Any]) -> Cluster | None:
    """Return the cluster of values that were given, or None if they say that it is one process."""
    if not given:
        return None
    given = {**_from_environment(), **given}
    number = given.get("num_processes")
    if number == 1 and "coordinator_address" not in given:
        return None
    missing = {"coordinator_address", "num_processes", "process_id"} - {*given}
    if missing == {*()}:
        _check_values(**given)
        return Cluster(name="environment", values=given, method="deactivate")
    names = dict(zip(("coordinator_address", "num_processes", "process_id"), _NAMES, strict=True))
    lacking = " and ".join(f"{k} ({names[k]})" for k in names if k in missing)
    raise ConfigError(
        f"distributed.initialize got {_said(given)}, and lacks {lacking}: pass all three, {_CALL}."
    )


_NAMES = (ADDRESS, COUNT, INDEX)


def _from_environment() -> dict[str, Any]:
    found = {name: os.environ[name] for name in _NAMES if os.environ.get(name)}
    # An indexed job of Kubernetes says it under this name.
    if ADDRESS in found and INDEX not in found and "JOB_COMPLETION_INDEX" in os.environ:
        found[INDEX] = os.environ["JOB_COMPLETION_INDEX"]
    values: dict[str, Any] = {}
    if ADDRESS in found and (COUNT in found or INDEX in found):
        # The address alone is JAX's own setting, which goes with a cluster that says the rest.
        values["coordinator_address"] = found[ADDRESS]
    for option, name in (("num_processes", COUNT), ("process_id", INDEX)):
        if name in found:
            if not found[name].isdecimal():
                raise ConfigError(f"{name}={found[name]!r} is no number of processes, nor of one.")
            values[option] = int(found[name])
    return values


def _check_values(coordinator_address: Any, num_processes: Any, process_id: Any) -> None:
    host, _, port = str(coordinator_address).rpartition(":")
    if not host or not port.isdecimal():
        raise ConfigError(
            f"coordinator_address={coordinator_address!r} is no `host:port` of process 0: {_CALL}."
        )
    for name, value in (("num_processes", num_processes), ("process_id", process_id)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise ConfigError(f"{name}={value!r} is no integer: {_CALL}.")
    if not 0 <= process_id < num_processes:
        raise ConfigError(
            f"process_id={process_id} of num_processes={num_processes}: they are counted from 0 to "
            f"{num_processes - 1}."
        )


def _check_same(cluster: Cluster) -> None:
    state = _runtime.global_state
    here = {"num_processes": state.num_processes, "process_id": state.process_id}
    for name, value in here.items():
        if cluster.values.get(name, value) != value:
            raise ConfigError(
                f"distributed.initialize got {name}={cluster.values[name]}, and this process has "
                f"joined the others with {name}={value} before; it can do so once."
            )


def _wait_for_coordinator(cluster: Cluster, timeout_s: float) -> None:
    """Return once process 0 listens; JAX would end this process if it never did."""
    ends, address = time.monotonic() + timeout_s, str(cluster.values["coordinator_address"])
    host, _, port = address.rpartition(":")
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_S).close()
            return
        except OSError as error:
            if time.monotonic() > ends:
                late = _timed_out(cluster, timeout_s)
                raise DistributedTimeoutError(f"{late}. {address}: {error}") from error
        time.sleep(0.1)


def _timed_out(cluster: Cluster, timeout_s: float) -> str:
    values = cluster.values or {"found by": cluster.name}
    return (
        f"the processes did not come together within {timeout_s} s ({_said(values)}): do all of "
        "them run, is the address that of process 0, and is its port open to them? "
        "`initialize(initialization_timeout_s=...)` waits longer"
    )


def _said(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in values.items())


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]


def client() -> Any:
    """Return JAX's client of the key-value store, which all processes share."""
    return _runtime.global_state.client


def _key(name: str) -> str:
    """Return a key that is new each time; all processes say the same names in the same order."""
    return f"{name}/{next(_counts.setdefault(name, itertools.count()))}"


def _wait(name: str, timeout_s: float) -> None:
    wait_at(_key(name), timeout_s)


def wait_at(key: str, timeout_s: float) -> None:
    """Wait until all processes have come to a key that is used once; errors as in `barrier`."""
    try:
        client().wait_at_barrier(key, _ms(timeout_s))
    except jax.errors.JaxRuntimeError as error:
        raise _late(f"not all processes came to {key!r} within {timeout_s:g} s", error) from error


def _late(text: str, error: Exception) -> Exception:
    if "DEADLINE_EXCEEDED" not in str(error):
        return DistributedError(f"{text.partition(' within')[0]}: {_first_line(error)}")
    lines = str(error).splitlines()
    names = [line for line in lines if line.strip().isdecimal()]
    missing = f"; missing: process {', '.join(names)}" if names else ""
    return DistributedTimeoutError(f"{text}{missing}. JAX says: {_first_line(error)}")


def _ms(seconds: float) -> int:
    return max(1, int(seconds * 1000))
