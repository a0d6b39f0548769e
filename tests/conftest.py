from __future__ import annotations

import pytest
from hypothesis import settings

from tests.layouts import LayoutFactory

# The same examples in every run, and no time limit for one: the machines that run this are shared.
settings.register_profile("neuralink", derandomize=True, deadline=None)
settings.load_profile("neuralink")


@pytest.fixture(scope="session")
def layouts(tmp_path_factory: pytest.TempPathFactory) -> LayoutFactory:
    return LayoutFactory(tmp_path_factory.mktemp("layouts"))
