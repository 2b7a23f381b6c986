"""TensorBoard, Weights & Biases and MLflow: read back by their own readers, without a network.

Needs the group `loggers`; run with `make test-loggers`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxtrainer.callbacks import Checkpoint
from jaxtrainer.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from jaxtrainer.records import AXES, Histogram, Image, Scalars, Text
from tests import tiny
from tests.logged import Keeps, Talkative, read_png

pytestmark = [
    pytest.mark.loggers,
    pytest.mark.usefixtures("compiled_once"),
    # Other people's packages warn about each other.
    pytest.mark.filterwarnings("default"),
]

AXIS_TAGS = {*AXES[1:4]}


def fit(*loggers: Any, module: Any = None, **options: Any) -> Any:
    loaders = tiny.make_loader(), tiny.make_batches(2)
    module = Talkative() if module is None else module
    options = {"max_epochs": 3, **options}
    return tiny.fit(*loaders, module=module, logger=loggers, **options)[0]


def tagged(keeps: Keeps) -> dict[str, list[tuple[int, float]]]:
    """Every scalar that was logged, by the names that tell the kinds apart."""
    found: dict[str, list[tuple[int, float]]] = {}
    for record in keeps.of(Scalars):
        for name, value in record.tagged.items():
            found.setdefault(name, []).append((record.axes.step, value))
    return found


def events_of(folder: Path) -> Any:
    from tensorboard.backend.event_processing import (  # pyright: ignore[reportMissingImports]
        event_accumulator,
    )

    everything = {"scalars": 0, "images": 0, "histograms": 0, "tensors": 0}
    reader = event_accumulator.EventAccumulator(str(folder), size_guidance=everything)
    reader.Reload()
    return reader


def scalars_in(reader: Any) -> dict[str, list[tuple[int, float]]]:
    tags = {*reader.Tags()["scalars"]} - AXIS_TAGS
    return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in tags}


def rounded(points: dict[str, list[tuple[int, float]]]) -> dict[str, list[tuple[int, float]]]:
    """As event files have them, in single precision."""
    return {name: [(s, float(np.float32(v))) for s, v in p] for name, p in points.items()}


def test_tensorboard_reads_back_everything(tmp_path: Path):
    keeps = Keeps()
    fit(TensorBoardLogger(tmp_path), keeps)
    reader = events_of(tmp_path)
    assert scalars_in(reader) == rounded(tagged(keeps))
    assert {*reader.Tags()["images"]} == {r.name for r in keeps.of(Image)}
    for event, record in zip(reader.Images("drawings"), keeps.of(Image), strict=True):
        assert event.step == record.axes.step
        assert (read_png(event.encoded_image_string) == record.pixels).all()
        assert (event.height, event.width) == record.pixels.shape[:2]
    for event, record in zip(reader.Histograms("weights"), keeps.of(Histogram), strict=True):
        value = event.histogram_value
        assert (event.step, value.num) == (record.axes.step, record.counts.sum())
        assert value.bucket == record.counts.tolist()
        assert value.bucket_limit == record.edges[1:].tolist()
    texts = [e.tensor_proto.string_val[0].decode() for e in reader.Tensors("note/text_summary")]
    assert texts == [record.text for record in keeps.of(Text)]


def test_tensorboard_has_axes_and_hyperparameters(tmp_path: Path):
    from tensorboard.plugins.hparams import (  # pyright: ignore[reportMissingImports]
        plugin_data_pb2,
    )

    fit(TensorBoardLogger(tmp_path))
    reader = events_of(tmp_path)
    assert {*reader.Tags()["scalars"]} >= AXIS_TAGS
    assert all(e.value == 8 * e.step for e in reader.Scalars("samples"))
    assert reader.Scalars("epoch")[0].wall_time > 1.7e9
    content = reader.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    messages: Any = plugin_data_pb2
    data = messages.HParamsPluginData.FromString(content)
    assert data.session_start_info.hparams["module/width"].number_value == 8
    assert data.session_start_info.hparams["module/api_key"].string_value == "(hidden)"


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path: Path):
    keeps = Keeps()
    saver = Checkpoint(tmp_path / "saved", every_n_train_steps=12, save_top_k=-1)
    callbacks = [saver]
    fit(TensorBoardLogger(tmp_path / "x"), keeps, max_epochs=3)
    want = rounded(tagged(keeps))
    cut = TensorBoardLogger(tmp_path / "y")
    # The checkpoint is of step 12, and what was logged of step 16 is void.
    fit(cut, callbacks=callbacks, max_steps=14)
    for path in (tmp_path / "saved").glob("step_14"):
        path.rename(tmp_path / "gone")
    fit(TensorBoardLogger(tmp_path / "y"), callbacks=callbacks, ckpt_path="last", max_epochs=3)
    found = scalars_in(events_of(tmp_path / "y"))
    for name, points in want.items():
        assert dict(found[name]) == dict(points), name
        assert len(found[name]) == len({step for step, _ in found[name]})


def test_tensorboard_keeps_another_run_as_one_of_its_own(tmp_path: Path):
    for _ in range(3):
        fit(TensorBoardLogger(tmp_path), max_epochs=1)
    folders = [tmp_path, tmp_path / "earlier", tmp_path / "earlier-1"]
    assert [len([*folder.glob("events*")]) for folder in folders] == [1, 1, 1]
    for folder in folders:
        assert len(scalars_in(events_of(folder))["val/loss"]) == 1


def test_wandb_writes_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import wandb  # pyright: ignore[reportMissingImports]

    monkeypatch.setenv("WANDB_SILENT", "true")
    rows: list[dict[str, Any]] = []
    real = wandb.sdk.wandb_run.Run.log

    def log(run: Any, data: dict[str, Any], **options: Any) -> None:
        rows.append(data)
        real(run, data, **options)

    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "log", log)
    keeps = Keeps()
    logger = WandbLogger(project="tiny", offline=True, save_dir=tmp_path)
    fit(logger, keeps)
    assert all({*AXES[:4]} <= row.keys() for row in rows)
    scalars = [r for r in rows if not {"drawings", "weights", "note"} & r.keys()]
    want = [r.tagged for r in keeps.of(Scalars)]
    assert [{k: v for k, v in r.items() if k not in AXES} for r in scalars] == want
    [folder] = (tmp_path / "wandb").glob("offline-run-*")
    assert list(folder.glob("*.wandb"))
    assert logger.id is not None
    assert len([*folder.glob("files/media/images/*.png")]) == 3


def test_mlflow_reads_back_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import mlflow  # pyright: ignore[reportMissingImports]

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    keeps = Keeps()
    logger = MLFlowLogger(tracking_uri=uri, run_name="tiny")
    fit(logger, keeps)
    client = mlflow.MlflowClient(tracking_uri=uri)
    run = client.get_run(logger.run_id)
    assert (run.info.status, run.data.tags["stop_reason"]) == ("FINISHED", "max_epochs")
    assert (run.data.params["module/width"], run.data.params["module/api_key"]) == ("8", "(hidden)")
    for name, points in tagged(keeps).items():
        history = client.get_metric_history(logger.run_id, name)
        assert sorted((m.step, m.value) for m in history) == sorted(points)
    assert {*AXES[1:4]} <= run.data.metrics.keys()
    names = [a.path for a in client.list_artifacts(logger.run_id, "images")]
    assert names == ["images/drawings_16.png", "images/drawings_24.png", "images/drawings_8.png"]
    counted = client.download_artifacts(logger.run_id, "histograms/weights_8.json", str(tmp_path))
    assert sum(json.loads(Path(counted).read_text())["counts"]) == 10
