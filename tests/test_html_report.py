"""The HTML report: one file that asks for nothing, whose numbers are those of the run."""

from __future__ import annotations

import base64
import hashlib
import math
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import jaxtrainer
from jaxtrainer import Callback, FitResult, History
from jaxtrainer.account import Account, Saved, read_account, write_account
from jaxtrainer.callbacks import Checkpoint, Report
from jaxtrainer.commands import add_parsers
from jaxtrainer.display.svg import HEIGHT, WIDTH, Curve, chart, round_ticks, thinned
from jaxtrainer.errors import ConfigError, RunDirError
from jaxtrainer.page import page
from tests import tiny
from tests.commands import call

pytestmark = pytest.mark.usefixtures("compiled_once")

HOSTILE = """</script><script>alert(1)</script><img src=x onerror="a">'&amp;\x00\ud800"""


class Page(HTMLParser):
    """The tags, attributes and texts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "link") and not self.get_starttag_text().endswith("/>"):  # pyright: ignore
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def values(self, tag: str, name: str) -> list[str]:
        return [v for t, n, v in self.attributes if (t, n) == (tag, name)]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run that was resumed, with checkpoints and a report."""
    folder = tmp_path_factory.mktemp("runs") / "mine"

    def callbacks() -> list[Callback]:
        return [Report(folder), Checkpoint(folder, monitor="val/loss", save_top_k=2)]

    loaders = tiny.make_loader(), tiny.make_batches(2)
    tiny.fit(*loaders, callbacks=callbacks(), max_epochs=2)
    tiny.fit(*loaders, callbacks=callbacks(), max_epochs=4, ckpt_path="last")
    return folder


def make_account(**changes: Any) -> Account:
    history = History()
    for step, value in enumerate((0.1 + 0.2, 1 / 3, 1e-7), 1):
        history.add("epoch", {"train/loss": value}, step=step, epoch=step - 1)
    return replace(Account(history=history, num_epochs=3, num_steps=3), **changes)


def test_report_of_a_run_has_all_sections(run_dir: Path):
    text = (run_dir / "report.html").read_text(encoding="utf-8")
    sections = Page(text).values("section", "id")
    assert sections == ["curves", "metrics", "where", "checkpoints", "configuration", "environment"]
    assert "<h1>mine</h1>" in text
    assert "trainer.limits.max_epochs" in text


def test_report_of_a_resumed_run_has_all_of_its_curves(run_dir: Path):
    account = read_account(run_dir)
    assert account.history.epoch["val/loss"].steps == [8, 16, 24, 32]
    assert account.history.step["train/loss"].steps == [4, 8, 12, 16, 20, 24, 28, 32]
    assert (account.num_epochs, account.num_steps, account.stop_reason) == (4, 32, "max_epochs")


def test_report_lists_the_checkpoints_with_their_scores(run_dir: Path):
    account = read_account(run_dir / "step_32")
    losses = account.history.epoch["val/loss"]
    scores = dict(zip(losses.steps, losses.values, strict=True))
    assert len(account.checkpoints) in (2, 3)
    assert {saved.step: saved.score for saved in account.checkpoints}.items() <= scores.items()
    assert all((saved.size_bytes or 0) > 1000 for saved in account.checkpoints)


def test_report_of_a_relative_directory_lists_each_checkpoint_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    saves = Checkpoint("run", monitor="val/loss", save_top_k=2)
    result, _ = tiny.fit(None, tiny.make_batches(2), callbacks=[saves], max_epochs=2)
    paths = [saved.path for saved in result.account().checkpoints]
    assert paths == [str(tmp_path / "run" / f"step_{step}") for step in (8, 16)]
    assert {result.best_checkpoint, result.last_checkpoint} <= {*paths}


@pytest.mark.parametrize("moves", [False, True])
def test_report_marks_the_best_checkpoint_however_the_run_is_named(
    run_dir: Path, tmp_path: Path, moves: bool, monkeypatch: pytest.MonkeyPatch
):
    if moves:
        run_dir = shutil.copytree(run_dir, tmp_path / "elsewhere")
    monkeypatch.chdir(run_dir.parent)
    account = read_account(run_dir.name)
    assert account.best_checkpoint is not None
    marked = re.findall(r"(\d+) \(best\)", page(account))
    assert marked == [Path(account.best_checkpoint).name.removeprefix("step_")]


def test_report_asks_for_nothing_and_runs_nothing(run_dir: Path):
    text = (run_dir / "report.html").read_text(encoding="utf-8")
    found = Page(text)
    assert not found.open
    assert not {"script", "iframe", "object", "img", "form", "base", "a"} & {*found.tags}
    assert not [name for _, name, _ in found.attributes if name.startswith("on") or name == "style"]
    addresses = [v for _, n, v in found.attributes if n in ("href", "src", "action", "xlink:href")]
    assert addresses == ["data:,"]
    assert not re.search(r"https?:|//\w|url\(|@import", text)


def test_report_allows_its_own_style_only():
    text = page(make_account())
    (style,) = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    (policy,) = [v for v in Page(text).values("meta", "content") if "default-src" in v]
    assert policy == f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'"
    assert "prefers-color-scheme: dark" in style


