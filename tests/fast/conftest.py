"""What the tests of the fast path share."""

from __future__ import annotations

import pytest

from minibert.fast import panels


@pytest.fixture(scope="session")
def kernels(tmp_path_factory):
    """Our own kernels, compiled in this test run, once; once loaded they stay. Gives the cache that holds them."""
    directory = tmp_path_factory.mktemp("kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINIBERT_CACHE", str(directory))
        obstacle = panels.make()
    assert not obstacle, obstacle
    return directory
