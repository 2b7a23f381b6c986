"""Meshes: where programs may be queued ahead, and where that would deadlock XLA."""

from types import SimpleNamespace
from typing import Any

import pytest

from jaxtrainer import data
from jaxtrainer.chunks import ReadOptions
from jaxtrainer.data import open_source
from jaxtrainer.feed import Feed
from jaxtrainer.sharding import arranged, build_mesh, is_lockstep
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


def fake_devices(hosts: int, each: int, *, in_slices: bool = False) -> list[Any]:
    """Devices of several hosts, by which the order is chosen; no array is put on them."""
    return [
        SimpleNamespace(
            id=i,
            platform="gpu",
            device_kind="a GPU",
            process_index=i // each,
            slice_index=i // each if in_slices else None,
        )
        for i in range(hosts * each)
    ]


@pytest.mark.parametrize("in_slices", [False, True])
@pytest.mark.parametrize(
    ("sizes", "hosts"),
    [
        ({"data": 2, "model": 4}, [[0] * 4, [1] * 4]),
        # The batch is divided across hosts, wherever its axis stands.
        ({"model": 4, "data": 2}, [[0, 1]] * 4),
        ({"data": 4, "model": 2}, [[0, 0], [0, 0], [1, 1], [1, 1]]),
        ({"fsdp": 4, "model": 2}, [[0, 0], [0, 0], [1, 1], [1, 1]]),
        ({"data": 1, "fsdp": 8}, [[0] * 4 + [1] * 4]),
    ],
)
def test_axes_of_the_batch_lie_across_hosts(sizes: Any, hosts: Any, in_slices: bool):
    mesh = arranged(fake_devices(2, 4, in_slices=in_slices), sizes)
    assert mesh.shape == tuple(sizes.values())
    assert [[device.process_index for device in row] for row in mesh] == hosts


def test_order_of_one_host_is_that_of_jax():
    devices = fake_devices(1, 8)
    assert [d.id for d in arranged(devices, {"model": 4, "data": 2}).flat] == [*range(8)]
    assert [d.id for d in build_mesh({"data": 2, "fsdp": 4}).devices.flat] == [*range(8)]
