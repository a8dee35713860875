"""Every private name of Pyro that the package uses is still there, and no module uses one behind the back of this list."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal

from pyro_kd.utils.pyro_internals import forget_waiting_moments
from tests.support import private_names
from tests.support.private_attributes import OF_PYRO

NAMES = {
    "pyro.poutine.runtime._PYRO_STACK": "the active handlers",
    "pyro.poutine.messenger._bound_partial": "to copy a program inside a handler",
    "pyro.poutine.messenger.Messenger._process_message": "to let a plate expand a site's distribution, and to skip parameters",
    "pyro.poutine.messenger.Messenger._postprocess_message": "to skip parameters in handlers of sample sites",
    "pyro.poutine.subsample_messenger._Subsample": "to tell whether a plate draws its rows",
    "pyro.infer.autoguide.AutoGuide._setup_prototype": "to leave an autoguide's set-up out of the shared noise",
    "pyro.distributions.SineBivariateVonMises._bfind": "the proposal of its sampler",
}


@pytest.mark.parametrize("path", NAMES)
def test_the_private_name_exists(path):
    assert private_names.exists(path), f"{path} is gone: pyro_kd uses it for {NAMES[path]}."


@pytest.mark.parametrize("name", OF_PYRO)
def test_the_private_attribute_exists(name):
    make, purpose = OF_PYRO[name]
    owner = make()
    assert hasattr(owner, name), f"{type(owner).__name__}.{name} is gone: pyro_kd uses it for {purpose}."


def test_pyro_deterministic_marks_its_site():
    site = poutine.trace(lambda: pyro.deterministic("a", torch.tensor(1.0))).get_trace().nodes["a"]
    assert site["infer"].get("_deterministic"), "pyro.deterministic is no longer marked by infer['_deterministic']."


def test_autoguides_name_their_auxiliary_sites():
    guide = AutoNormal(lambda: pyro.sample("z", dist.Normal(0.0, 1.0)))
    guide()
    names = poutine.trace(guide).get_trace().stochastic_nodes
    assert "z_unconstrained" in names, "AutoNormal no longer samples 'z_unconstrained' for a latent 'z'."


def test_the_moments_that_a_loaded_optimiser_waits_to_use_are_forgotten():
    optim = pyro.optim.Adam({"lr": 0.1})
    x = pyro.param("x", torch.tensor(1.0))
    x.grad = torch.tensor(1.0)
    optim([pyro.get_param_store()._params["x"]])
    other = pyro.optim.Adam({"lr": 0.3})
    other.set_state(optim.get_state())
    forget_waiting_moments(other)
    (state,) = other._state_waiting_to_be_consumed.values()
    assert state["state"] == {}
    assert state["param_groups"][0]["lr"] == 0.1


def test_private_names_are_imported_in_one_module():
    assert private_names.paths_in(private_names.PACKAGE / "utils" / "pyro_internals.py") <= NAMES.keys()
    for file in private_names.files():
        if file.name != "pyro_internals.py":
            found = {path for path in private_names.paths_in(file) if path.startswith("pyro.")}
            assert not found, f"{file}: import {found} through pyro_kd.utils.pyro_internals"
