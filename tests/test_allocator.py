"""Freed memory goes back where the C library has a word for it, and nothing happens elsewhere."""

from __future__ import annotations

import ctypes

import pytest

from hedgerow import allocator


@pytest.fixture(autouse=True)
def unknown():
    """Have the C library looked at anew, before and after."""
    allocator._malloc_trim.cache_clear()
    yield
    allocator._malloc_trim.cache_clear()


def test_it_asks_the_c_library(monkeypatch):
    asked = []

    class Library:
        @staticmethod
        def malloc_trim(pad):
            asked.append(pad)

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library)
    allocator.give_back()
    assert asked == [0]


@pytest.mark.parametrize("error", [OSError, TypeError, None])
def test_nothing_is_done_where_there_is_no_such_word(error, monkeypatch):
    def library(name):
        if error is not None:
            raise error("there is none")
        return object()

    monkeypatch.setattr(ctypes, "CDLL", library)
    allocator.give_back()
