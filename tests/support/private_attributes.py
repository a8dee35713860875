"""The private attributes of Pyro's and torch's objects that the package reads: name -> (an object that has it, what it is used for)."""

import pyro
import pyro.distributions as dist
import pyro.infer
import torch
from pyro.infer.reparam import stable as stable_reparam
from pyro.nn import PyroModule
from torch import distributions as td

__all__ = ["OF_PYRO", "OF_TORCH"]


def _low_rank():
    return td.LowRankMultivariateNormal(torch.zeros(2), torch.ones(2, 1), torch.ones(2))


OF_PYRO = {
    "_params": (pyro.get_param_store, "the unconstrained tensors of a parameter store"),
    "_param_to_name": (pyro.get_param_store, "to give a frozen program a parameter store of its own"),
    "_constraints": (pyro.get_param_store, "to give a frozen program a parameter store of its own"),
    "_pyro_name": (lambda: PyroModule[torch.nn.Linear](1, 1), "the names of a module's parameters in the store"),
    "_pyro_params": (lambda: PyroModule(), "the constraints of a module's parameters"),
    "_state_waiting_to_be_consumed": (lambda: pyro.optim.Adam({}), "moments that a loaded optimiser has not used yet"),
    "_get_optim_args": (lambda: pyro.optim.Adam({}), "the options of one parameter"),
    "_guess_max_plate_nesting": (pyro.infer.Trace_ELBO, "the depth of plates, before the first call"),
    "_mask": (lambda: dist.Normal(0.0, 1.0).mask(torch.tensor(True)), "the mask of a distribution"),
    "_gamma": (lambda: dist.GammaPoisson(1.0, 1.0), "the rate of a gamma Poisson, whose draw has a derivative"),
    "_beta": (lambda: dist.BetaBinomial(1.0, 1.0, 2), "the probability of a beta binomial, whose draw has a derivative"),
    "_standard_stable": (lambda: dist.stable, "to export stable laws, whose map has a branch"),
    "_unsafe_standard_stable": (lambda: dist.stable, "to export stable laws"),
    "_safe_shift": (lambda: stable_reparam, "to export stable laws that are reparametrised"),
    "_unsafe_shift": (lambda: stable_reparam, "to export stable laws that are reparametrised"),
    "_unquantize": (
        lambda: dist.RelaxedBernoulliStraightThrough(torch.tensor(1.0), torch.tensor(0.5)).rsample(),
        "the relaxed value of a straight-through draw, which has the density",
    ),
}

OF_TORCH = {
    "_buffers": (lambda: torch.nn.Linear(1, 1), "the buffers of a module"),
    "_modules": (lambda: torch.nn.Linear(1, 1), "the parts of a module"),
    "_parameters": (lambda: torch.nn.Linear(1, 1), "the parameters of a module"),
    "_non_persistent_buffers_set": (lambda: torch.nn.Linear(1, 1), "the buffers that a checkpoint leaves out"),
    "_backward_hooks": (lambda: torch.zeros(1), "to keep the hooks of parameters out of a graph"),
    "_version": (lambda: torch.zeros(1), "to notice a change in place"),
    "_cdata": (lambda: torch.zeros(1).untyped_storage(), "to tell whether two tensors share memory"),
    "_overloadname": (lambda: torch.ops.aten.rand.default, "the names of overloads"),
    "_qualified_op_name": (lambda: torch.ops.aten.rand, "to find the overload of a random operation"),
    "_can_decompose": (lambda: torch.ops.aten.linear.default, "which operations consist of others"),
    "_schema": (lambda: torch.ops.aten.native_dropout.default, "whether a dropout draws"),
    "_native_batch_norm_legit": (lambda: torch.ops.aten, "batch norm that declares its writes"),
    "_native_batch_norm_legit_no_training": (lambda: torch.ops.aten, "batch norm that does not write"),
    "_param": (lambda: td.Bernoulli(torch.tensor(0.5)), "whether probabilities or logits were given"),
    "_num_events": (lambda: td.Categorical(torch.ones(2)), "the number of categories"),
    "_categorical": (lambda: td.OneHotCategorical(torch.ones(2)), "the law over indices"),
    "_dirichlet": (lambda: td.Beta(1.0, 1.0), "the sampler of a Beta"),
    "_concentration": (lambda: td.VonMises(0.0, 1.0), "the sampler of a VonMises"),
    "_loc": (lambda: td.VonMises(0.0, 1.0), "the sampler of a VonMises"),
    "_proposal_r": (lambda: td.VonMises(0.0, 1.0), "the sampler of a VonMises"),
    "_unbroadcasted_scale_tril": (lambda: td.MultivariateNormal(torch.zeros(2), torch.eye(2)), "the KL between Gaussians"),
    "_unbroadcasted_cov_diag": (_low_rank, "the KL between Gaussians"),
    "_unbroadcasted_cov_factor": (_low_rank, "the KL between Gaussians"),
}
