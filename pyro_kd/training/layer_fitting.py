"""A student network whose layers are fitted to its teacher's, one after the other, by least squares: a start for distillation.

    the teacher draws once                     its layers' outputs, at the units that the student has
    for each layer: the student runs on the teacher's draws    -->  the layer's inputs  -->  its weights, by a linear system

Knows two programs and their networks, and no losses.
"""

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from pyro_kd.errors import WeightSelectionError
from pyro_kd.isolation.modes import evaluation_mode
from pyro_kd.isolation.programs import require_callable
from pyro_kd.noise.handlers import record_noise, replay_noise
from pyro_kd.noise.statements import is_bookkeeping
from pyro_kd.training.linear_layers import LinearLayer, linear_layers
from pyro_kd.training.weight_selection import Units, check_networks, select_weights, units_of
from pyro_kd.utils.randomness import RandomState

__all__ = ["fit_layers"]

_SWEEPS_OF_RECURRENT = 3


def fit_layers(
    student_net: nn.Module,
    teacher_net: nn.Module,
    student: Callable[..., Any],
    teacher: Callable[..., Any],
    *args: Any,
    offset: float = 0.0,
    units: Units | None = None,
    strict: bool = True,
    ridge: float = 0.01,
    sweeps: int | None = None,
    **kwargs: Any,
) -> dict[str, float]:
    r"""Give a smaller network some units of a larger one, and fit its layers to do what these units do, as a start for distillation.

    The units are those of :func:`~pyro_kd.training.select_weights`, which comes first. Each of them then has fewer inputs than in
    the teacher. So the weights W of each layer are fitted, in the order in which the layers run. On draws of the teacher, which the
    student is given at all sites, the sums of the layer shall be those of the same units in the teacher:

    .. math:: \min_W \sum_r \| y_r - W x_r \|^2 + \lambda \sum_j \| W_j - W_{0j} \|^2 \sum_r x_{rj}^2,

    where y are these sums, x the inputs that the layer has in the student, whose earlier layers are fitted already, and W_0 the
    weights so far. That takes no gradient: one run of the teacher, and one of the student for each layer.

    Fitted are :class:`~torch.nn.Linear`, :class:`~torch.nn.Conv1d` and :class:`~torch.nn.Conv2d` (without groups, padded by
    zeros, by a number), and :class:`~torch.nn.LSTMCell`, where the teacher has such a layer of the same name. All else stays as
    selected: other layers, frozen parameters, and weights that several modules share. All rows count, also those behind a mask.

    Args:
        student_net: the network to be trained. It is changed in place; on an error, not at all.
        teacher_net: the network behind the teacher, with sizes at least as large. It is only read.
        student: the program that runs ``student_net``.
        teacher: the program that runs ``teacher_net`` itself, such as ``vae.model``; ``freeze(vae.model)`` has a network of its own.
        args, kwargs: of both programs. Rows matter: take a thousand for small perceptrons, and a batch for images.
        offset, units, strict: which units, as for :func:`~pyro_kd.training.select_weights`.
        ridge: lambda, how much the weights are held. Take more, such as 0.1, for a recurrent network, whose errors come back to it.
        sweeps: how often all layers are fitted. None: once; three times if a layer runs several times in a call, as in a recurrent
            network, whose first layers depend on the last ones.

    Returns:
        By layer, the share of the squares of its sums that is not explained: 0 is perfect, and a large one says which layer is too
        narrow. Of several offsets take the one with the smallest total.

    Raises:
        WeightSelectionError: as for :func:`~pyro_kd.training.select_weights`; no layer can be fitted; a program does not run its
            network, or the two run a layer differently often or on different numbers of rows; a value is not finite.
        ValueError: ``ridge`` or ``sweeps`` is out of range.

    Source: layer-wise reconstruction, as in He, Zhang and Sun, Channel Pruning for Accelerating Very Deep Neural Networks, ICCV 2017,
    section 3.1; here on the teacher's own draws, without data.

    Example:
        >>> import pyro, pyro.distributions as dist
        >>> from torch import nn
        >>> from pyro_kd.training import fit_layers
        >>> pyro.set_rng_seed(0)
        >>> large, small = (nn.Sequential(nn.Linear(1, width), nn.Tanh(), nn.Linear(width, 1)) for width in (32, 8))
        >>> def program(net):
        ...     def model(rows):
        ...         with pyro.plate("rows", rows):
        ...             x = pyro.sample("x", dist.Normal(0.0, 1.0))
        ...             pyro.sample("y", dist.Normal(net(x.unsqueeze(-1)).squeeze(-1), 0.1))
        ...     return model
        >>> shares = fit_layers(small, large, program(small), program(large), 1000)
        >>> shares["2"] < 0.01
        True
    """
    if not ridge > 0:
        raise ValueError(f"ridge must be above 0, not {ridge}: a layer may have inputs that are always 0")
    if sweeps is not None and (isinstance(sweeps, bool) or not isinstance(sweeps, int) or sweeps < 1):
        raise ValueError(f"sweeps must be a whole number of at least 1, not {sweeps!r}")
    check_networks(student_net, teacher_net)
    require_callable(student, "the student (third argument)")
    require_callable(teacher, "the teacher (fourth argument)")
    tensors = itertools.chain(student_net.parameters(), student_net.buffers())
    before = {tensor: tensor.detach().clone() for tensor in tensors if not is_lazy(tensor)}
    try:
        select_weights(student_net, teacher_net, offset=offset, units=units, strict=strict)
        layers = _layers_of_both(student_net, teacher_net, units_of(offset, units))
        with evaluation_mode(student, teacher):
            return _fit(layers, student, teacher, args, kwargs, ridge, sweeps)
    except BaseException:
        with torch.no_grad():
            for tensor, value in before.items():
                tensor.copy_(value)
        raise


