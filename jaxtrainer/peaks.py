"""Peak rates of common devices, from their vendors' data sheets.

Dense figures: where a data sheet gives a rate "with sparsity", half of it. Imports nothing of the
package.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

import jax

Arithmetic = Literal["bf16", "fp16", "tf32", "fp32"]

_T = 1e12


@dataclass(frozen=True, kw_only=True)
class Peak:
    """FLOP/s of matrix products on one device as JAX counts devices; None where there is no unit.

    Attributes:
        bf16: bfloat16 inputs, float32 sums.
        fp16: float16 inputs, float32 sums.
        tf32: float32 inputs in the shortened form that XLA uses by default: TF32 on NVIDIA's
            devices from Ampere on, one bfloat16 pass on a TPU.
        fp32: float32 throughout.
        source: Where the figures are from.
    """

    bf16: float | None = None
    fp16: float | None = None
    tf32: float | None = None
    fp32: float | None = None
    source: str

    def of(self, arithmetic: Arithmetic) -> float | None:
        """Return the rate of one kind of arithmetic; without a short form of float32, its own."""
        if arithmetic == "tf32":
            return self.tf32 or self.fp32
        return {"bf16": self.bf16, "fp16": self.fp16, "fp32": self.fp32}[arithmetic]


def _nvidia(
    source: str, half: float, tf32: float | None, fp32: float, *, has_bf16: bool = True
) -> Peak:
    return Peak(
        bf16=half * _T if has_bf16 else None,
        fp16=half * _T,
        tf32=None if tf32 is None else tf32 * _T,
        fp32=fp32 * _T,
        source=f"NVIDIA {source}",
    )


def _tpu(bf16: float, version: str, *, devices_per_chip: int = 1) -> Peak:
    rate = bf16 * _T / devices_per_chip
    source = f"Google Cloud TPU documentation, {version} system architecture, peak compute per chip"
    return Peak(bf16=rate, tf32=rate, source=source)


def _amd(half: float, fp32: float, source: str, *, devices_per_card: int = 1) -> Peak:
    half, fp32 = half * _T / devices_per_card, fp32 * _T / devices_per_card
    return Peak(bf16=half, fp16=half, fp32=fp32, source=f"AMD {source}")


_H100_SXM = _nvidia("H100 Tensor Core GPU data sheet, SXM", 989.5, 494.5, 67)
_H100_NVL = _nvidia("H100 Tensor Core GPU data sheet, NVL", 835.5, 417.5, 60)
_V5E, _V5P, _V6E = _tpu(197, "v5e"), _tpu(459, "v5p"), _tpu(918, "v6e")
_V7 = _tpu(2307, "TPU7x (Ironwood)", devices_per_chip=2)

PEAKS: dict[str, Peak] = {
    "Tesla V100 SXM2": _nvidia("V100 data sheet, SXM2", 125, None, 15.7, has_bf16=False),
    "Tesla V100 PCIE": _nvidia("V100 data sheet, PCIe", 112, None, 14, has_bf16=False),
    "Tesla T4": _nvidia("T4 data sheet, mixed precision", 65, None, 8.1, has_bf16=False),
    "NVIDIA A10": _nvidia("A10 data sheet", 125, 62.5, 31.2),
    "NVIDIA A100": _nvidia("A100 data sheet", 312, 156, 19.5),
    "NVIDIA H100 80GB HBM3": _H100_SXM,
    "NVIDIA H100 PCIe": _nvidia("H100 Tensor Core GPU data sheet, PCIe", 756.5, 378, 51),
    "NVIDIA H100 NVL": _H100_NVL,
    "NVIDIA H200": _nvidia("H200 Tensor Core GPU data sheet, SXM", 989.5, 494.5, 67),
    "NVIDIA H200 NVL": _nvidia("H200 Tensor Core GPU data sheet, NVL", 835.5, 417.5, 60),
    # Eight devices have 36 PFLOP/s of bfloat16 and 18 of TF32 with sparsity, and 600 TFLOP/s.
    "NVIDIA B200": _nvidia("HGX B200 data sheet, an eighth", 2250, 1125, 75),
    "NVIDIA L4": _nvidia("L4 data sheet", 121, 60, 30.3),
    "NVIDIA L40S": _nvidia("L40S data sheet", 362, 183, 91.6),
    # GeForce: half precision with float32 sums, which XLA asks for, is half of what it is with
    # float16 sums.
    "NVIDIA GeForce RTX 3090": _nvidia("GA102 whitepaper, appendix A", 71, 35.6, 35.6),
    "NVIDIA GeForce RTX 4090": _nvidia("Ada whitepaper, appendix A", 165.2, 82.6, 82.6),
    "NVIDIA GeForce RTX 5090": _nvidia("RTX Blackwell whitepaper, appendix A", 209.5, 104.8, 104.8),
    # JAX has one device for each half of an MI250X.
    "AMD Instinct MI250X": _amd(383, 95.7, "Instinct MI250X data sheet", devices_per_card=2),
    "AMD Instinct MI300X": _amd(1307.4, 163.4, "Instinct MI300X data sheet"),
    # Up to v3, and from v7 on, JAX has one device for each of the two cores of a chip.
    "TPU v2": _tpu(46, "v2", devices_per_chip=2),
    "TPU v3": _tpu(123, "v3", devices_per_chip=2),
    "TPU v4": _tpu(275, "v4"),
    "TPU v5 lite": _V5E,
    "TPU v5e": _V5E,
    "TPU v5": _V5P,
    "TPU v5p": _V5P,
    "TPU v6 lite": _V6E,
    "TPU v6e": _V6E,
    "TPU7x": _V7,
}
"""Peaks by JAX's `device_kind`, with spaces for hyphens; sizes and form factors may follow."""

_WHOLE_FLOAT32 = ("highest", "float32")
"""Precisions of matrix products, as JAX names them, that do not shorten float32."""


def arithmetic_of(precision: str, products: str | None) -> Arithmetic:
    """Return the arithmetic of most of a step.

    Args:
        precision: The trainer's, by name.
        products: Precision of matrix products of float32, as `jax.default_matmul_precision`
            takes it; None for JAX's default.

    Example:
        >>> arithmetic_of("bf16-mixed", None), arithmetic_of("32-true", "highest")
        ('bf16', 'fp32')
    """
    if precision.startswith("bf16"):
        return "bf16"
    if precision.startswith("16"):
        return "fp16"
    products = products or jax.config.values["jax_default_matmul_precision"]
    return "fp32" if products in _WHOLE_FLOAT32 else "tf32"


_FORM = re.compile(r"SXM\d?|PCIE|\d+GB", re.IGNORECASE)
"""What may follow a name, and does not change these figures."""


def peak_of(device_kind: str) -> Peak | None:
    """Return the peak of a kind of device; None if it is not known.

    A part of a device (MIG), or another model of a similar name, is not known.

    Args:
        device_kind: As in `jax.devices()[0].device_kind`.

    Example:
        >>> peak_of("NVIDIA A100-SXM4-80GB").of("bf16")
        312000000000000.0
        >>> peak_of("NVIDIA A100-SXM4-40GB MIG 1g.5gb")
    """
    words = device_kind.replace("-", " ")
    known = [name for name in PEAKS if words == name or words.startswith(f"{name} ")]
    name = max(known, key=len, default="")
    rest = words[len(name) :].split()
    return PEAKS[name] if name and all(_FORM.fullmatch(word) for word in rest) else None
