"""The HTML report of a run: one file, which asks for nothing and runs nothing.

Its own SVG, so that it needs no other package; no script, and a policy that forbids all requests.
May import levels 0 to 2.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxtrainer.account import Account, read_account, write_whole
from jaxtrainer.curves import Panel, epoch_ends, panels_of, some_epochs
from jaxtrainer.display.report import named_phases
from jaxtrainer.display.style import style
from jaxtrainer.display.svg import NUM_COLORS, Curve, chart, escape
from jaxtrainer.display.text import format_bytes, format_seconds
from jaxtrainer.errors import ConfigError
from jaxtrainer.remote import refuse_url
from jaxtrainer.run import Series
from jaxtrainer.settings import flat

FILE_NAME = "report.html"


def report(run_dir: str | os.PathLike[str], path: str | os.PathLike[str] | None = None) -> Path:
    """Write a page about a run from its directory; see `FitResult.report`.

    Args:
        run_dir: Where a `Report` or a logger to CSV or JSON lines has written. Configuration,
            environment and timings are there after a `Report` only.
        path: Of the file; None for `report.html` in the directory.

    Returns:
        The file.

    Raises:
        RunDirError: If nothing there has the curves of a run.

    Example:
        >>> # jaxtrainer.report("runs/mnist")
    """
    account = read_account(run_dir)
    return write_report(account, Path(run_dir) / FILE_NAME if path is None else path)


def write_report(account: Account, path: str | os.PathLike[str]) -> Path:
    """Write the report of a run, in one piece.

    Args:
        account: The run.
        path: Of the file, or a directory that gets a `report.html`.

    Returns:
        The file.

    Raises:
        ConfigError: For a name that a browser would not open as a page, or a URL.
    """
    refuse_url("report", path)
    file = Path(path)
    if file.is_dir() or not file.suffix:
        file = file / FILE_NAME
    if file.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(
            f"report({os.fspath(path)!r}): a report is a page, so end its name in .html: "
            f"`result.report({str(file.with_suffix('.html'))!r})`."
        )
    return write_whole(file, page(account))


def page(account: Account) -> str:
    """Return the page as text."""
    rules = style()
    digest = base64.b64encode(hashlib.sha256(rules.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'"
    sections = [
        ("Curves", _curves(account)),
        ("Metrics", _metrics(account)),
        ("Where the time went", _timings(account)),
        ("Checkpoints", _checkpoints(account)),
        ("Notices", _notices(account.notices)),
        ("Configuration", _pairs(flat(account.config))),
        ("Environment", _pairs(account.environment)),
    ]
    body = "\n".join(
        f'<section id="{title.split()[0].lower()}"><h2>{title}</h2>\n{content}</section>'
        for title, content in sections
        if content
    )
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="referrer" content="no-referrer">
<title>{escape(account.name)}</title>
<link rel="icon" href="data:,">
<style>{rules}</style>
</head>
<body>
<header><h1>{escape(account.name)}</h1>
{_summary(account)}</header>
<main>
{body}
</main>
</body>
</html>
"""


def _summary(account: Account) -> str:
    known = {
        "ended by": account.stop_reason or "not known: it goes on, or was killed",
        "epochs": _count(account.num_epochs),
        "steps": _count(account.num_steps),
        "samples": _count(account.num_samples),
        "time": None if account.elapsed_s is None else format_seconds(account.elapsed_s),
        "written": account.written_at or None,
    }
    rows = (
        f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>"
        for name, value in known.items()
        if value is not None
    )
    return f"<dl>{''.join(rows)}</dl>"


