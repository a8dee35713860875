r"""Continual learning: new data and old knowledge in one loss, and the baselines that replay samples of an old model.

    new data x      --> ELBO of model and guide                              } weighted by its share r
    old knowledge   --> distillation from the frozen old model (ours, local) } weighted by 1 - r
                    or  ELBO on its samples (CURL)
                    or  ELBO on its samples and KL to the old posterior (LGM)

Old knowledge of each form is an :class:`~pyro_kd.training.Objective`; :func:`continual_objectives` joins it with that of the new
data. No old data is needed: everything old comes from the programs of the old model, which are frozen.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

import torch
from pyro import poutine
from pyro.poutine.util import site_is_subsample
from torch import Tensor

from pyro_kd.divergences import DivergenceFunction, reverse_kl
from pyro_kd.errors import UnknownTargetError, listing, nearest
from pyro_kd.isolation.freezing import freeze
from pyro_kd.isolation.modes import evaluation_mode
from pyro_kd.isolation.programs import require_callable
from pyro_kd.losses import LocalKD
from pyro_kd.losses.targets import TargetMessenger
from pyro_kd.training.batches import require_tuple
from pyro_kd.training.distillation_objective import DistillationObjective
from pyro_kd.training.elbo_objective import ELBOObjective
from pyro_kd.training.objectives import Objective, Program
from pyro_kd.utils.user_code import called

__all__ = ["LifelongELBO", "Replay", "continual_objectives", "generative_replay", "lifelong_replay"]


class Replay:
    """Arguments made from what an old program draws: generative replay for any objective, as its ``arguments=Replay(...)``.

    Args:
        program: the old model. It is frozen here if it is not frozen yet, so that it stays as it is.
        sites: names of the sites whose draws are taken, also where the program observes them.
        arguments: ``f(values, *args)`` of the draws by name, each of its site's ``batch_shape + event_shape``, and of the step's
            arguments returns the arguments of the loss's programs, as a tuple.
        program_arguments: ``f(*args)`` of the step's arguments returns the old program's arguments, as a tuple; None passes them on.

    Example:
        >>> import pyro, pyro.distributions as dist, torch
        >>> from pyro_kd.training import Replay
        >>> def old(rows):
        ...     with pyro.plate("rows", rows):
        ...         pyro.sample("x", dist.Normal(5.0, 0.1))
        >>> replay = Replay(old, ["x"], lambda values, rows: (rows, values["x"]))
        >>> rows, x = replay(3)
        >>> rows, tuple(x.shape)
        (3, (3,))
    """

    def __init__(
        self,
        program: Program,
        sites: Collection[str],
        arguments: Callable[..., tuple[Any, ...]],
        program_arguments: Callable[..., tuple[Any, ...]] | None = None,
    ) -> None:
        require_callable(program, "the program that is replayed")
        self.program = freeze(program)
        self.sites = [sites] if isinstance(sites, str) else list(sites)
        self.arguments = arguments
        self.program_arguments = program_arguments

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        """Draw, without gradients and hidden from Pyro's handlers and parameter store.

        Raises:
            UnknownTargetError: the program has no such site, or one with an ``obs_mask``.
            TypeError: ``program_arguments`` returns no tuple.
        """
        given = args if self.program_arguments is None else self.program_arguments(*args, **kwargs)
        given = require_tuple(given, "Replay(program_arguments=f)", "lambda x: (len(x),)")
        names = {} if self.program_arguments is not None else kwargs
        with evaluation_mode(self.program), torch.no_grad(), poutine.block(), TargetMessenger(self.sites):
            nodes = poutine.trace(self.program).get_trace(*given, **names).nodes
        drawn = [name for name, node in nodes.items() if node["type"] == "sample"]
        sites = [name for name in drawn if not site_is_subsample(nodes[name])]
        for name in self.sites:
            if name not in drawn:
                raise UnknownTargetError(
                    f"{name!r} is not a sample site of the program that is replayed; it has {listing(sites)}.{nearest(name, sites)}"
                )
            if f"{name}_unobserved" in drawn:
                raise UnknownTargetError(
                    f"{name!r} has an obs_mask: it holds data where that is true. Replay {name + '_unobserved'!r}, or a program "
                    "without data."
                )
        values: dict[str, Any] = {name: torch.as_tensor(nodes[name]["value"]).detach() for name in self.sites}
        return called(self.arguments, "arguments", "f(values, *args, **kwargs)", values, *args, **kwargs)

    def to(self, device: Any) -> "Replay":
        """Move the old program to a device; :class:`~pyro_kd.training.Trainer` does so."""
        self.program.to(device)
        return self


class LifelongELBO:
    r"""The ELBO of replayed data and a penalty for leaving the old posterior: LGM's loss.

    .. math:: -\mathrm{ELBO}(x) + w \sum_i KL\big(q(z_i | z_{<i}, x) \,\|\, q_{old}(z_i | z_{<i}, x)\big),
              \quad x \sim p_{old}, \; z \sim q_{old}(z | x)

    Use it as ``ELBOObjective(LifelongELBO(...), model, guide, arguments=Replay(...))``, so that both terms see the same draws. With
    one latent layer the sum is KL(new || old). With several it compares the conditionals along the old posterior's draws, which is
    not the KL of the joint laws.

    Args:
        elbo: Trace_ELBO, TraceMeanField_ELBO, TraceEnum_ELBO, or any ELBO with ``differentiable_loss``.
        old_guide: the guide as it was. It is frozen here if it is not frozen yet.
        weight: w, the weight of the consistency of the posteriors.
        divergence: between the old posterior (p) and the new one (q) at each latent; the default is that of the equation.

    Raises:
        TypeError: the ELBO has no ``differentiable_loss``.

    References:
        Ramapuram, Gregorova and Kalousis, Lifelong Generative Modeling, Neurocomputing 404, 2020 (arXiv 1705.09847).
    """

    anneals = False  # annealing would scale the latents of the new guide, but not those of the old guide

    def __init__(
        self, elbo: Any, old_guide: Program, *, weight: float = 1.0, divergence: DivergenceFunction = reverse_kl
    ) -> None:
        require_callable(old_guide, "the old guide")
        if not callable(getattr(elbo, "differentiable_loss", None)):
            raise TypeError(
                f"{type(elbo).__name__} has no differentiable_loss to which the consistency of the posteriors could be added: use "
                "Trace_ELBO(), TraceMeanField_ELBO() or TraceEnum_ELBO()"
            )
        self.elbo = elbo
        self.old_guide = freeze(old_guide)
        self.weight = weight
        self.consistency = LocalKD(lambda site: True, divergence=divergence)

    def differentiable_loss(self, model: Program, guide: Program, *args: Any, **kwargs: Any) -> Tensor:
        """The loss as a scalar tensor, differentiable with respect to the parameters of model and guide."""
        loss: Tensor = self.elbo.differentiable_loss(model, guide, *args, **kwargs)
        return loss + self.weight * self.consistency.differentiable_loss(guide, self.old_guide, *args, **kwargs)

    __call__ = differentiable_loss  # the form in which Pyro's SVI takes a loss

    def to(self, device: Any) -> "LifelongELBO":
        """Move the old guide to a device; :class:`~pyro_kd.training.Trainer` does so."""
        self.old_guide.to(device)
        return self


def generative_replay(
    elbo: Any, model: Program, guide: Program, replay: Callable[..., tuple[Any, ...]], *, weight: float = 1.0
) -> ELBOObjective:
    """Old knowledge as the ELBO on samples of the old model: CURL's loss.

    Args:
        elbo: one of Pyro's ELBOs.
        model, guide: the programs that continue to learn.
        replay: a :class:`Replay` of the frozen old model, or a different function that makes the arguments of model and guide.
        weight: factor of the objective, such as one over the number of rows.

    References:
        Rao, Visin, Rusu, Teh, Pascanu and Hadsell, Continual Unsupervised Representation Learning, NeurIPS 2019.
    """
    return ELBOObjective(elbo, model, guide, weight=weight, arguments=replay)


def lifelong_replay(
    elbo: Any,
    model: Program,
    guide: Program,
    old_guide: Program,
    replay: Callable[..., tuple[Any, ...]],
    *,
    weight: float = 1.0,
    consistency: float = 1.0,
    divergence: DivergenceFunction = reverse_kl,
) -> ELBOObjective:
    """Old knowledge as the ELBO on samples of the old model and the KL to its posterior: LGM's loss, see :class:`LifelongELBO`.

    Args:
        elbo: Trace_ELBO, TraceMeanField_ELBO, TraceEnum_ELBO, or any ELBO with ``differentiable_loss``.
        model, guide: the programs that continue to learn.
        old_guide: the guide as it was. It is frozen here if it is not frozen yet.
        replay: as for :func:`generative_replay`.
        weight: factor of the objective.
        consistency: weight of the divergence between the posteriors.
        divergence: between the posteriors, see :class:`LifelongELBO`. Where posteriors are very narrow, as in deep models, the
            default is huge after the first steps, and :func:`~pyro_kd.divergences.wasserstein2` is not.
    """
    loss = LifelongELBO(elbo, old_guide, weight=consistency, divergence=divergence)
    return ELBOObjective(loss, model, guide, weight=weight, arguments=replay)


def continual_objectives(
    new: Objective, old: Objective | Mapping[str, Objective], *, new_share: float
) -> dict[str, Objective]:
    """Join the loss of new data, with weight r, and of old knowledge, with weight 1 - r, for :class:`~pyro_kd.training.Trainer`.

    Args:
        new: such as the ELBO of the new data.
        old: such as ``DistillationObjective(SurrogateKD(["x"]), vae.model, freeze(old.model))``, :func:`generative_replay` or
            :func:`lifelong_replay`; or several by name, each with the whole weight 1 - r.
        new_share: r, between 0 and 1: the share of all data that is new.

    Returns:
        The objectives by name, ``"new"`` and ``"old"`` (or the names in ``old``), each with its own weight times r or 1 - r.

    The student begins as the old model, so an old objective that leaves teacher forcing open has no local steps here: they look at
    each conditional by itself, and the new data drive the student away from what the old model generates meanwhile
    (docs/performance.md). ``local_steps=`` of the objective says otherwise.

    Raises:
        ValueError: ``new_share`` is not between 0 and 1, ``old`` is empty, or one of the old objectives is called ``"new"``.

    Example:
        Each batch is new data x; the old model is asked for as many rows::

            objectives = continual_objectives(
                ELBOObjective(Trace_ELBO(), vae.model, vae.guide, arguments=lambda x: (len(x), 1, x)),
                DistillationObjective(SurrogateKD(["x"]), vae.model, freeze(old.model), arguments=lambda x: (len(x), 0)),
                new_share=0.5,
            )
            Trainer(objectives, lambda params: torch.optim.Adam(params, lr=1e-3)).fit(batches=loader, steps=5000)

    References:
        Chen et al., A Unified Knowledge Distillation Framework for Deep Directed Graphical Models, CVPR 2023, Section 3.6.
    """
    if not 0 <= new_share <= 1:
        raise ValueError(f"new_share is the share of all data that is new, between 0 and 1, not {new_share}")
    parts = {"old": old} if isinstance(old, Objective) else dict(old)
    if not parts:
        raise ValueError("old is empty: pass at least one objective, or train on the new one alone")
    if "new" in parts:
        raise ValueError("one of the old objectives is called 'new': give it a different name")
    joined = {"new": _scaled(new, new_share)}
    return joined | {name: _scaled(_without_local_steps(part), 1 - new_share) for name, part in parts.items()}


def _without_local_steps(objective: Objective) -> Objective:
    if isinstance(objective, DistillationObjective) and objective.local_steps is None:
        return replace(objective, local_steps=0)
    return objective


def _scaled(objective: Objective, factor: float) -> Objective:
    weight = objective.weight
    if callable(weight):

        def scaled(step: int) -> float:
            return factor * float(weight(step))

        scaled.switches_at = getattr(weight, "switches_at", frozenset())  # type: ignore[attr-defined]
        return replace(objective, weight=scaled)
    return replace(objective, weight=factor * weight)
