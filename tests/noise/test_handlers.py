"""record_noise and replay_noise as Pyro handlers: their three forms, their laws, plates, and what they leave alone."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_kd import record_noise, replay_noise
from pyro_kd.errors import NoiseMismatchError, UnpairedSiteError


def model(shift=0.0):
    with pyro.plate("rows", 7):
        z = pyro.sample("z", dist.Normal(shift, 1.0))
        k = pyro.sample("k", dist.Categorical(logits=torch.stack([z, -z, 0 * z], -1)))
        return pyro.sample("x", dist.Gamma(1.0 + k, 2.0))


def test_function_decorator_and_context_manager_agree():
    pyro.set_rng_seed(1)
    with record_noise() as noise:
        by_context = model()
    pyro.set_rng_seed(1)
    recorded = record_noise(model)
    by_call = recorded()
    pyro.set_rng_seed(1)
    handler = record_noise()

    @handler
    def decorated():
        return model()

    by_decorator = decorated()
    assert torch.equal(by_context, by_call)
    assert torch.equal(by_context, by_decorator)
    assert recorded.__name__ == "model"
    for record in (noise, recorded.noise, handler.noise):
        assert list(record) == ["rows", "z", "k", "x"]
        assert record["rows"] == ()
        assert torch.equal(replay_noise(model, noise=record)(), by_context)
        with replay_noise(noise=record):
            assert torch.equal(model(), by_context)
        assert torch.equal(replay_noise(noise=record)(model)(), by_context)
    assert "standard normal noise of shape (7,)" in repr(noise)


def test_handlers_decorate_methods():
    class Program:
        shift = 1.0

        @record_noise
        def recorded(self):
            return model(self.shift)

    program = Program()
    x = program.recorded()
    noise = Program.recorded.noise
    assert torch.equal(replay_noise(model, noise=noise)(1.0), x)


def test_each_run_has_its_own_record():
    recorded = record_noise(model)
    first, noise = recorded(), recorded.noise
    second = recorded()
    assert not torch.equal(first, second)
    assert torch.equal(replay_noise(model, noise=noise)(), first)


def test_replay_is_a_function_of_the_parameters():
    with record_noise() as noise:
        z = pyro.sample("z", dist.Normal(torch.zeros(5), 1.0))
    shift = torch.tensor(2.0, requires_grad=True)
    with replay_noise(noise=noise):
        moved = pyro.sample("z", dist.Normal(shift.expand(5), 3.0))
    assert torch.allclose(moved, 2.0 + 3.0 * z)
    (gradient,) = torch.autograd.grad(moved.sum(), shift)
    assert gradient == 5


HANDLERS = {
    "trace": lambda fn: poutine.trace(fn),
    "mask": lambda fn: poutine.mask(fn, mask=torch.tensor([True, False] * 3 + [True])),
    "scale": lambda fn: poutine.scale(fn, scale=3.0),
    "block": lambda fn: poutine.block(fn, hide_types=["param"]),
    "uncondition": poutine.uncondition,
    "plate": lambda fn: pyro.plate("particles", 3, dim=-2)(fn),
}


@pytest.mark.parametrize("name", HANDLERS)
def test_handlers_commute(name):
    """A handler inside record_noise or replay_noise, and outside of it, makes the same trace."""
    other = HANDLERS[name]

    def run(program):
        pyro.set_rng_seed(3)
        return poutine.trace(program).get_trace()

    inside_recorder, outside_recorder = record_noise(other(model)), record_noise(model)
    inside, outside = run(inside_recorder), run(other(outside_recorder))
    compare(inside, outside)
    noise = inside_recorder.noise
    assert list(noise) == list(outside_recorder.noise)
    compare(run(replay_noise(other(model), noise=noise)), run(other(replay_noise(model, noise=noise))))
    compare(inside, run(replay_noise(other(model), noise=noise)))


def test_condition_commutes_with_replay():
    with record_noise() as noise:
        model()
    data = {"z": torch.zeros(7)}
    inside = poutine.trace(replay_noise(poutine.condition(model, data=data), noise=noise)).get_trace()
    outside = poutine.trace(poutine.condition(replay_noise(model, noise=noise), data=data)).get_trace()
    assert torch.equal(inside.nodes["z"]["value"], data["z"])
    compare(inside, outside)


def compare(first, second):
    assert list(first.nodes) == list(second.nodes)
    for name, site in first.nodes.items():
        if site["type"] != "sample":
            continue
        other = second.nodes[name]
        assert torch.equal(site["value"], other["value"]), name
        assert getattr(site["fn"], "batch_shape", None) == getattr(other["fn"], "batch_shape", None)
        assert type(site["fn"]) is type(other["fn"])
        assert site["scale"] == other["scale"]
        assert (site["mask"] is None and other["mask"] is None) or torch.equal(site["mask"], other["mask"])
        assert site["is_observed"] == other["is_observed"]


def test_the_trace_keeps_the_conditional_distribution():
    with record_noise() as noise:
        model()
    site = poutine.trace(replay_noise(model, noise=noise)).get_trace(5.0).nodes["z"]
    assert isinstance(site["fn"], dist.Normal)
    assert site["fn"].mean.eq(5.0).all()
    assert site["infer"] == {}
    assert not site["is_observed"]


def test_observed_and_given_sites_draw_nothing():
    def observing():
        pyro.sample("z", dist.Normal(0.0, 1.0), obs=torch.tensor(1.0))
        return pyro.sample("w", dist.Normal(0.0, 1.0))

    with record_noise() as noise:
        poutine.condition(observing, data={"w": torch.tensor(2.0)})()
    assert len(noise) == 0


def test_deterministic_and_factor_and_delta_need_no_noise():
    def program():
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.deterministic("double", 2 * z)
        pyro.factor("potential", -z)
        pyro.sample("point", dist.Delta(torch.zeros(2), event_dim=1))

    with record_noise() as noise:
        program()
    assert {name: len(draws) for name, draws in noise.items()} == {"z": 1, "point": 0}
    replay_noise(program, noise=noise)()


def test_plate_subsampling_shares_its_indices():
    def subsampled(scale):
        with pyro.plate("data", 1000, subsample_size=10) as index:
            return index, pyro.sample("x", dist.Normal(0.0, scale))

    with record_noise() as noise:
        index, x = subsampled(1.0)
    again, doubled = replay_noise(subsampled, noise=noise)(2.0)
    assert torch.equal(index, again)
    assert torch.allclose(doubled, 2 * x)
    with pytest.raises(NoiseMismatchError, match="site 'data'.*uniform permutation"), replay_noise(noise=noise):
        pyro.plate("data", 50, subsample_size=10)


def test_explicit_subsample_is_kept():
    mine = torch.tensor([3, 1])
    with record_noise() as noise, pyro.plate("data", 100, subsample=mine) as index:
        pass
    assert torch.equal(index, mine)
    with replay_noise(noise=noise), pyro.plate("data", 100, subsample=mine.flip(0)) as index:
        pass
    assert torch.equal(index, mine.flip(0))


def test_site_map_pairs_sites_and_fresh_sites_draw_their_own_noise():
    with record_noise() as noise:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    with replay_noise(noise=noise, site_map={"latent": "z"}, fresh=["extra"]):
        assert torch.equal(pyro.sample("latent", dist.Normal(0.0, 1.0)), z)
        first = pyro.sample("extra", dist.Normal(0.0, 1.0))
    with replay_noise(noise=noise, fresh=["extra"]):
        assert not torch.equal(pyro.sample("extra", dist.Normal(0.0, 1.0)), first)


# Errors.


def test_noise_of_a_different_shape_is_refused():
    with record_noise() as noise:
        pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
    with replay_noise(noise=noise), pytest.raises(NoiseMismatchError) as error:
        pyro.sample("z", dist.Normal(torch.zeros(4), 1.0))
    for part in ("site 'z'", "Normal", "(3,)", "(4,)", "fresh=['z']"):
        assert part in str(error.value)


def test_noise_of_a_law_that_cannot_be_converted_is_refused():
    with record_noise() as noise:
        pyro.plate("z", 10, subsample_size=3)
    with replay_noise(noise=noise), pytest.raises(NoiseMismatchError, match="uniform permutation.*standard normal"):
        pyro.sample("z", dist.Normal(torch.zeros(10), 1.0))


def test_a_site_without_recorded_noise_is_refused():
    with record_noise() as noise:
        pyro.sample("latent_1", dist.Normal(0.0, 1.0))
    with replay_noise(noise=noise), pytest.raises(UnpairedSiteError) as error:
        pyro.sample("latent1", dist.Normal(0.0, 1.0))
    assert "'latent1' has no recorded noise" in str(error.value)
    assert "Did you mean 'latent_1'?" in str(error.value)
    assert "fresh=['latent1']" in str(error.value)


def test_a_site_that_is_sampled_twice_is_refused():
    with record_noise(), pytest.raises(NoiseMismatchError, match="site 'z' was sampled twice"):
        pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("z", dist.Normal(0.0, 1.0))


def test_replay_without_a_record_is_refused():
    with pytest.raises(TypeError, match="noise=record"):
        replay_noise(model)
    with pytest.raises(TypeError, match="noise=record"):
        replay_noise(model, noise=torch.zeros(3))


def test_an_error_leaves_no_handler_and_no_mode_behind():
    with pytest.raises(RuntimeError, match="mine"), record_noise():
        pyro.sample("z", dist.Normal(0.0, 1.0))
        raise RuntimeError("mine")
    assert not torch.utils._python_dispatch._get_current_dispatch_mode()


@pytest.mark.gpu
def test_gpu_tensors_keep_device_and_dtype():
    fn = dist.Gamma(torch.ones(3, device="cuda"), torch.ones(3, device="cuda"))
    with record_noise() as noise:
        x = pyro.sample("x", fn)
    with replay_noise(noise=noise):
        y = pyro.sample("x", fn)
    assert x.device.type == y.device.type == "cuda"
    assert torch.equal(x, y)


def test_a_star_stands_for_all_sites_without_recorded_noise():
    def two():
        pyro.sample("own", dist.Normal(0.0, 1.0))
        return pyro.sample("z", dist.Normal(0.0, 1.0))

    with record_noise() as noise:
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
    assert replay_noise(two, noise=noise, fresh="*")() == z
    with pytest.raises(UnpairedSiteError, match="'own' has no recorded noise"):
        replay_noise(two, noise=noise)()
