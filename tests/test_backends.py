"""Every backend meets every problem of the conformance suite, and the table in ``cases.py`` leaves none out."""

from __future__ import annotations

import pytest

from hyperopt_implicit.testing import BackendConformance

from .cases import CASES


class TestBackends(BackendConformance):
    """The suite, once for each row."""

    @pytest.fixture(autouse=True, params=CASES, ids=lambda case: case.name)
    def _case(self, request: pytest.FixtureRequest) -> None:
        self.backend = request.param.backend
        self.accuracy = request.param.accuracy
