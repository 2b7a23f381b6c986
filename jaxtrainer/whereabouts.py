"""Where a thread of the trainer is, by its stack: asked from outside, at no cost to the loop.

Names a phase as `Timings` does, and the hook or function of the user's. May import `callback`.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from types import FrameType

from jaxtrainer.callback import HOOKS

_WAITS = {
    "_value",
    "__array__",
    "block_until_ready",
    "device_get",
    "_single_device_array_to_np_array",
}
_SAVING = ("jaxtrainer.store", "jaxtrainer.checkpoint", "jaxtrainer.rundir", "jaxtrainer.remote")
_RESTORING = ("restore_state", "restore_items")
_CALLS_HOOKS = ("jaxtrainer.hooks", "jaxtrainer.isolation", "jaxtrainer.session")


@dataclass(frozen=True)
class Place:
    """Where a thread is.

    Attributes:
        phase: `"data"`, `"device"`, `"compile"`, `"restore"`, `"save"`, `"hook"`, `"host"` for the
            trainer's own work, or `"outside"` of it.
        detail: The hook, as `Class.name`.
    """

    phase: str
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.phase} {self.detail}".strip()


def place_of(ident: int) -> Place:
    """Return where the thread with that identifier is."""
    frames = sys._current_frames()
    frame, is_in_jax, is_inside = frames.get(ident), False, False
    while frame is not None:
        module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_name
        is_inside = is_inside or module.startswith("jaxtrainer.")
        found = _place(module, name, frame, frames)
        if found is not None:
            return found
        if module.startswith("jaxtrainer.loops"):
            return Place("device" if is_in_jax else "host")
        is_in_jax = is_in_jax or module.startswith("jax.")
        frame = frame.f_back
    return Place("host" if is_inside else "outside")


def _place(module: str, name: str, frame: FrameType, frames: dict[int, FrameType]) -> Place | None:
    if module.startswith("jax.") and name in _WAITS:
        return Place("device")
    if (module, name) == ("jaxtrainer.feed", "dispatched"):
        return Place("device")
    if module == "jaxtrainer.waiting" and name in ("take", "call"):
        return Place("device" if _feeds_wait_for_devices(frames) else "data")
    if name in _RESTORING and module.startswith("jaxtrainer."):
        return Place("restore")
    if module in _SAVING:
        return Place("save")
    if name in HOOKS and module not in _CALLS_HOOKS:
        return Place("hook", _without_scope(frame.f_code.co_qualname))
    if (module, name) == ("jaxtrainer.session", "compile"):
        return Place("compile")
    return None


def _without_scope(name: str) -> str:
    return name.rpartition("<locals>.")[2]


def _feeds_wait_for_devices(frames: dict[int, FrameType]) -> bool:
    feeds = [t for t in threading.enumerate() if t.name.startswith("jaxtrainer-") and _is_feed(t)]
    return any("_on_device" in _names(frames.get(feed.ident or 0)) for feed in feeds)


def _is_feed(thread: threading.Thread) -> bool:
    return thread.name.endswith("-feed")


def _names(frame: FrameType | None) -> set[str]:
    names = set()
    while frame is not None:
        names.add(frame.f_code.co_name)
        frame = frame.f_back
    return names
