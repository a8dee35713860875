"""Devices that do not exist."""

import re

import pytest
import torch

from pyro_kd import Distiller, errors
from pyro_kd.training.devices import device_of_process
from tests.support.losses import SurrogateKD
from tests.support.training_programs import gaussian, mean, sgd


def test_cuda_is_the_gpu_of_the_process_under_torchrun(monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "test", "WORLD_SIZE": "2", "LOCAL_RANK": "7"}.items():
        monkeypatch.setenv(name, value)
    assert device_of_process("cuda") == device_of_process(torch.device("cuda")) == "cuda:7"
    assert [device_of_process(device) for device in ("cuda:1", "cpu", None)] == ["cuda:1", "cpu", None]
    with pytest.raises(errors.MissingDeviceError, match="device='cuda:7' is not there"):
        Distiller(mean, gaussian(3.0), sgd, SurrogateKD(["x"]), device="cuda")


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "nonsense:0", 3.5])
def test_a_missing_device_is_an_error(device):
    with pytest.raises(errors.MissingDeviceError, match=re.escape(f"device={device!r} is not there") + ".*There is 'cpu'"):
        Distiller(mean, gaussian(3.0), sgd, SurrogateKD(["x"]), device=device)
