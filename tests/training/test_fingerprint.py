"""Descriptions of objects: equal in every process, and for every object that is used alike."""

import json
import os
import subprocess
import sys

import pyro.distributions as dist
import torch

from pyro_kd.training.fingerprint import Fingerprint, differences

DESCRIBE = """
import json, functools, sys
sys.path[:0] = {path!r}
from tests.support.described_objects import objects_to_describe
from pyro_kd.training.fingerprint import Fingerprint
fingerprint = Fingerprint()
for name, value in objects_to_describe().items():
    fingerprint.add(name, value)
print(json.dumps(fingerprint.found))
"""


def test_a_fingerprint_is_equal_in_every_process():
    found = []
    for seed in ("1", "2"):
        code = DESCRIBE.format(path=[os.getcwd()])
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONWARNINGS": "ignore"}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
        found.append(json.loads(done.stdout))
    assert differences(*found) == []
    assert " at 0x" not in json.dumps(found[0])
    assert len(found[0]) < 200


def test_lazily_computed_attributes_are_no_difference():
    """Lazily computed attributes of distributions."""
    one, two = (dist.Categorical(torch.ones(3)) for _ in range(2))
    two.logits.sum()
    found = []
    for value in (one, two):
        fingerprint = Fingerprint()
        fingerprint.add("law", value)
        found.append(fingerprint.found)
    assert differences(*found) == []


def test_code_is_compared_only_within_one_version_of_python():
    then = {"python": "3.11", "f()": "#1", "x": "1"}
    assert differences(then, then | {"f()": "#2"}) == ["f: its code has changed"]
    assert differences(then, {"python": "3.12", "f()": "#2", "x": "1"}) == []
    assert differences(then, {"python": "3.12", "f()": "#2", "x": "2"}) == ["x: was 1, is 2"]
