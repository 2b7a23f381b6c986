"""`display`: texts, meters, frames and displays, compared exactly at fixed width."""

from __future__ import annotations

import io
import logging
import sys
import threading

import pytest
from rich.console import Console

from jaxtrainer.display.frames import Bar, Frame, Status
from jaxtrainer.display.live import Display, LiveDisplay, PlainDisplay, Ticker, can_draw_in_place
from jaxtrainer.display.meter import Meter
from jaxtrainer.display.report import phase_table
from jaxtrainer.display.text import fit, format_clock, format_metrics, format_seconds, format_value

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"
METRICS = "loss=0.1234 accuracy=0.9000 val/loss=0.2000 val/accuracy=0.9500"


class ManualClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock() -> ManualClock:
    return ManualClock()


def terminal(width: int = 80, file: io.StringIO | None = None) -> Console:
    """Return a console on a terminal without colours."""
    file = Terminal() if file is None else file
    return Console(file=file, width=width, height=20, force_terminal=True, color_system=None)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def drawn(frame: Frame, width: int) -> str:
    console = terminal(width)
    console.print(frame)
    return text_of(console)


def a_bar(done: int = 120, total: int | None = 235, metrics: str = METRICS) -> Bar:
    return Bar(label="Epoch 2/5", done=done, total=total, elapsed_s=6.2, rate=19.4, metrics=metrics)


def a_live(console: Console, *frames: Frame, notices: list[str] | None = None) -> LiveDisplay:
    shown = notices if notices is not None else []
    return LiveDisplay(console, frames=lambda: frames, notices=lambda: shown, tick_s=0)


def test_value_has_the_same_width_for_usual_losses():
    assert [len(format_value(v)) for v in (0.01, 0.123456, 0.99999, 1.0, 9.9999)] == [6] * 5


@pytest.mark.parametrize(
    ("value", "text"),
    [(9.99996, "10.00"), (9999.4, "9999"), (9999.6, "1.00e+04"), (-0.5, "-0.5000")],
)
def test_value_changes_form_where_digits_would_be_lost(value: float, text: str):
    assert format_value(value) == text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_value_shows_what_is_not_finite(value: float):
    assert format_value(value) == str(value)


def test_times_round_up_into_the_next_unit():
    assert format_clock(59.6) == "1:00"
    assert format_clock(3599.6) == "1:00:00"
    assert format_seconds(59.96) == "1:00"
    assert format_seconds(9.996) == "10.0 s"


def test_metrics_stay_aligned_once_a_value_was_wider():
    widths: dict[str, int] = {}
    format_metrics({"train/loss": 12345.0, "val/loss": 1.0}, widths)
    line = format_metrics({"train/loss": 0.5, "val/loss": 1.0}, widths)
    assert line == "loss=0.5000   val/loss=1.0000"


def test_fit_counts_cells_of_wide_characters():
    assert fit("損失=0.1234", 6) == "損失=…"


def test_fit_in_no_room_is_nothing():
    assert fit("loss", 0) == ""


def test_meter_leaves_a_pause_out_of_the_rate(clock: ManualClock):
    meter = Meter(clock)
    clock.now += 2.0
    meter.pause()
    meter.pause()
    clock.now += 7.0
    assert meter.mean_rate(10) == 5.0
    meter.resume()
    meter.resume()
    clock.now += 2.0
    assert meter.mean_rate(20) == 5.0
    assert meter.elapsed_s == 11.0


def test_meter_of_a_resumed_epoch_counts_from_there(clock: ManualClock):
    meter = Meter(clock, first=100)
    assert meter.rate(100) is None
    assert meter.mean_rate(100) is None
    clock.now += 4.0
    assert meter.rate(108) == 2.0


def test_meter_rate_forgets_what_is_older_than_the_window(clock: ManualClock):
    meter = Meter(clock, window_s=10.0)
    for count in range(1, 21):
        clock.now += 0.1
        meter.rate(count)
    for count in range(21, 41):
        clock.now += 1.0
        meter.rate(count)
    assert meter.rate(40) == pytest.approx(1.0)
    assert meter.mean_rate(40) == pytest.approx(40 / 22)


def test_meter_keeps_the_rate_of_steps_longer_than_the_window(clock: ManualClock):
    meter = Meter(clock, window_s=10.0)
    for count in (1, 2, 3):
        clock.now += 60.0
        meter.rate(count)
    clock.now += 50.0
    assert meter.rate(3) == pytest.approx(1 / 60)


