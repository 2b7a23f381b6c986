"""`TensorBoardLogger`: event files, as TensorBoard reads them.

What a file holds is put together by tensorboardX's messages; writing it is done here, in the
logger's thread, so that a disk that is full is seen.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from pathlib import Path
from typing import Any

import numpy as np

from jaxtrainer.errors import checks_options
from jaxtrainer.loggers.json_lines import strict
from jaxtrainer.loggers.logger import Call, Logger, directory_of, free_path, missing
from jaxtrainer.records import (
    End,
    Histogram,
    HyperParameters,
    Image,
    Record,
    Scalars,
    Text,
    unix_time_s,
)
from jaxtrainer.settings import flat

PATTERN = "events.out.tfevents.*"
_COLOUR_SPACE = {1: 1, 3: 3, 4: 4}
_STATUS = {"finished": "STATUS_SUCCESS", "failed": "STATUS_FAILURE"}


class TensorBoardLogger(Logger):
    """Write scalars, images, histograms, texts and hyper-parameters for TensorBoard.

    Tags are the names of the series; of a series with values of steps and exact means the latter
    have `_epoch` behind. With each come `epoch`, `samples` and `elapsed_s` (of the run, in
    seconds); TensorBoard's own axes are the optimiser step and the wall clock.

    A resumed run adds a file which says that what came after its first step is void. Event files
    of another run are moved into a directory `earlier`, where TensorBoard shows them as a run of
    their own.

    Args:
        directory: Where to; `tensorboard --logdir` takes this one, or one above with several runs.

    Raises:
        MissingExtraError: Without tensorboardX: `pip install 'jaxtrainer[tensorboard]'`.
        ConfigError: If it is no directory on a disk.

    Example:
        >>> logger = TensorBoardLogger("runs/mnist")  # Trainer(logger=logger)
    """

    @checks_options
    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = directory_of("TensorBoardLogger", directory)
        self._x = _Messages()
        self._file: Any = None

    def open(self, root: Path, call: Call) -> None:
        """Begin a file."""
        folder = root / str(self.directory)
        folder.mkdir(parents=True, exist_ok=True)
        if call.is_new:
            _move_aside(folder)
        # They are read in the order of their names.
        number = len([*folder.glob(PATTERN)])
        what = f"{int(unix_time_s()):010}.{socket.gethostname()}.{os.getpid()}.{number:04}"
        self._file = (folder / PATTERN.replace("*", what)).open("xb", buffering=0)
        self._put(file_version="brain.Event:2")
        if call.stage == "fit" and call.resumed_step is not None:
            start = self._x.event.SessionLog(status=self._x.event.SessionLog.START)
            self._put(step=call.resumed_step + 1, session_log=start)

    def write(self, record: Record) -> None:
        """Write its events."""
        match record:
            case Scalars():
                axes = record.axes
                counts = {"epoch": axes.epoch, "samples": axes.samples, "elapsed_s": axes.elapsed_s}
                named = {**counts, **record.tagged}
                values = [self._x.value(tag=n, simple_value=v) for n, v in named.items()]
                self._put(record, self._x.summary.Summary(value=values))
            case Image():
                self._put(record, self._x.image(record))
            case Histogram():
                self._put(record, self._x.histogram(record))
            case Text():
                self._put(record, self._x.build.text(record.name, record.text))
            case HyperParameters():
                shown = f"```json\n{json.dumps(strict(record.values), indent=1)}\n```"
                self._put(record, self._x.build.text("hyperparameters", shown))
                known = {k: _known(v) for k, v in flat(record.values, "/").items()}
                for summary in self._x.build.hparams(known, {})[:2]:
                    self._put(record, summary)
            case End():
                self._put(record, self._x.build.hparams({}, {})[2])

    def close(self) -> None:
        """Close the file."""
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _put(self, record: Record | None = None, summary: Any = None, **parts: Any) -> None:
        if record is not None:
            parts |= {"step": record.axes.step, "wall_time": record.axes.unix_time_s}
        if summary is not None:
            parts["summary"] = summary
        self._append(self._x.framed(self._x.event.Event(**parts).SerializeToString()))

    def _append(self, content: bytes) -> None:
        begin = self._file.tell()
        try:
            done = 0
            while done < len(content):
                done += self._file.write(content[done:])
        except OSError:
            # A reader stops at an event of which only a part is there.
            self._file.seek(begin)
            self._file.truncate()
            raise


class _Messages:
    """The messages of an event file."""

    def __init__(self) -> None:
        try:
            from tensorboardX import summary  # pyright: ignore[reportMissingImports]
            from tensorboardX.proto import (  # pyright: ignore[reportMissingImports]
                event_pb2,
                summary_pb2,
            )
            from tensorboardX.record_writer import (  # pyright: ignore[reportMissingImports]
                masked_crc32c,
            )
        except ImportError as error:
            raise missing("tensorboardX", "TensorBoardLogger", "tensorboard") from error
        self.build, self.checksum = summary, masked_crc32c
        self.event, self.summary = event_pb2, summary_pb2
        self.value = self.summary.Summary.Value

    def image(self, record: Image) -> Any:
        height, width, channels = record.pixels.shape
        picture = self.summary.Summary.Image(
            height=height,
            width=width,
            colorspace=_COLOUR_SPACE[channels],
            encoded_image_string=record.png,
        )
        return self.summary.Summary(value=[self.value(tag=record.name, image=picture)])

    def histogram(self, record: Histogram) -> Any:
        # What is beyond the last edge is shown as far beyond it as the edge is from the first.
        beyond = 2 * record.edges[-2] - record.edges[0]
        edges = np.where(np.isinf(record.edges), beyond, record.edges)
        middles = (edges[1:] + edges[:-1]) / 2
        return self.build.histogram_raw(
            record.name,
            min=float(edges[0]),
            max=float(edges[-1]),
            num=float(record.counts.sum()),
            sum=float(record.counts @ middles),
            sum_squares=float(record.counts @ middles**2),
            bucket_limits=edges[1:].tolist(),
            bucket_counts=record.counts.tolist(),
        )

    def framed(self, content: bytes) -> bytes:
        """Return a record of the format TFRecord: length, content, a checksum after each."""
        length = struct.pack("<Q", len(content))
        checks = [struct.pack("<I", self.checksum(part)) for part in (length, content)]
        return length + checks[0] + content + checks[1]


def _move_aside(folder: Path) -> None:
    earlier = sorted(folder.glob(PATTERN))
    if not earlier:
        return
    kept = free_path(folder / "earlier")
    kept.mkdir()
    for file in earlier:
        file.rename(kept / file.name)


def _known(value: Any) -> int | float | str:
    return value if isinstance(value, int | float | str) else str(value)
