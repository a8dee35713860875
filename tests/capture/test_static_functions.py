"""Whatever changes in what functions and arguments reach, a captured loss is the eager one."""

import array
import collections
import dataclasses
import sys
import types

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset

from pyro_kd import freeze
from tests.support.captured import pair, teacher, values

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:the student draws these outside"),  # dropout in train mode
    pytest.mark.filterwarnings("ignore:(these are drawn outside of sample sites|a program draws from)"),
]


def closure_number():
    factor = 2.0

    def student(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(factor * pyro.param("loc", torch.ones(3)), 1.0).to_event(1))

    def change():
        nonlocal factor
        factor = 3.0

    return student, change


def default_tensor():
    def student(x, *, shift=torch.zeros(3)):  # noqa: B008
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(shift + pyro.param("loc", torch.ones(3)), 1.0).to_event(1))

    return student, lambda: student.__kwdefaults__.update(shift=torch.ones(3))


def other_python_module():
    config = types.ModuleType("config_of_a_user")
    config.factor = 2.0
    sys.modules[config.__name__] = config
    namespace = {"config": config, "pyro": pyro, "dist": dist, "torch": torch, "__name__": "program_of_a_user"}
    code = (
        "def student(x):\n"
        "    with pyro.plate('rows', len(x)):\n"
        "        loc = config.factor * pyro.param('loc', torch.ones(3))\n"
        "        pyro.sample('y', dist.Normal(loc, 1.0).to_event(1))\n"
    )
    exec(code, namespace)
    return namespace["student"], lambda: setattr(config, "factor", 3.0)


def a_distribution_made_before():
    law = dist.Normal(torch.zeros(3), 1.0)

    def student(x):
        with pyro.plate("rows", len(x)):
            shift = law.mean
            pyro.sample("y", dist.Normal(shift + pyro.param("loc", torch.ones(3)), 1.0).to_event(1))

    return student, lambda: setattr(law, "loc", torch.ones(3))


def student_times(factor):
    def student(x):
        with pyro.plate("rows", len(x)):
            pyro.sample("y", dist.Normal(factor() * pyro.param("loc", torch.ones(3)), 1.0).to_event(1))

    return student


def settings_module():
    package, settings = types.ModuleType("package_of_a_user"), types.ModuleType("package_of_a_user.settings")
    package.settings, settings.factor = settings, 2.0
    sys.modules |= {package.__name__: package, settings.__name__: settings}
    return package


def a_python_module_that_is_imported_inside():
    package = settings_module()

    def factor():
        import package_of_a_user.settings as settings

        return settings.factor

    return student_times(factor), lambda: setattr(package.settings, "factor", 3.0)


def a_name_that_is_imported_inside():
    package = settings_module()

    def factor():
        from package_of_a_user.settings import factor

        return factor

    return student_times(factor), lambda: setattr(package.settings, "factor", 3.0)


def a_python_module_in_a_closure():
    package = settings_module()
    return student_times(lambda: package.settings.factor), lambda: setattr(package.settings, "factor", 3.0)


def code_that_is_loaded_again():
    def factor():
        return 2.0

    return student_times(factor), lambda: setattr(factor, "__code__", (lambda: 3.0).__code__)


def a_scalar_that_is_read():
    held = torch.tensor(2.0)
    return student_times(lambda: float(held)), lambda: held.fill_(3.0)


def a_scalar_that_decides():
    held = torch.tensor(True)
    return student_times(lambda: 2.0 if held else 3.0), lambda: held.fill_(False)


def a_byte():
    held = bytearray([2])
    return student_times(lambda: held[0]), lambda: held.__setitem__(0, 3)


def an_array_of_python():
    held = array.array("d", [2.0])
    return student_times(lambda: held[0]), lambda: held.__setitem__(0, 3.0)


def a_view_of_bytes():
    held = bytearray([2])
    view = memoryview(held)
    return student_times(lambda: view[0]), lambda: held.__setitem__(0, 3)


def a_read_only_dictionary():
    held = {"factor": 2.0}
    view = types.MappingProxyType(held)
    return student_times(lambda: view["factor"]), lambda: held.update(factor=3.0)


def an_order():
    held = {"a": 2.0, "b": 3.0}
    return student_times(lambda: next(iter(held.values()))), lambda: held.update(a=held.pop("a"))


def an_order_of_an_ordered_dictionary():
    held = collections.OrderedDict(a=2.0, b=3.0)
    return student_times(lambda: next(iter(held.values()))), lambda: held.move_to_end("a")


def an_order_of_keys_that_are_objects():
    one, two = Held(2.0), Held(3.0)
    held = {one: 2.0, two: 2.0}
    return student_times(lambda: next(iter(held)).factor), lambda: held.update({one: held.pop(one)})


