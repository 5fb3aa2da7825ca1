"""Testing: what every method of hedgerow's is tested with, for anybody's."""

from hedgerow.testing.checks import check_method

__all__ = ["check_method"]
