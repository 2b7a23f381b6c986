"""Meshes: where programs may be queued ahead, and where that would deadlock XLA."""

import pytest

from jaxtrainer import data
from jaxtrainer.chunks import ReadOptions
from jaxtrainer.data import open_source
from jaxtrainer.feed import Feed
from jaxtrainer.sharding import build_mesh, is_lockstep
from tests import tiny


class Token:
    """Stands for an output of a dispatch; notes whether somebody waited for it."""

    waited = False

    def block_until_ready(self):
        self.waited = True


@pytest.mark.parametrize(("devices", "expected"), [(1, False), (2, True), (8, True)])
def test_several_cpu_devices_run_in_lockstep(devices, expected):
    mesh = build_mesh({"data": devices})
    assert is_lockstep(mesh) == expected
    source = open_source(data.from_arrays(tiny.make_arrays(), batch_size=8), "train")
    feed = Feed(source, ReadOptions(stage="train"), mesh=mesh).start(4)
    token = Token()
    feed.dispatched(token)  # pyright: ignore[reportArgumentType]
    assert token.waited == expected
    feed.close()
