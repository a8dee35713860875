"""The Helmholtz machine."""

import pytest

from models.helmholtz import HelmholtzMachine


@pytest.mark.parametrize(("width", "expected"), [(8, 186), (2, 54)])
def test_helmholtz_has_the_papers_sizes(width, expected):
    assert sum(p.numel() for p in HelmholtzMachine(width).generative.parameters()) == expected