def test_report_escapes_every_text():
    history = History()
    history.add("epoch", {f"train/{HOSTILE}": 1.0}, step=1, epoch=0)
    history.add("epoch", {f"train/{HOSTILE}": 2.0}, step=2, epoch=1)
    account = Account(
        name=HOSTILE,
        history=history,
        stop_reason=HOSTILE,
        timings={HOSTILE: 1.0},
        config={HOSTILE: {HOSTILE: [HOSTILE]}},
        environment={HOSTILE: HOSTILE},
        notices=[HOSTILE],
        written_at=HOSTILE,
        checkpoints=[Saved(step=1, path=HOSTILE)],
    )
    text = page(account)
    plain = page(make_account())
    assert {*Page(text).tags} - {*Page(plain).tags} <= {"ul", "li", "rect"}
    assert "<script" not in text
    assert "<img" not in text
    text.encode("utf-8")


def test_report_has_the_numbers_of_the_history():
    account = make_account()
    series = account.history["train/loss"].values
    numbers = [float(value) for value in Page(page(account)).values("data", "value")]
    assert numbers == [series[-1], min(series), max(series)]


def test_report_draws_each_value_at_its_place():
    points = [(0.0, 1.0), (5.0, math.nan), (10.0, 3.0), (20.0, 2.0)]
    drawn = Page(chart([Curve(label="x", points=points, color=0)], title="x", is_log=False))
    xs = [float(x) for x in drawn.values("circle", "cx")]
    ys = [float(y) for y in drawn.values("circle", "cy")]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.11)  # written with one digit
    assert ys[0] - ys[2] == pytest.approx(ys[2] - ys[1], abs=0.11)
    assert len(drawn.values("polyline", "points")) == 1  # the NaN is a gap
    assert [t for tag, t in drawn.texts if tag == "title"][1] == "x at step 10: 3"


@pytest.mark.parametrize(
    ("values", "is_log"),
    [
        ([0.0], False),
        ([1e300, -1e300], False),
        ([1e-300, 1e300], True),
        ([5.0, 5.0], True),
        ([math.nan, math.inf], False),
        ([-0.0, 5e-324], False),
    ],
)
def test_chart_of_unusual_values_stays_in_its_frame(values: list[float], is_log: bool):
    points = [(float(x), y) for x, y in enumerate(values)]
    drawn = Page(chart([Curve(label="x", points=points, color=0)], title="x", is_log=is_log))
    for name, limit in (("cx", WIDTH), ("cy", HEIGHT)):
        assert all(0 <= float(v) <= limit for v in drawn.values("circle", name))
    assert "nan" not in str(drawn.attributes)


def test_ticks_are_round_and_within():
    assert round_ticks(-0.013, 0.021) == [-0.01, 0.0, 0.01, 0.02]
    assert round_ticks(3.0, 3.0) == [3.0]


def test_thinned_curve_keeps_its_spikes():
    points = [(float(i), 100.0 if i == 77_777 else i % 7.0) for i in range(100_000)]
    kept = thinned(points)
    assert len(kept) <= 1000
    assert (77_777.0, 100.0) in kept
    assert list(kept) == sorted(kept)


def test_result_writes_its_report_without_any_file(tmp_path: Path):
    result, _ = tiny.fit(max_epochs=1)
    path = result.report(tmp_path / "deep" / "a.html")
    found = Page(path.read_text(encoding="utf-8"))
    assert ("h1", "run") in found.texts
    assert str(result.metrics["train/loss"]) in found.values("data", "value")


def test_report_says_what_error_ended_the_run(tmp_path: Path):
    class Bad(Callback):
        def on_train_epoch_end(self, run: Any) -> None:
            raise ValueError("too <hot>")

    with pytest.raises(ValueError, match="too"):
        tiny.fit(max_epochs=2, callbacks=[Report(tmp_path), Bad()])
    assert read_account(tmp_path).stop_reason == "ValueError: too <hot>"
    assert "ValueError: too &lt;hot&gt;" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_report_that_cannot_be_written_ends_no_run(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.warns(RuntimeWarning, match="not critical"):
        result, _ = tiny.fit(max_epochs=1, callbacks=[Report(tmp_path / "file")])
    assert result.stop_reason == "max_epochs"


def test_report_of_fast_dev_run_is_not_written(tmp_path: Path):
    tiny.fit(callbacks=[Report(tmp_path / "run")], fast_dev_run=True)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("dirpath", ["", 3, "gs://bucket/run"])
def test_report_needs_a_directory(dirpath: Any):
    with pytest.raises(ConfigError, match="Report"):
        Report(dirpath)


def test_report_to_a_name_that_is_no_page_is_refused_with_the_call(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"end its name in \.html: `result\.report\('.*x\.html"):
        FitResult.report(_result(), tmp_path / "x.pdf")


def test_command_writes_the_report_of_a_directory(run_dir: Path, tmp_path: Path):
    code, out = call(add_parsers, "report", str(run_dir), "--output", str(tmp_path / "r.html"))
    assert (code, out.strip()) == (0, str(tmp_path / "r.html"))
    assert page(read_account(run_dir)) == (tmp_path / "r.html").read_text(encoding="utf-8")
    assert jaxtrainer.report(run_dir) == run_dir / "report.html"


def test_damaged_record_is_named(tmp_path: Path):
    path = write_account(tmp_path, make_account())
    path.write_text(path.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    with pytest.raises(RunDirError, match=r"run\.json cannot be read as the record of a run"):
        jaxtrainer.report(tmp_path)


def _result() -> FitResult:
    counts: Any = {"num_epochs": 1, "num_steps": 1, "num_samples": 1}
    return FitResult(history=History(), metrics={}, stop_reason="x", elapsed_s=1.0, **counts)
