"""Fixtures for tests of data."""

import pytest
from makes import MAKES, Make


@pytest.fixture(scope="session")
def makes() -> dict[str, Make]:
    """All tokenizers by name."""
    return {name: maker() for name, maker in MAKES.items()}


@pytest.fixture(scope="session", params=MAKES)
def make(request: pytest.FixtureRequest, makes: dict[str, Make]) -> Make:
    """One tokenizer after the other."""
    return makes[request.param]
