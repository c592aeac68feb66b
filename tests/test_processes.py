"""The starting of several processes, which tests of distribution rely on."""

from __future__ import annotations

import time

import pytest

from processes import launch


def test_one_that_fails_ends_those_that_wait_for_it():
    """Its own error is shown, and nobody waits for the time to be over."""
    began = time.monotonic()
    with pytest.raises(AssertionError, match="(?s)exit status -9.*exit status 1: no such teacher"):
        wait_or_fail = "time.sleep(600) if os.environ['RANK'] == '0' else sys.exit('no such teacher')"
        launch(["-c", f"import os, sys, time; {wait_or_fail}"], timeout=300)
    assert time.monotonic() - began < 200


def test_none_outlives_the_time():
    with pytest.raises(AssertionError, match="(?s)within 0.5 s.*exit status -9.*exit status -9"):
        launch(["-c", "import time; time.sleep(600)"], timeout=0.5)
