from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("campaign")
    group.addoption("--mutations", type=int, default=0, help="run the long mutation campaign with so many mutations")
    group.addoption("--mutation-seed", type=int, default=1, help="seed of the long campaign")
