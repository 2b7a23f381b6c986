"""Tables or JSON, and what they were measured on. Imports JAX on first use only."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(kw_only=True)
class Report:
    """Prints tables as they come, or one JSON object at the end."""

    name: str
    as_json: bool = False
    tables: list[dict[str, Any]] = field(default_factory=list)

    def add(self, title: str, rows: Sequence[Mapping[str, Any]], note: str = "") -> None:
        self.tables.append({"title": title, "rows": list(rows), "note": note})
        if self.as_json or not rows:
            return
        table = Table()
        for column in rows[0]:
            table.add_column(column, justify="left" if column == next(iter(rows[0])) else "right")
        for row in rows:
            table.add_row(*(_cell(value) for value in row.values()))
        console = Console(width=120)
        console.print(title, style="bold")
        console.print(table)
        console.print(note + "\n" if note else "")

    def finish(self) -> None:
        facts = machine()
        if self.as_json:
            print(json.dumps({"script": self.name, "machine": facts, "tables": self.tables}))
        else:
            Console(width=120).print("  ".join(f"{k} {v}" for k, v in facts.items()), style="dim")


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def machine() -> dict[str, str]:
    import jax

    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
    versions = {name: metadata.version(name) for name in names}
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    where = {"devices": devices, "cores": str(cores), "system": platform.platform(terse=True)}
    return {"python": platform.python_version(), **versions, **where}
