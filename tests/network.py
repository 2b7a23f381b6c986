"""Two hosts on one machine: network namespaces, joined by a pair of virtual interfaces.

It takes root and `ip`; each has a host name of its own, by which gloo finds the other.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from jaxtrainer.distributed import ADDRESS, COUNT, INDEX

PREFIX = "jt"
ADDRESSES = ("10.79.0.1", "10.79.0.2")


def is_possible() -> bool:
    """Whether namespaces can be made here."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    made = subprocess.run(["ip", "netns", "add", "jtprobe"], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", "jtprobe"], capture_output=True, check=False)
    return made.returncode == 0


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


class Hosts:
    """The two namespaces; use it in a `with`."""

    def __init__(self) -> None:
        self.names = [f"{PREFIX}{os.getpid()}{side}" for side in "ab"]

    def __enter__(self) -> Hosts:
        links = [f"v{name}"[:15] for name in self.names]
        self.links = links
        ip("link", "add", links[0], "type", "veth", "peer", "name", links[1])
        for name, link, address in zip(self.names, links, ADDRESSES, strict=True):
            ip("netns", "add", name)
            ip("link", "set", link, "netns", name)
            ip("-n", name, "addr", "add", f"{address}/24", "dev", link)
            ip("-n", name, "link", "set", link, "up")
            ip("-n", name, "link", "set", "lo", "up")
            folder = Path("/etc/netns") / name
            folder.mkdir(parents=True)
            hosts = [f"{a} {n}\n" for a, n in zip(ADDRESSES, self.names, strict=True)]
            (folder / "hosts").write_text("127.0.0.1 localhost\n" + "".join(hosts))
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            ip("netns", "del", name)
            shutil.rmtree(Path("/etc/netns") / name, ignore_errors=True)

    def cut(self) -> None:
        """Part the hosts: what is sent is lost, and nobody is told."""
        ip("-n", self.names[1], "link", "set", self.links[1], "down")

    def join(self) -> None:
        """Let them reach each other again."""
        ip("-n", self.names[1], "link", "set", self.links[1], "up")

    def start(self, *program: str, **env: str) -> list[subprocess.Popen[str]]:
        """Start a program on each host, as the launcher would; stderr is kept."""
        started, python = [], [sys.executable, "-m", "jaxtrainer.launched", "-m"]
        for index, name in enumerate(self.names):
            enter = ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c"]
            own = {ADDRESS: f"{ADDRESSES[0]}:12399", COUNT: "2", INDEX: str(index)}
            process = subprocess.Popen(
                [*enter, f'hostname {name}; exec "$@"', "sh", *python, *program],
                env={**env, **own},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            started.append(process)
        return started
