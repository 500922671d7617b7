"""What is shown while something takes long: a line that moves on a terminal, plain lines in a log."""

import io
import logging
import re
import sys
import threading

import pytest
from rich.console import Console

from megatron_vila import busy as module
from megatron_vila.busy import CurrentStdout, busy, counted
from megatron_vila.streams import flush_streams, tell


@pytest.fixture
def printed(monkeypatch):
    """An output that is a log file; the value waits until a line for which ``found`` holds is printed, and returns all."""
    monkeypatch.setattr(module, "INTERVAL_S", 0.01)
    monkeypatch.setenv("COLUMNS", "20")
    lines, new = io.StringIO(), threading.Event()

    class Log(io.StringIO):
        def write(self, text):
            lines.write(text)
            new.set()
            return len(text)

    def wait(found):
        while not found(lines.getvalue()):
            assert new.wait(60), lines.getvalue()
            new.clear()
        return lines.getvalue()

    return Console(file=Log()), wait


def test_a_log_says_now_and_then_what_takes_long_and_how_far_it_is(printed):
    console, wait = printed
    with busy("reading a long list of files", console) as shown:
        wait(lambda text: "reading a long list of files ..." in text)
        shown("writing")
        wait(lambda text: "writing ..." in text)
    with counted("videos of the set", 3, console) as count:
        count()
        wait(lambda text: "videos of the set: 1 of 3" in text)
        count()
        count()
    text = wait(lambda text: "videos of the set: 3 of 3" in text)
    assert all(re.fullmatch(r"[a-z ]+(\.\.\.|: \d of 3) \(\d+ s\)", line) for line in text.splitlines())


def test_a_short_block_leaves_no_line_in_a_log():
    log = io.StringIO()
    with busy("short", Console(file=log)):
        pass
    assert log.getvalue() == ""


def test_a_terminal_shows_a_line_that_moves_and_what_is_printed_stands_above_it():
    terminal = io.StringIO()
    console = Console(file=terminal, force_terminal=True, width=60)
    with busy("imports", console) as shown:
        shown("the model")
        console.print("a message")
    text = terminal.getvalue()
    assert "imports" in text and "the model" in text and "a message" in text
    assert text.endswith("\x1b[2K")  # the line is gone
    with counted("videos", 2, console) as count:
        count()
        count()
    assert "2/2" in terminal.getvalue()


def test_log_records_go_where_standard_output_leads_at_the_time(monkeypatch):
    handler = CurrentStdout()
    outputs = io.StringIO(), io.StringIO()
    for output in outputs:
        monkeypatch.setattr(sys, "stdout", output)
        handler.handle(logging.makeLogRecord({"msg": f"to {outputs.index(output)}"}))
    assert [output.getvalue() for output in outputs] == ["to 0\n", "to 1\n"]


def test_an_output_that_takes_no_more_brings_no_traceback_for_each_line(monkeypatch):
    errors = io.StringIO()
    monkeypatch.setattr(sys, "stderr", errors)
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(full, write_through=True))
        CurrentStdout().handle(logging.makeLogRecord({"msg": "lost"}))
    assert errors.getvalue() == ""


def test_streams_that_were_closed_before_the_process_began_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    flush_streams()
    tell("nobody reads this")
