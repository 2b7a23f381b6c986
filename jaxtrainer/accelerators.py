"""Memory and links of common accelerators, for a plan of a run on devices that are not at hand.

Peak rates are those of `peaks`. May import level 0 and `peaks`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from jaxtrainer.errors import ConfigError, did_you_mean
from jaxtrainer.peaks import PEAKS, Arithmetic, Peak

_GB, _GIB, _TB = 1e9, 2**30, 1e12
_GBIT = 1e9 / 8


@dataclass(frozen=True, kw_only=True)
class Accelerator:
    """One kind of device, as JAX counts devices, and what joins it to others.

    For one that is not in `ACCELERATORS` make your own, or change one: `dataclasses.replace(
    ACCELERATORS["h100-pcie"], network_bytes_per_s=25e9)`.

    Attributes:
        name: How it is called here.
        peak: FLOP/s by arithmetic.
        memory_bytes: Bytes of its memory, as its vendor states them.
        memory_bytes_per_s: Bytes that it reads and writes a second.
        link_bytes_per_s: Bytes it can send a second, one way, to devices of its own node.
        devices_per_node: Devices that those links join: a host, or the pod of a TPU.
        network_bytes_per_s: Bytes it can send a second, one way, to other nodes.
        source: Where the figures are from; "assumed" where a vendor leaves one open.
    """

    name: str
    peak: Peak
    memory_bytes: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    devices_per_node: int
    network_bytes_per_s: float
    source: str

    def bytes_per_s(self, group: Sequence[int]) -> float:
        """Return how fast each device of a group sends, all of them in a ring at once.

        Within a node as fast as its link. A ring over several nodes enters and leaves each node
        once, and is as fast as the networks of its devices there together, if that is less.

        Args:
            group: Positions of the devices in the mesh; neighbours in it are in the same node.
        """
        nodes = {position // self.devices_per_node for position in group}
        if len(nodes) == 1:
            return self.link_bytes_per_s
        together = len(group) / len(nodes) * self.network_bytes_per_s
        return min(self.link_bytes_per_s, together)


def _accelerator(
    name: str,
    kind: str,
    memory: tuple[float, float],
    link: float,
    devices_per_node: int,
    network: float,
    source: str,
) -> Accelerator:
    size, rate = memory
    return Accelerator(
        name=name,
        peak=PEAKS[kind],
        memory_bytes=size,
        memory_bytes_per_s=rate,
        link_bytes_per_s=link,
        devices_per_node=devices_per_node,
        network_bytes_per_s=network,
        source=source,
    )


_PCIE4, _PCIE5 = 32 * _GB, 64 * _GB
"""One way of 16 lanes; data sheets give both ways together."""

_NVLINK3, _NVLINK4, _NVLINK5 = 300 * _GB, 450 * _GB, 900 * _GB
"""One way; data sheets give 600, 900 and 1,800 GB/s for both."""

_ASSUMED = "network of 100 Gb/s a device assumed"

_ALL = (
    # The node of a DGX: eight devices, and a network adapter for each.
    _accelerator(
        *("a100-40gb", "NVIDIA A100", (40 * _GB, 1.555 * _TB), _NVLINK3, 8, 200 * _GBIT),
        "NVIDIA A100 data sheet, SXM 40 GB; DGX A100 data sheet, 8 x 200 Gb/s",
    ),
    _accelerator(
        *("a100-80gb", "NVIDIA A100", (80 * _GB, 2.039 * _TB), _NVLINK3, 8, 200 * _GBIT),
        "NVIDIA A100 data sheet, SXM 80 GB; DGX A100 data sheet, 8 x 200 Gb/s",
    ),
    _accelerator(
        *("h100", "NVIDIA H100 80GB HBM3", (80 * _GB, 3.35 * _TB), _NVLINK4, 8, 400 * _GBIT),
        "NVIDIA H100 data sheet, SXM; DGX H100 data sheet, 8 x 400 Gb/s",
    ),
    _accelerator(
        *("h100-pcie", "NVIDIA H100 PCIe", (80 * _GB, 2.0 * _TB), _PCIE5, 8, 100 * _GBIT),
        f"NVIDIA H100 data sheet, PCIe, without bridges; {_ASSUMED}",
    ),
    _accelerator(
        *("h200", "NVIDIA H200", (141 * _GB, 4.8 * _TB), _NVLINK4, 8, 400 * _GBIT),
        "NVIDIA H200 data sheet, SXM; DGX H200 data sheet, 8 x 400 Gb/s",
    ),
    _accelerator(
        *("b200", "NVIDIA B200", (180 * _GB, 8.0 * _TB), _NVLINK5, 8, 400 * _GBIT),
        "NVIDIA DGX B200 data sheet: an eighth of 1,440 GB and 64 TB/s; 8 x 400 Gb/s",
    ),
    _accelerator(
        *("l4", "NVIDIA L4", (24 * _GB, 300 * _GB), _PCIE4, 8, 100 * _GBIT),
        f"NVIDIA L4 data sheet; {_ASSUMED}",
    ),
    _accelerator(
        *("l40s", "NVIDIA L40S", (48 * _GB, 864 * _GB), _PCIE4, 8, 100 * _GBIT),
        f"NVIDIA L40S data sheet; {_ASSUMED}",
    ),
    _accelerator(
        *("rtx-4090", "NVIDIA GeForce RTX 4090", (24 * _GB, 1.008 * _TB), _PCIE4, 8, 10 * _GBIT),
        "NVIDIA Ada whitepaper, appendix A; network of 10 Gb/s a device assumed",
    ),
    # Seven links to the seven others, 64 GB/s one way each.
    _accelerator(
        *("mi300x", "AMD Instinct MI300X", (192 * _GB, 5.3 * _TB), 448 * _GB, 8, 400 * _GBIT),
        "AMD Instinct MI300X data sheet and platform; network of 400 Gb/s a device assumed",
    ),
    # A ring on one axis of the torus sends both ways, on two of the chip's four or six links.
    _accelerator(
        *("tpu-v4", "TPU v4", (32 * _GIB, 1.2 * _TB), 100 * _GB, 4096, 50 * _GBIT),
        "Cloud TPU documentation, v4; links: Jouppi et al., 2023, table 4, 6 x 50 GB/s; network "
        "of 50 Gb/s a chip assumed",
    ),
    _accelerator(
        *("tpu-v5e", "TPU v5e", (16 * _GB, 819 * _GB), 100 * _GB, 256, 25 * _GBIT),
        "Cloud TPU documentation, v5e: 400 GB/s both ways on 4 links, 6.4 Tb/s for a pod of 256",
    ),
    _accelerator(
        *("tpu-v5p", "TPU v5p", (95 * _GIB, 2.765 * _TB), 200 * _GB, 8960, 50 * _GBIT),
        "Cloud TPU documentation, v5p: 1,200 GB/s both ways on 6 links, 50 Gb/s a chip",
    ),
    _accelerator(
        *("tpu-v6e", "TPU v6e", (32 * _GB, 1.638 * _TB), 200 * _GB, 256, 100 * _GBIT),
        "Cloud TPU documentation, v6e: 800 GB/s both ways on 4 links, 25.6 Tb/s for a pod of 256",
    ),
)

ACCELERATORS: dict[str, Accelerator] = {accelerator.name: accelerator for accelerator in _ALL}
"""Accelerators by the name that `Trainer.plan(accelerator=...)` takes."""

_ALIASES = {"a100": "a100-80gb", "h100-sxm": "h100", "tpu-v5-lite": "tpu-v5e"}


def parse_accelerator(accelerator: str | Accelerator) -> Accelerator:
    """Return an accelerator by its name; one that is given as such stays as it is.

    Raises:
        ConfigError: If no accelerator has this name, naming the close match.

    Example:
        >>> parse_accelerator("H100").memory_bytes_per_s
        3350000000000.0
    """
    if isinstance(accelerator, Accelerator):
        return accelerator
    name = str(accelerator).lower().replace("_", "-").replace(" ", "-")
    name = _ALIASES.get(name, name)
    if name not in ACCELERATORS:
        known = ", ".join(ACCELERATORS)
        raise ConfigError(
            f"accelerator={accelerator!r} is not known; use one of {known}, or an `Accelerator` "
            f"of your own.{did_you_mean(name, ACCELERATORS)}"
        )
    return ACCELERATORS[name]


def rate_of(accelerator: Accelerator, arithmetic: Arithmetic) -> float:
    """Return its FLOP/s in one kind of arithmetic; where it has none, that of float32 inputs.

    A TPU has no unit for float16, or for products of whole float32.

    Raises:
        ConfigError: If it has no rate at all, as one of your own may.
    """
    rate = accelerator.peak.of(arithmetic) or accelerator.peak.of("tf32")
    if not rate:
        raise ConfigError(
            f"accelerator {accelerator.name!r} has no rate for {arithmetic}; give one, "
            f"`Accelerator(peak=Peak({arithmetic}=1e14, source=...), ...)`."
        )
    return rate
