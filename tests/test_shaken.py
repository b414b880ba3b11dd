"""The command that runs tests on a store that is slow at random."""

import pytest

from tests import shaken


def test_that_it_runs_tests(capfd: pytest.CaptureFixture[str]) -> None:
    """It hands on what it is not told about, and what pytest says."""
    which = "tests/bus/test_waiting_elsewhere.py::test_handled_when_it_is_paused_here"
    assert shaken.main(["--seed", "3", "--most", "0.002", "-q", "-n", "0", "-p", "no:cacheprovider", which]) == 0
    assert "2 passed" in capfd.readouterr().out
    assert shaken.main(["-n", "0", "-p", "no:cacheprovider", "no_such_file.py"]) == pytest.ExitCode.USAGE_ERROR
