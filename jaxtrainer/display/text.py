"""Numbers as short text: values, times, rates and rows of metrics.

Imports rich's cell widths only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from rich.cells import cell_len, set_cell_size


def format_value(value: float) -> str:
    """Return a metric with three to five digits, as wide for most losses and accuracies.

    Example:
        >>> [format_value(v) for v in (0.95, 0.0123, 12.345, 1e-5, 0.0, 123456.0)]
        ['0.9500', '0.0123', '12.35', '1.00e-05', '0.0000', '1.23e+05']
    """
    size = abs(value)
    if size == 0.0 or 0.01 <= size < 9.99995 or not math.isfinite(value):
        return f"{value:.4f}"
    if 0.01 <= size < 9999.5:
        return f"{value:#.4g}".rstrip(".")
    return f"{value:.2e}"


def format_seconds(seconds: float) -> str:
    """Return a span of time; from a minute on as a clock shows it.

    Example:
        >>> [format_seconds(s) for s in (0.5249, 12.34, 75.0, 3725.0)]
        ['0.52 s', '12.3 s', '1:15', '1:02:05']
    """
    if seconds < 9.995:
        return f"{seconds:.2f} s"
    return f"{seconds:.1f} s" if seconds < 59.95 else format_clock(seconds)


def format_span(seconds: float) -> str:
    """Return a span of time with three digits and the unit that suits it.

    Example:
        >>> [format_span(s) for s in (0.0, 3.25e-6, 0.01234, 2.5)]
        ['0 s', '3.25 us', '12.3 ms', '2.5 s']
    """
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1.0:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us" if seconds else "0 s"


def format_clock(seconds: float) -> str:
    """Return `M:SS` or `H:MM:SS`, rounded to the second.

    Example:
        >>> [format_clock(s) for s in (6.4, 75.0, 3725.0)]
        ['0:06', '1:15', '1:02:05']
    """
    minutes, secs = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{secs:02}" if hours else f"{minutes}:{secs:02}"


def format_rate(rate: float | None) -> str:
    """Return a rate with three significant digits, `--` if it is not known yet.

    Example:
        >>> [format_rate(r) for r in (None, 0.5, 12.34, 189.6, 25417.0)]
        ['--', '0.500', '12.3', '190', '25417']
    """
    if rate is None:
        return "--"
    return f"{rate:.0f}" if rate >= 99.95 else f"{rate:#.3g}"


def short_name(name: str) -> str:
    """Return the name of a series as the bar shows it: `train/loss` is `loss`."""
    return name.removeprefix("train/").removeprefix("throughput/")


def format_metrics(metrics: Mapping[str, float], widths: dict[str, int] | None = None) -> str:
    """Return `loss=0.1234 val/accuracy=0.9500`.

    Args:
        metrics: Values by the full name of their series.
        widths: The widest value of each name so far, kept up to date: one dict for a run
            keeps its lines aligned.
    """
    seen = {} if widths is None else widths
    fields: list[str] = []
    for name, value in metrics.items():
        text = format_value(value)
        seen[name] = max(seen.get(name, 0), len(text))
        fields.append(f"{short_name(name)}={text:<{seen[name]}}")
    return " ".join(fields).rstrip()


def fit(text: str, width: int, ellipsis: str = "…") -> str:
    """Cut a text to a width in terminal cells, with an ellipsis where it was cut.

    Example:
        >>> fit("loss=0.1234 accuracy=0.9500", 20)
        'loss=0.1234 accurac…'
    """
    if cell_len(text) <= width:
        return text
    return set_cell_size(text, width - 1) + ellipsis if width > 0 else ""


def format_count(value: float) -> str:
    """Return a count with three digits and a decimal prefix.

    Example:
        >>> format_count(134_794), format_count(12)
        ('135 k', '12 ')
    """
    for limit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= limit:
            return f"{value / limit:.3g} {prefix}"
    return f"{value:.3g} "


def format_bytes(value: float) -> str:
    """Return a size with a binary prefix.

    Example:
        >>> format_bytes(1536), format_bytes(12)
        ('1.50 KiB', '12 B')
    """
    for power, prefix in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if value >= 1 << power:
            return f"{value / (1 << power):.2f} {prefix}"
    return f"{value:.0f} B"