def test_bar_at_80_columns_cuts_the_metrics():
    assert drawn(a_bar(), 80) == (
        "Epoch 2/5 ━━━━     120/235 0:06<0:06 19.4 steps/s loss=0.1234 accuracy=0.9000…\n"
    )


def test_bar_at_200_columns_shows_everything():
    assert drawn(a_bar(), 200) == (
        f"Epoch 2/5 {'━' * 20}{' ' * 20} 120/235 0:06<0:06 19.4 steps/s {METRICS}\n"
    )


def test_bar_without_a_total_pulses_and_has_no_remaining_time():
    line = drawn(a_bar(total=None, metrics=""), 60)
    assert line.startswith("Epoch 2/5 ━")
    assert line.endswith(" 120 0:06 19.4 steps/s\n")
    assert drawn(a_bar(total=None, metrics=""), 60) == line


def test_bar_beyond_its_total_is_full():
    line = drawn(a_bar(done=300, metrics=""), 60)
    assert line == f"Epoch 2/5 {'━' * 17} 300/235 0:06<0:00 19.4 steps/s\n"


@pytest.mark.parametrize("width", range(4, 120, 5))
def test_bar_never_reaches_the_edge(width: int):
    lines = drawn(a_bar(metrics="損失=0.1234 " * 9), width).splitlines()
    assert len(lines) == 1
    assert Console().measure(lines[0]).maximum <= width - 2


def test_bar_that_has_not_begun_knows_no_time():
    bar = Bar(label="Epoch 1/5", done=0, total=235, elapsed_s=0.0)
    assert bar.plain() == "Epoch 1/5    0/235  0:00<-:--  -- steps/s"
    assert bar.remaining_s is None


def test_bar_summary_is_for_an_ended_count():
    summary = a_bar(done=235, metrics="loss=0.1234").summary()
    assert summary == "Epoch 2/5  235/235  6.20 s  19.4 steps/s  loss=0.1234"


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (53, "Epoch 2/5  235/235  6.20 s  19.4 steps/s  loss=0.1234"),
        (52, "Epoch 2/5  6.20 s  19.4 steps/s  loss=0.1234"),
        (43, "Epoch 2/5  6.20 s  loss=0.1234"),
        (9, "Epoch 2/5  6.20 s  loss=0.1234"),
    ],
)
def test_bar_summary_makes_room_for_the_metrics(width: int, line: str):
    assert a_bar(done=235, metrics="loss=0.1234").summary(width) == line


def test_bar_summary_keeps_the_count_of_an_unfinished_epoch():
    summary = a_bar(done=120, metrics="loss=0.1234").summary(40)
    assert summary == "Epoch 2/5  120/235  6.20 s  loss=0.1234"


def test_status_shows_its_time():
    status = Status(label="compiling train step", elapsed_s=1.24)
    assert drawn(status, 80) == "compiling train step ... 1.2 s\n"
    assert drawn(status, 12) == "compiling \n"


def test_live_display_leaves_nothing_but_what_was_printed():
    console = terminal()
    display = a_live(console, Status(label="compiling", elapsed_s=0.5))
    display.start()
    display.print("a line that stays")
    display.stop()
    text = text_of(console)
    assert text.startswith(f"{HIDE}compiling ... 0.5 s")
    assert "\r\x1b[2Ka line that stays\ncompiling ... 0.5 s" in text
    assert text.endswith(f"\n{SHOW}\r\x1b[1A\x1b[2K")


def test_live_display_erases_every_frame_it_drew():
    console = terminal()
    display = a_live(console, a_bar(), Status(label="compiling", elapsed_s=0.5))
    display.start()
    display.refresh()
    display.stop()
    redraws = text_of(console).count("\r\x1b[2K\x1b[1A\x1b[2KEpoch 2/5")
    assert redraws == 2


def test_live_display_cuts_a_line_that_is_too_long():
    console = terminal(20)
    display = a_live(console)
    display.start()
    display.print("Epoch 1/5  235/235  loss=0.1234")
    display.stop()
    assert "Epoch 1/5  235/235 …\n" in text_of(console)


def test_live_display_without_leave_prints_nothing():
    console = terminal()
    display = LiveDisplay(console, frames=lambda: [], notices=lambda: [], tick_s=0, leave=False)
    display.start()
    display.print("Epoch 1/5")
    display.stop()
    assert "Epoch" not in text_of(console)


