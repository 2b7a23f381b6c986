"""A process that has nearly all memory of the host says so, once, before the system ends it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jaxtrainer import Callback, Run, memory
from jaxtrainer.loops import report
from tests import tiny


class Notices(Callback):
    def on_fit_end(self, run: Run) -> None:
        self.texts = [text for text in run.notices if "memory" in text]


@pytest.mark.parametrize(("used", "warned"), [(7.0, 0), (7.3, 1)])
def test_memory_that_is_nearly_full_is_noticed_once(
    used: float, warned: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(report, "rss_bytes", lambda: int(used * 2**30))
    monkeypatch.setattr(report, "host_bytes", lambda: 8 << 30)
    notices = Notices()
    tiny.fit(callbacks=[notices], max_epochs=2)
    assert len(notices.texts) == warned
    assert all("over 90% of the host's memory, 8.0 GiB" in text for text in notices.texts)


def test_memory_of_the_process_is_that_of_the_system():
    before = memory.rss_bytes()
    held = np.ones(64 << 20, np.uint8)
    assert memory.rss_bytes() - before > held.nbytes // 2
    assert memory.rss_bytes() < memory.host_bytes()


def test_memory_is_none_where_the_system_does_not_say(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "_STATM", Path("/nowhere/statm"))
    assert memory.rss_bytes() == 0
