"""Traces of random programs, and when two of them are the same."""

import pyro
import torch
from pyro import poutine

__all__ = ["assert_same", "equal", "fresh", "get_trace", "sample_sites"]


def fresh(seed=0):
    """What the fixture of conftest.py does for each test, here for each program."""
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)


def get_trace(recipe, model):
    trace = poutine.trace(model).get_trace()
    if all(kind.density for kind in recipe.kinds):
        trace.compute_log_prob()
    return trace


def sample_sites(trace):
    return {name: site for name, site in trace.nodes.items() if site["type"] == "sample"}


def equal(first, second):
    if not isinstance(first, torch.Tensor) or not isinstance(second, torch.Tensor):
        return type(first) is type(second) and first == second
    same_kind = first.dtype == second.dtype and first.shape == second.shape
    return same_kind and torch.equal(first.nan_to_num(7.0), second.nan_to_num(7.0))


def assert_same(first, second):
    """Two traces hold the same sites with the same values, distributions, plates, scales, masks and log densities."""
    assert list(first.nodes) == list(second.nodes)
    others = sample_sites(second)
    assert list(sample_sites(first)) == list(others)
    for name, site in sample_sites(first).items():
        other = others[name]
        for entry in ("value", "scale", "mask", "log_prob", "log_prob_sum", "is_observed"):
            assert equal(site.get(entry), other.get(entry)), f"{entry} of {name!r}: {site.get(entry)}, {other.get(entry)}"
        assert type(site["fn"]) is type(other["fn"]), name
        for attribute in ("batch_shape", "event_shape", "has_rsample"):
            values = [getattr(s["fn"], attribute, None) for s in (site, other)]
            assert values[0] == values[1], f"{attribute} of {name!r}: {values}"
        assert site["infer"].get("enumerate") == other["infer"].get("enumerate"), name
        assert [tuple(frame) for frame in site["cond_indep_stack"]] == [tuple(frame) for frame in other["cond_indep_stack"]]
