"""What `test_stores.py` runs in processes of their own: a run in an object store, and looks at it.

Usage: `python -m tests.store_program fit URL EPOCHS CKPT_PATH [KILLED_STEP]`, `... names URL` or
`... damage URL`; the last line says a digest or names.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxtrainer.callbacks import Checkpoint
from jaxtrainer.places import place
from jaxtrainer.remote import RemotePath
from tests import tiny


def kill_in_save_of(step: int) -> None:
    """Die when all of a step is in the store, but for the marker that says so."""
    upload = RemotePath.upload

    def uploading(self: RemotePath, folder: Path, names: Sequence[str]) -> None:
        upload(self, folder, names)
        if self.name == f"step_{step}":
            os.kill(os.getpid(), signal.SIGKILL)

    RemotePath.upload = uploading


def fit(url: str, epochs: str, ckpt_path: str, killed_step: str = "-1") -> str:
    """Train, keeping the best and the last, and return the digest of the state."""
    kill_in_save_of(int(killed_step))
    saver = Checkpoint(url, monitor="train/loss", save_top_k=1)
    _, state = tiny.fit(callbacks=[saver], max_epochs=int(epochs), ckpt_path=ckpt_path or None)
    content = [name.encode() + array.tobytes() for name, array in sorted(state.items())]
    return hashlib.blake2b(b"".join(content), digest_size=16).hexdigest()


def names(url: str) -> str:
    """Return what the run directory has."""
    return json.dumps(sorted(path.name for path in place(url).iterdir()))


def damage(url: str) -> str:
    """Flip bits at the end of the parameters of a step."""
    path: Any = place(url)
    for name in path.files("params/"):
        if "/d/" in name:
            content = (path / name).read_bytes()
            (path / name).write_bytes(content[:-64] + bytes(b ^ 1 for b in content[-64:]))
    return names(url)


if __name__ == "__main__":
    print({"fit": fit, "names": names, "damage": damage}[sys.argv[1]](*sys.argv[2:]))
