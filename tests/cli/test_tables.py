"""What is printed can be read anywhere: narrow encodings, closed pipes, no terminal."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from epmoe.cli import tables

SHOW = (
    "from epmoe.cli import tables; "
    "tables.show('t [b]', ('', '>n'), [('\\u2588 \\u00b5 [x]', '7')] * {})"
)


def shown(lines, **env):
    run = [sys.executable, "-c", SHOW.format(lines)]
    return subprocess.run(run, capture_output=True, env=os.environ | env, check=False, timeout=60)


def test_brackets_are_text_and_a_pipe_gets_no_colours():
    done = shown(1)
    assert done.returncode == 0
    assert "t [b]" in done.stdout.decode()
    assert "[x]" in done.stdout.decode()
    assert b"\x1b" not in done.stdout


def test_an_ascii_terminal_gets_ascii():
    done = shown(1, PYTHONIOENCODING="ascii", PYTHONUTF8="0", LC_ALL="C")
    assert done.returncode == 0
    assert "# ? [x]" in done.stdout.decode("ascii")


def test_a_reader_who_has_seen_enough_is_no_failure():
    run = f'{sys.executable} -c "{SHOW.format(20000)}" | head -1; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", run], capture_output=True, check=False, timeout=60)
    assert done.stdout.decode().split() == ["t", "[b]", "0"]
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (5 << 40, "5.0 TiB"),
        (1 << 60, "1048576.0 TiB"),
    ],
)
def test_sizes(nbytes, text):
    assert tables.size(nbytes) == text


def test_a_log_gets_ten_lines_and_json_none(capsys):
    for silent, lines in ((False, 10), (True, 0)):
        with tables.Steps("round", 1000, silent=silent) as steps:
            for done in range(0, 1200, 7):
                steps.reach(done, "0 wrong")
        assert len(capsys.readouterr().err.splitlines()) == lines
