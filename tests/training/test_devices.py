"""Devices that do not exist."""

import re

import pytest

from pyro_kd import Distiller, errors
from tests.support.losses import SurrogateKD
from tests.support.training_programs import gaussian, mean, sgd


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "nonsense:0", 3.5])
def test_a_missing_device_is_an_error(device):
    with pytest.raises(errors.MissingDeviceError, match=re.escape(f"device={device!r} is not there") + ".*There is 'cpu'"):
        Distiller(mean, gaussian(3.0), sgd, SurrogateKD(["x"]), device=device)
