"""The picture of a terminal: what was on the screen, and nothing that a page would fetch."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).parents[1]
SCREEN = "compiled \x1b[33mtrain\x1b[0m step\nEpoch 1/5 <best>\n\n\n"


def text_of(svg: str) -> str:
    words = [node.text for node in ElementTree.fromstring(svg).iter() if node.tag.endswith("text")]
    return "".join(word or "" for word in words).replace("\xa0", " ")


def test_picture_shows_the_screen_and_asks_for_nothing():
    svg = runpy.run_path(str(ROOT / ".ci" / "picture.py"))["picture_of"](SCREEN, "make mnist")
    assert "$ make mnist" in text_of(svg)
    assert "compiled train step" in text_of(svg)
    assert "Epoch 1/5 <best>" in text_of(svg)
    assert "#ff" in svg or "#fd" in svg  # the colour of the terminal's yellow
    assert {*re.findall(r"https?://[^\s\"']+", svg)} == {"http://www.w3.org/2000/svg"}
    assert "url(" not in svg.replace("url(#", "")


def test_picture_of_the_readme_is_one_of_these():
    svg = (ROOT / "docs" / "pictures" / "mnist_mlp.svg").read_text(encoding="utf-8")
    assert "$ make mnist" in text_of(svg)
    assert "test accuracy: 0.9655" in text_of(svg)
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "")