def test_live_display_gives_the_output_back_after_an_error(monkeypatch: pytest.MonkeyPatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    display = a_live(terminal(file=screen))
    display.start()
    assert sys.stdout is not screen
    print("from the program")
    monkeypatch.setattr(display, "print_notices", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        display.stop()
    assert sys.stdout is screen
    assert "from the program\n" in screen.getvalue()
    assert SHOW in screen.getvalue()


def test_live_display_prints_an_unfinished_line_of_the_program(monkeypatch: pytest.MonkeyPatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stdout", screen)
    display = a_live(terminal(file=screen))
    display.start()
    print("no newline", end="")
    display.stop()
    assert "no newline\n" in screen.getvalue()


def test_live_display_leaves_stderr_in_its_file(monkeypatch: pytest.MonkeyPatch):
    errors = io.StringIO()
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setattr(sys, "stderr", errors)
    display = a_live(terminal())
    display.start()
    print("to the file", file=sys.stderr)
    display.stop()
    assert errors.getvalue() == "to the file\n"


def test_live_display_shows_log_records_above(monkeypatch: pytest.MonkeyPatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    handler = logging.StreamHandler()
    monkeypatch.setattr(logging.root, "handlers", [handler])
    display = a_live(terminal(file=screen), Status(label="compiling", elapsed_s=0.5))
    display.start()
    logging.warning("a record")
    display.stop()
    assert "\r\x1b[2Ka record\ncompiling" in screen.getvalue()
    assert handler.stream is screen


def test_display_prints_each_notice_once():
    console, notices = terminal(), ["first"]
    display = a_live(console, notices=notices)
    display.start()
    notices.append("second")
    display.tick()
    display.tick()
    display.stop()
    assert text_of(console).count("first\n") == 1
    assert text_of(console).count("second\n") == 1


def a_log(clock: ManualClock, file: io.StringIO, tick_s: float = 0.0) -> Display:
    bar = a_bar(metrics="loss=0.1234")
    return PlainDisplay(
        Console(file=file, width=20),
        frames=lambda: [a_bar(metrics=""), bar],
        notices=lambda: ["mind the gap between the train and the platform"],
        tick_s=tick_s,
        clock=clock,
        line_interval_s=10.0,
    )


def test_plain_display_prints_a_line_after_an_interval_without_one(clock: ManualClock):
    log = io.StringIO()
    display = a_log(clock, log)
    for seconds in (9.0, 1.0, 9.0, 1.0):
        clock.now += seconds
        display.tick()
    line = "Epoch 2/5  120/235  0:06<0:06  19.4 steps/s  loss=0.1234\n"
    assert log.getvalue() == f"mind the gap between the train and the platform\n{line}{line}"


def test_plain_display_waits_an_interval_after_any_line(clock: ManualClock):
    log = io.StringIO()
    display = a_log(clock, log)
    clock.now += 9.0
    display.print("Epoch 1/5")
    clock.now += 9.0
    display.tick()
    assert log.getvalue().splitlines()[0] == "Epoch 1/5"
    assert "Epoch 2/5" not in log.getvalue()


def test_ticker_calls_until_stopped():
    called = threading.Event()
    ticker = Ticker(called.set, 0.001)
    ticker.start()
    assert called.wait(timeout=60)
    ticker.stop()
    assert "jaxtrainer-display" not in [t.name for t in threading.enumerate()]


def test_frames_are_drawn_in_place_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    assert can_draw_in_place(Console(file=Terminal()))
    assert not can_draw_in_place(Console(file=io.StringIO()))
    monkeypatch.setenv("TERM", "dumb")
    assert not can_draw_in_place(Console(file=Terminal()))


def test_console_of_a_notebook_is_no_terminal():
    assert not can_draw_in_place(Console(file=io.StringIO(), force_jupyter=True))


def test_phase_table_explains_the_whole():
    console = Console(file=io.StringIO(), width=60)
    console.print(phase_table({"compilation": 3.0, "validation": 0.0, "dispatch": 1.0}, 8.0))
    assert [line.split() for line in text_of(console).splitlines() if "%" in line] == [
        ["compilation", "3.00", "s", "37.5%"],
        ["dispatch", "1.00", "s", "12.5%"],
        ["other", "4.00", "s", "50.0%"],
    ]
