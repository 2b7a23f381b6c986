"""`MLFlowLogger`: MLflow."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxtrainer.errors import checks_options
from jaxtrainer.loggers.json_lines import strict
from jaxtrainer.loggers.logger import Call, Logger, missing
from jaxtrainer.records import (
    End,
    Histogram,
    HyperParameters,
    Image,
    Record,
    Scalars,
    Text,
)
from jaxtrainer.settings import flat

_UNKNOWN = re.compile(r"[^\w\-. :/]")
_LONGEST = 500
"""Characters of a parameter that every store takes."""

_MOST = 100
"""Parameters in one call."""

_MOST_METRICS = 1000
"""Values in one call."""

_STATUS = {"finished": "FINISHED", "interrupted": "KILLED", "failed": "FAILED"}


class MLFlowLogger(Logger):
    """Log scalars, images, histograms, texts and hyper-parameters to an MLflow server or store.

    With the scalars of a step come `epoch`, `samples` and `elapsed_s` (of the run, in seconds);
    MLflow's own axes are the optimiser step and the wall clock. Of a series with values of steps
    and exact means the latter have `_epoch` behind. Pictures (PNG), histograms (JSON) and texts
    are artifacts. Records are sent every 5 seconds, and at the end. A call of `test` after `fit`
    goes on in the same run; so does one that resumes in a new process, if it is told the `run_id`.
    Points that a resumed run writes again stay there twice.

    Args:
        experiment_name: Name of the experiment, made if missing.
        run_name: Name of the run; MLflow makes one if None.
        tracking_uri: Server or store; as MLflow finds it if None (MLFLOW_TRACKING_URI).
        tags: Tags of the run.
        artifact_location: Where a new experiment has its artifacts; as MLflow decides if None.
        run_id: Id of a run, to go on with it.

    Raises:
        MissingExtraError: Without mlflow: `pip install 'jaxtrainer[mlflow]'`.

    Example:
        >>> logger = MLFlowLogger(tracking_uri="sqlite:///mlflow.db")  # doctest: +SKIP
    """

    # Each sending of scalars is a request, or a transaction.
    gather_s = 5.0
    flush_timeout_s = 60.0

    @checks_options
    def __init__(
        self,
        *,
        experiment_name: str = "jaxtrainer",
        run_name: str | None = None,
        tracking_uri: str | os.PathLike[str] | None = None,
        tags: Mapping[str, str] | None = None,
        artifact_location: str | None = None,
        run_id: str | None = None,
    ) -> None:
        try:
            import mlflow  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise missing("mlflow", "MLFlowLogger", "mlflow") from error
        self._mlflow: Any = mlflow
        self._uri = None if tracking_uri is None else os.fspath(tracking_uri)
        self._experiment, self._name, self._tags = experiment_name, run_name, dict(tags or {})
        self._artifacts = artifact_location
        self.run_id = run_id
        self._is_given = run_id is not None
        self._client: Any = None
        self._params: set[str] = set()
        self._metrics: list[Any] = []

    def open(self, root: Path, call: Call) -> None:
        """Begin a run, or go on with it."""
        self._metrics = []
        self._client = self._mlflow.MlflowClient(tracking_uri=self._uri)
        if call.is_new and not self._is_given:
            self.run_id = None
            self._params = set()
        if self.run_id is None:
            found = self._client.get_experiment_by_name(self._experiment)
            experiment = (
                found.experiment_id
                if found is not None
                else self._client.create_experiment(self._experiment, self._artifacts)
            )
            run = self._client.create_run(experiment, tags=self._tags, run_name=self._name)
            self.run_id = run.info.run_id
        else:
            self._client.update_run(self.run_id, status="RUNNING")

    def write(self, record: Record) -> None:
        """Log it."""
        match record:
            case Scalars():
                self._metrics += self._metrics_of(record)
            case Image():
                name = f"{_clean(record.name)}_{record.axes.step}.png"
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder, name.replace("/", "_"))
                    path.write_bytes(record.png)
                    self._client.log_artifact(self.run_id, str(path), "images")
            case Histogram():
                counted = {"counts": record.counts.tolist(), "edges": record.edges.tolist()}
                file = f"histograms/{_clean(record.name)}_{record.axes.step}.json"
                self._client.log_dict(self.run_id, strict(counted), file)
            case Text():
                file = f"texts/{_clean(record.name)}_{record.axes.step}.txt"
                self._client.log_text(self.run_id, record.text, file)
            case HyperParameters():
                self._write_params(record)
            case End():
                self.flush()
                self._client.set_tag(self.run_id, "stop_reason", record.reason)
                self._client.set_terminated(self.run_id, _STATUS[record.status])

    def flush(self) -> None:
        """Send the scalars."""
        while self._metrics:
            self._client.log_batch(self.run_id, metrics=self._metrics[:_MOST_METRICS])
            del self._metrics[:_MOST_METRICS]

    def close(self) -> None:
        """Let go of the client."""
        self._client = None

    def _metrics_of(self, record: Scalars) -> list[Any]:
        axes = record.axes
        counts = {"epoch": axes.epoch, "samples": axes.samples, "elapsed_s": axes.elapsed_s}
        at = {"timestamp": round(1e3 * axes.unix_time_s), "step": axes.step}
        metric = self._mlflow.entities.Metric
        values = {**counts, **record.tagged}
        return [metric(_clean(n), float(v), **at) for n, v in values.items()]

    def _write_params(self, record: HyperParameters) -> None:
        # MLflow refuses another value of one that is there.
        new = {_clean(k): str(v)[:_LONGEST] for k, v in flat(record.values, "/").items()}
        new = {k: v for k, v in new.items() if k not in self._params}
        params = [self._mlflow.entities.Param(k, v) for k, v in new.items()]
        for start in range(0, len(params), _MOST):
            self._client.log_batch(self.run_id, params=params[start : start + _MOST])
        self._params |= new.keys()


def _clean(name: str) -> str:
    return _UNKNOWN.sub("_", name)
