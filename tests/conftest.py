"""What several test files share."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_root() -> Path:
    """Where downloads are kept: the real corpus is fetched once, and used by every test run."""
    return Path(__file__).resolve().parent.parent / "data"