class Held:
    def __init__(self, factor):
        self.factor = factor


def an_order_of_modules():
    layers = nn.ModuleDict({"shift": nn.Threshold(0.0, 5.0), "halve": nn.Hardtanh(-2.0, 0.5)})

    class Layered(nn.Module):
        def __init__(self):
            super().__init__()
            self.loc, self.layers = nn.Parameter(-torch.ones(3)), layers

        def forward(self, x):
            loc = self.loc
            for layer in self.layers.values():
                loc = layer(loc)
            with pyro.plate("rows", len(x)):
                pyro.sample("y", dist.Normal(loc + 0.1 * self.loc, 1.0).to_event(1))

    def change():
        layers["shift"] = layers.pop("shift")

    return Layered(), change


def tensors_of_a_data_set():
    held = TensorDataset(torch.tensor([2.0]))
    return student_times(lambda: held.tensors[0]), lambda: setattr(held, "tensors", (torch.tensor([3.0]),))


def a_number_in_a_data_set_of_a_loader():
    loader = DataLoader(ConcatDataset([Subset(TensorDataset(torch.ones(4)), [1, 2])]), shuffle=True)
    return student_times(lambda: float(len(loader.dataset.datasets[0]))), lambda: loader.dataset.datasets[0].indices.append(
        3
    )


def a_recursive_function():
    class Walk:
        depth = 2

        def __call__(self, x):
            with pyro.plate("rows", len(x)):
                pyro.sample("y", dist.Normal(self.down(pyro.param("loc", torch.ones(3)), self.depth), 1.0).to_event(1))

        def down(self, loc, depth):
            return loc if depth == 0 else self.down(2 * loc, depth - 1)

    walk = Walk()
    return walk, lambda: setattr(walk, "depth", 3)


@pytest.mark.parametrize(
    "make",
    [
        *(closure_number, default_tensor, other_python_module, a_distribution_made_before, a_recursive_function),
        *(a_python_module_that_is_imported_inside, a_name_that_is_imported_inside, a_python_module_in_a_closure),
        *(code_that_is_loaded_again, a_scalar_that_is_read, a_scalar_that_decides),
        *(a_byte, an_array_of_python, a_view_of_bytes, a_read_only_dictionary),
        *(tensors_of_a_data_set, a_number_in_a_data_set_of_a_loader),
        *(an_order, an_order_of_an_ordered_dictionary, an_order_of_keys_that_are_objects, an_order_of_modules),
    ],
    ids=lambda make: make.__name__,
)
def test_a_change_in_what_a_function_reaches_is_seen(make):
    student, change = make()
    modules, x = pair(student, freeze(teacher)), torch.randn(4, 3)
    before = values(modules, x)
    change()
    after = values(modules, x)
    assert_close(*before)
    assert_close(*after)
    assert not torch.isclose(before[0], after[0])


def test_a_change_in_an_argument_that_is_an_object_is_seen():
    class Config:
        factor = 2.0

    def student(config):
        pyro.sample("y", dist.Normal(config.factor * pyro.param("loc", torch.ones(3)), 1.0).to_event(1))

    modules = pair(student, freeze(lambda config: pyro.sample("y", dist.Normal(torch.zeros(3), 1.0).to_event(1))))
    config = Config()
    before = values(modules, config)
    config.factor = 3.0
    after = values(modules, config)
    assert_close(*before)
    assert_close(*after)
    assert not torch.isclose(before[0], after[0])


def test_arguments_that_are_equal_by_their_own_rule_are_told_apart():
    """A class may leave attributes out of its equality."""

    @dataclasses.dataclass(frozen=True)
    class Config:
        name: str
        factor: float = dataclasses.field(compare=False)

    def student(config):
        pyro.sample("y", dist.Normal(config.factor * pyro.param("loc", torch.ones(3)), 1.0).to_event(1))

    modules = pair(student, freeze(lambda config: pyro.sample("y", dist.Normal(torch.zeros(3), 1.0).to_event(1))))
    before, after = values(modules, Config("one", 2.0)), values(modules, Config("one", 3.0))
    again = values(modules, Config("one", 3.0))
    assert_close(*before)
    assert_close(*after)
    assert_close(again, after)
    assert modules[1].loss._pairs._pairs[0].captured._capture.num_graphs == 2


def test_a_loader_that_a_program_reaches_may_be_read_meanwhile(num_graphs):
    """Its state is that of the training loop."""
    loader = DataLoader(TensorDataset(torch.ones(4, 3)), batch_size=2, shuffle=True)
    modules = pair(student_times(lambda: float(len(loader.dataset))), freeze(teacher))
    for _ in range(2):
        for (x,) in loader:
            assert_close(*values(modules, x))
    assert num_graphs() == 1