class _Pair:
    """A layer of the student, with its counterpart.

    Attributes:
        name: of both.
        own, theirs: the layers.
        chosen: which of the teacher's units the student has.
        sums: the teacher's sums there, for each time that the layer has run; shape (rows, units).
    """

    def __init__(self, name: str, own: LinearLayer, theirs: LinearLayer, chosen: Tensor | None) -> None:
        self.name, self.own, self.theirs, self.chosen = name, own, theirs, chosen
        self.sums: list[Tensor] = []


def _layers_of_both(student_net: nn.Module, teacher_net: nn.Module, choose: Callable[..., Tensor | None]) -> list[_Pair]:
    """The layers to fit: those of both networks whose weights are trained, and serve no other module."""
    theirs, of_teacher = linear_layers(teacher_net), set(teacher_net.parameters())
    uses = Counter(
        tensor for module in student_net.modules() for tensor in module._parameters.values() if tensor is not None
    )
    pairs = []
    for name, own in linear_layers(student_net).items():
        other = theirs.get(name)
        if other is None or other.kind is not own.kind or own.num_units > other.num_units:
            continue
        params = own.module.parameters(recurse=False)
        if all(tensor.requires_grad and uses[tensor] == 1 and tensor not in of_teacher for tensor in params):
            chosen = choose(f"{name}.{own.unit_weight}".lstrip("."), other.num_units, own.num_units)
            pairs.append(_Pair(name, own, other, chosen))
    if not pairs:
        raise WeightSelectionError(
            "the student's network has no layer that can be fitted: a Linear, Conv1d, Conv2d or LSTMCell of a name that the "
            "teacher's network has too, trained, with weights of its own, without groups or parametrisation. Use select_weights alone"
        )
    return pairs


def _fit(
    pairs: list[_Pair],
    student: Callable[..., Any],
    teacher: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    ridge: float,
    sweeps: int | None,
) -> dict[str, float]:
    reached = list[_Pair]()

    def note(pair: _Pair, inputs: Callable[[], Tensor], sums: Tensor) -> None:
        if not pair.sums:
            reached.append(pair)
        # A copy: the program may write to the output of the layer.
        pair.sums.append(sums.clone() if pair.chosen is None else sums.index_select(1, pair.chosen.to(sums.device)))

    before, kept = RandomState.now(), _KeepMessenger()
    with _watching(pairs, lambda pair: pair.theirs, note), record_noise() as noise, kept, _own_store():
        teacher(*args, **kwargs)
    now = RandomState.now()
    if (now.python, now.numpy) != (before.python, before.numpy):
        raise WeightSelectionError(
            "the teacher draws random numbers of Python or NumPy, which the student cannot share: draw with torch, or pass "
            "what is drawn as an argument"
        )
    if not reached:
        raise WeightSelectionError(
            "the teacher runs no layer of its network: pass the program of this very network, such as vae.model. "
            "freeze(vae.model) has a network of its own"
        )

    def run() -> None:
        with replay_noise(noise=noise), _GiveMessenger(kept.values), _own_store():
            student(*args, **kwargs)

    if sweeps is None:
        sweeps = _SWEEPS_OF_RECURRENT if any(len(pair.sums) > 1 for pair in reached) else 1
    shares = dict[str, float]()
    for _, pair in itertools.product(range(sweeps), reached):
        shares[pair.name] = _fit_one(pair, run, ridge)
    return shares


