"""What the tests of several rooms share."""

import pytest

from fastvid import _native


def levels() -> list[bytes]:
    """Every level this processor can run; generic alone where there is no library."""
    library = _native.load()
    names = (b"generic", b"v2", b"v3", b"v4")
    found = [name for name in names if library is not None and library.fastvid_cpu_use_isa(name) == 0]
    if library is not None:
        library.fastvid_cpu_use_isa(library.fastvid_cpu_best_isa())
    return found or [b"generic"]


@pytest.fixture(params=levels(), ids=bytes.decode)
def level(request):
    library = _native.load()
    library.fastvid_cpu_use_isa(request.param)
    yield request.param
    library.fastvid_cpu_use_isa(library.fastvid_cpu_best_isa())
