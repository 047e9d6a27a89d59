"""Progress: rates and time left; a dry run's numbers in words."""

from __future__ import annotations

import logging

from pretrainkit.progress import Progress, in_words


def test_the_line_says_share_rates_and_time_left():
    now = [0.0]
    progress = Progress(total_bytes=1000, done_bytes=200, units=10, done_units=2, clock=lambda: now[0])
    now[0] = 4.0
    progress.add(planned_bytes=200, text_bytes=2_000_000, tokens=400_000)
    assert progress.line() == " 40.0%  unit 3 of 10  100,000 tokens/s  0.5 MB/s  12 s left"


def test_a_log_gets_a_line_every_ten_seconds(caplog):
    caplog.set_level(logging.INFO)
    now = [0.0]
    progress = Progress(total_bytes=100, done_bytes=0, units=100, done_units=0, clock=lambda: now[0])
    for second in range(1, 31):
        now[0] = float(second)
        progress.add(1, 1, 1)
    progress.close()
    assert [record.message.split("%")[0].strip() for record in caplog.records] == ["10.0", "20.0", "30.0"]


def test_durations_are_said_as_people_say_them():
    assert [in_words(s) for s in (0.4, 59, 61, 3599, 3661, 360_000)] == [
        "0 s",
        "59 s",
        "1 min 1 s",
        "59 min 59 s",
        "1 h 1 min",
        "100 h 0 min",
    ]