def _fit_one(pair: _Pair, run: Callable[[], None], ridge: float) -> float:
    """Fit one layer, and return the share that is left."""
    wanted, system = iter(pair.sums), _NormalEquations()

    def add(pair: _Pair, inputs: Callable[[], Tensor], sums: Tensor) -> None:
        target = next(wanted, None)
        if not len(sums):
            raise WeightSelectionError(f"the student runs layer {pair.name!r} on no rows, so that it cannot be fitted")
        if target is None or target.shape != sums.shape:
            found = (
                "more often than the teacher" if target is None else f"on {_form(sums)}, in the teacher on {_form(target)}"
            )
            raise WeightSelectionError(
                f"the student runs layer {pair.name!r} {found}, so that its sums have no counterpart. Give both programs the same "
                "rows and the same structure, or use select_weights alone"
            )
        system.add(inputs(), target, sums)

    with _watching([pair], lambda pair: pair.own, add):
        run()
    left = sum(1 for _ in wanted)
    if left:
        raise WeightSelectionError(
            f"the student runs layer {pair.name!r} {len(pair.sums) - left} times, and the teacher {len(pair.sums)} times. Pass the "
            "program of this very network, and the arguments with which both run it equally often; or use select_weights alone"
        )
    change, share = system.solve(ridge)
    if not bool(change.isfinite().all()):
        raise WeightSelectionError(f"the values of layer {pair.name!r} are not all finite, so that it cannot be fitted")
    with torch.no_grad():
        pair.own.add(change)
    return share


def _form(sums: Tensor) -> str:
    return f"{sums.shape[0]} rows of {sums.shape[1]} units"


class _NormalEquations:
    """The linear system of a layer, added up over its runs, in float64."""

    def __init__(self) -> None:
        self._gram: Any = 0.0
        self._moments: Any = 0.0
        self._left: Any = 0.0
        self._square: Any = 0.0

    def add(self, inputs: Tensor, target: Tensor, sums: Tensor) -> None:
        """Add rows.

        Args:
            inputs: of shape (rows, inputs).
            target: what the sums are to be, of shape (rows, units).
            sums: what they are, of the same shape.
        """
        x, y = inputs.double(), target.double()
        residual = y - sums.double()
        self._gram = self._gram + x.mT @ x
        self._moments = self._moments + x.mT @ residual
        self._left = self._left + residual.square().sum()
        self._square = self._square + y.square().sum()

    def solve(self, ridge: float) -> tuple[Tensor, float]:
        """The change of the weights, of shape (inputs, units), and the share of the target's squares that it leaves."""
        scales = self._gram.diagonal()
        held = torch.where(scales > 0, ridge * scales, 1.0)  # an input that is always 0 keeps its weight
        regular = self._gram + held.diag()
        change: Tensor = torch.linalg.solve(regular, self._moments)
        left = self._left - 2 * (change * self._moments).sum() + (change * (self._gram @ change)).sum()
        share = float(left.clamp(min=0) / self._square)  # infinite where nothing is wanted and something made
        return change, 0.0 if math.isnan(share) else share


@contextmanager
def _watching(
    pairs: list[_Pair],
    side: Callable[[_Pair], LinearLayer],
    note: Callable[[_Pair, Callable[[], Tensor], Tensor], None],
) -> Iterator[None]:
    """Call ``note(pair, inputs, sums)`` after each run of a layer inside the context. ``inputs()`` makes the rows of its inputs."""
    handles = []

    def watch(pair: _Pair, layer: LinearLayer) -> Callable[..., None]:
        def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            with torch.no_grad():
                inputs = functools.partial(layer.inputs, *args, **kwargs)
                note(pair, inputs, layer.sums(inputs, output).detach())

        return after

    try:
        for pair in pairs:
            layer = side(pair)
            handles.append(layer.module.register_forward_hook(watch(pair, layer), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _own_store() -> Iterator[None]:
    """Let a program register its parameters where no other sees them: both programs may use the same names."""
    store = pyro.get_param_store()
    with store.scope(store.get_state()):
        yield


class _KeepMessenger(Messenger):
    """Keep copies of the values of a program's sites, to which it may write.

    Attributes:
        values: by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values = dict[str, Tensor]()

    def _pyro_post_sample(self, msg: Any) -> None:
        if isinstance(msg["value"], Tensor) and not is_bookkeeping(msg):
            self.values[str(msg["name"])] = msg["value"].detach().clone()


class _GiveMessenger(Messenger):
    """Give a program the values of the teacher at the sites that fit them. All others keep the shared noise."""

    def __init__(self, values: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.values = values

    def _pyro_sample(self, msg: Any) -> None:
        value = self.values.get(str(msg["name"]))
        if value is None or msg["is_observed"] or is_bookkeeping(msg):
            return
        fn = msg["fn"]
        if tuple(value.shape) == (*getattr(fn, "batch_shape", ()), *getattr(fn, "event_shape", ())):
            msg["value"], msg["is_observed"] = value.clone(), True
