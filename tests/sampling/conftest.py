"""The backends that sampling has so far."""

import pytest

from kd_kernels.sampling.driver import IMPLEMENTATIONS


@pytest.fixture(params=list(IMPLEMENTATIONS))
def backend(request: pytest.FixtureRequest) -> str:
    return request.param