def _count(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"


def _curves(account: Account) -> str:
    ends = some_epochs(epoch_ends(account.history, account.num_epochs), 8)
    labels: dict[float, str] = {step: str(epoch) for epoch, step in ends.items()}
    if ends:
        first = min(ends)
        labels[ends[first]] = f"epoch {first}"
    figures = [_figure(panel, labels) for panel in panels_of(account.history)]
    return f'<div class="curves">{"".join(figures)}</div>' if figures else ""


def _figure(panel: Panel, marks: Mapping[float, str]) -> str:
    names = panel.names
    curves = [
        Curve(
            label=line.name,
            points=list(zip(line.steps, line.values, strict=True)),
            color=names.index(line.name),
            is_faint=line.is_faint,
        )
        for line in panel.lines
    ]
    legend = "".join(
        f'<li><svg viewBox="0 0 12 12" aria-hidden="true"><rect class="c{i % NUM_COLORS}" '
        f'width="12" height="12" rx="2"/></svg>{escape(name)}</li>'
        for i, name in enumerate(names)
    )
    drawn = chart(curves, title=panel.title, marks=marks, is_log=panel.is_log)
    caption = escape(panel.title) + (" (logarithmic)" if panel.is_log else "")
    return (
        f'<figure><figcaption>{caption}</figcaption>\n{drawn}\n<ul class="legend">{legend}</ul>'
        "</figure>\n"
    )


def _metrics(account: Account) -> str:
    rows = []
    for name in account.history:
        series = account.history[name]
        low, high = _extremes(series)
        kind = "epoch means" if name in account.history.epoch else "single steps"
        rows.append([f"<code>{escape(name)}</code>", _number(series.values[-1]), low, high, kind])
    return _table(["series", "#last", "#lowest", "#highest", "of"], rows)


def _extremes(series: Series) -> tuple[str, str]:
    points = [p for p in zip(series.values, series.steps, strict=True) if math.isfinite(p[0])]
    if not points:
        return "", ""
    low, high = min(points), max(points, key=lambda point: (point[0], -point[1]))
    return tuple(f"{_number(value)} at step {step:,}" for value, step in (low, high))  # pyright: ignore


def _timings(account: Account) -> str:
    total = account.call_s or sum(account.timings.values())
    if not account.timings or not total > 0.0:
        return ""
    spent = {**account.timings, "other": max(total - sum(account.timings.values()), 0.0)}
    rows = [
        [escape(name), format_seconds(seconds), f"{seconds / total:.1%}", _bar(seconds / total)]
        for name, seconds in sorted(named_phases(spent).items(), key=lambda item: -item[1])
        if seconds > 0.0
    ]
    return _table(["phase", "#time", "#share", ""], rows)


def _bar(share: float) -> str:
    width = 100 * min(max(share, 0.0), 1.0)
    return (
        '<svg viewBox="0 0 100 8" preserveAspectRatio="none" aria-hidden="true">'
        f'<rect width="{width:.1f}" height="8"/></svg>'
    )


def _checkpoints(account: Account) -> str:
    best = _best_of(account)
    rows = [
        [
            f"{saved.step:,}" + (" (best)" if saved.path in best else ""),
            "" if saved.score is None else _number(saved.score),
            "" if saved.size_bytes is None else format_bytes(saved.size_bytes),
            f"<code>{escape(saved.path)}</code>",
        ]
        for saved in account.checkpoints
    ]
    return _table(["#step", "#score", "#size", "directory"], rows)


def _best_of(account: Account) -> list[str]:
    """Return the directory of the best checkpoint as the list of checkpoints names it."""
    paths = [saved.path for saved in account.checkpoints]
    if account.best_checkpoint is None:
        return []
    best = os.path.abspath(account.best_checkpoint)
    # The run may have been moved since, but its directories are still called the same.
    return [path for path in paths if os.path.abspath(path) == best] or [
        path for path in paths if os.path.basename(path) == os.path.basename(best)
    ]


def _notices(notices: Iterable[str]) -> str:
    items = "".join(f"<li>{escape(notice)}</li>" for notice in notices)
    return f"<ul>{items}</ul>" if items else ""


def _pairs(values: Mapping[str, Any]) -> str:
    rows = [
        [f"<code>{escape(name)}</code>", f"<code>{escape(_shown(value))}</code>"]
        for name, value in values.items()
    ]
    return _table(["name", "value"], rows)


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(_shown(item) for item in value)
    return str(value)


def _number(value: float) -> str:
    return f'<data value="{value!r}">{value:.6g}</data>'


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table of cells that are HTML; a `#` makes a column one of numbers."""
    if not rows:
        return ""
    looks = [' class="n"' if name.startswith("#") else "" for name in header]
    head = "".join(f"<th{c}>{n.lstrip('#')}</th>" for c, n in zip(looks, header, strict=True))
    body = "\n".join(
        "<tr>"
        + "".join(f"<td{c}>{cell}</td>" for c, cell in zip(looks, row, strict=True))
        + "</tr>"
        for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>\n{body}</table></div>\n'
