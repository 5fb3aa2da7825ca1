"""What the collector of garbage passes over, and that it is given back."""

import gc
import subprocess
import sys

import pytest

from hedgerow import collector


@pytest.fixture
def nobody():
    """Nothing is passed over before, nor after."""
    gc.unfreeze()
    yield
    gc.unfreeze()


def test_what_is_there_is_passed_over_meanwhile(nobody):
    there = [[] for _ in range(20_000)]
    with collector.passing_over():
        assert collector.is_passing_over()
        made = []
        tracked = gc.get_objects()
        assert any(each is made for each in tracked)
        assert not any(each is there for each in tracked)
    assert not collector.is_passing_over()


def test_it_is_given_back_after_an_error(nobody):
    with pytest.raises(ZeroDivisionError), collector.passing_over():
        raise ZeroDivisionError
    assert not collector.is_passing_over()


def test_what_somebody_else_has_passed_over_stays_so(nobody):
    gc.freeze()
    before = gc.get_freeze_count()
    with collector.passing_over():
        pass
    assert gc.get_freeze_count() == before


def test_a_command_has_the_collector_look_seldom_and_not_at_its_end():
    program = """
import atexit, gc
from hedgerow import collector

collector.look_seldom()
there = [[] for _ in range(20_000)]
print(gc.get_threshold()[0], collector.is_passing_over())
atexit._run_exitfuncs()
print(collector.is_passing_over())
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.split() == ["10000", "False", "True"], done.stderr
