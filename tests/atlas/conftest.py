"""What the tests of the atlas share."""

from __future__ import annotations

import pytest

from tests.helpers.planted import Planted, plant


@pytest.fixture(scope="session")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Planted:
    return plant(tmp_path_factory.mktemp("planted"))
