"""TensorBoard scalars, written record by record in the thread of the caller.

TensorBoard's own writer hands records to a thread. On a full disk that thread ends, and the run waits forever for room in the
thread's queue.
"""

from __future__ import annotations

import io
import os
import platform
import time
from pathlib import Path

from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter

from megatron_vila.training.report_files import AppendFile


class EventFile:
    """An event file in ``folder``. Readers hide the steps from ``first_step`` on in earlier files. Methods raise ``OSError``."""

    def __init__(self, folder: Path, first_step: int) -> None:
        name = f"events.out.tfevents.{time.time():010.0f}.{platform.node()}.{os.getpid()}"
        self._file = AppendFile(folder / name)
        self._first_step, self._begun = first_step, False

    def add(self, scalars: dict[str, float], step: int) -> None:
        """Write ``scalars`` (name to value) of ``step``."""
        values = [Summary.Value(tag=name, simple_value=value) for name, value in scalars.items()]
        events = [Event(step=step, summary=Summary(value=values))]
        if not self._begun:
            self._begun = True
            start = SessionLog(status=SessionLog.START)
            events = [Event(file_version="brain.Event:2"), Event(step=self._first_step, session_log=start), *events]
        records, now = io.BytesIO(), time.time()
        for event in events:
            event.wall_time = now
            RecordWriter(records).write(event.SerializeToString())
        self._file.write(records.getvalue())

    def close(self) -> None:
        self._file.close()
