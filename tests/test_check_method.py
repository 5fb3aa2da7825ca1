"""What every method is tested with passes for hedgerow's own, and finds what is wrong with others."""

from __future__ import annotations

import pytest
from support.configurations import METHOD_OPTIONS, MORE_OPTIONS, method_of

from hedgerow.methods import METHODS
from hedgerow.testing import check_method


@pytest.mark.parametrize("name", METHOD_OPTIONS | MORE_OPTIONS)
def test_every_configuration_keeps_its_promises(name):
    options = method_of(name)
    check_method(METHODS[options["name"]].model_validate(options))
