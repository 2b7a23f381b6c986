"""The style of the HTML report, for light and dark. Imports nothing but the number of colours."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtrainer.display.svg import NUM_COLORS

_LIGHT = ("#1f6fc4", "#c65f0b", "#1e8450", "#b93046", "#7045c4", "#7c5f33", "#b34588", "#3f7172")
_DARK = ("#6aaef5", "#f2a154", "#5cc98d", "#f07f90", "#b39af0", "#c9ab78", "#ee9bca", "#8fc1c2")
_STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --text: #1c2024; --soft: #5f6870;
  --rule: #dde1e5; --card: #f7f8f9; LIGHT }
@media (prefers-color-scheme: dark) { :root { --back: #15181c; --text: #e4e7ea; --soft: #9aa4ad;
  --rule: #30363d; --card: #1c2026; DARK } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1240px; padding: 24px; background: var(--back);
  color: var(--text); font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 24px; margin: 0 0 4px; overflow-wrap: anywhere }
h2 { font-size: 18px; margin: 36px 0 12px }
section { display: inline-block; vertical-align: top;
  padding-right: min(64px, 5%); max-width: 100% }
#curves { display: block; padding-right: 0 }
dl { display: flex; flex-wrap: wrap; gap: 8px 32px; margin: 12px 0 }
dt { color: var(--soft); font-size: 13px } dd { margin: 0; font-size: 18px }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(460px, 100%), 1fr));
  gap: 16px }
figure { margin: 0; padding: 12px; background: var(--card); border: 1px solid var(--rule);
  border-radius: 6px; min-width: 0 }
figcaption { font-weight: 600; overflow-wrap: anywhere }
svg { display: block; width: 100%; height: auto }
svg text { font-size: 12px; fill: var(--soft) }
.grid { stroke: var(--rule) } .mark { stroke: var(--soft); stroke-dasharray: 2 4; opacity: .6 }
polyline { fill: none; stroke-width: 2; stroke-linejoin: round }
.dense { stroke-width: 1 }
.faint { stroke-width: 1; opacity: .55 }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 6px 0 0; padding: 0;
  list-style: none; font-size: 13px; overflow-wrap: anywhere }
.legend svg { display: inline-block; width: 12px; height: 12px; margin-right: 6px;
  vertical-align: -1px }
.scroll { overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: 4px 24px 4px 0; border-bottom: 1px solid var(--rule);
  vertical-align: top; overflow-wrap: break-word; max-width: 420px }
th { color: var(--soft); font-weight: 500; font-size: 13px }
td.n, th.n { text-align: right; white-space: nowrap }
td svg { width: 160px; height: 10px; margin-top: 6px } td rect { fill: var(--c0) }
code { font: 13px/1.5 ui-monospace, monospace }
@media (max-width: 560px) { svg text { font-size: 18px } body { padding: 16px } }
COLORS
@media print { body { max-width: none } figure { break-inside: avoid } }
"""


def style() -> str:
    """Return the style sheet."""

    def colors(values: Sequence[str]) -> str:
        return " ".join(f"--c{number}: {value};" for number, value in enumerate(values))

    lines = "\n".join(
        f".c{n} {{ stroke: var(--c{n}) }} circle.c{n}, rect.c{n} {{ fill: var(--c{n}) }}"
        for n in range(NUM_COLORS)
    )
    rules = _STYLE.replace("LIGHT", colors(_LIGHT)).replace("DARK", colors(_DARK))
    return rules.replace("COLORS", lines)
