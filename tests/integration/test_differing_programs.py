"""Teacher and student of different structure share what noise they can, and refuse the rest."""

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_kd import LocalKD, record_noise, replay_noise
from pyro_kd.errors import NoiseMismatchError, SupportMismatchError, UnpairedSiteError
from tests.support.category_programs import categorical, one_hot, table
from tests.support.losses import SurrogateKD


def draw(*, student, teacher):
    """The values of one site that two distributions take on shared noise: the student's and the teacher's."""
    with record_noise() as noise:
        z = pyro.sample("z", teacher)
    with replay_noise(noise=noise):
        return pyro.sample("z", student), z


def standard(*shape, event=1):
    return dist.Normal(torch.zeros(shape), 1.0).to_event(event)


@pytest.mark.parametrize(
    ("teacher", "student", "event"),
    [((8,), (3,), 1), ((3,), (8,), 1), ((5, 8), (5, 3), 1), ((5, 3), (5, 8), 1), ((2, 8), (1, 3), 2), ((1, 3), (2, 8), 2), ((4,), (1,), 1)],
)  # fmt: skip
def test_a_narrower_event_takes_the_leading_noise_and_a_wider_one_adds_to_it(teacher, student, event):
    z_student, z = draw(student=standard(*student, event=event), teacher=standard(*teacher, event=event))
    assert z.shape == teacher
    assert z_student.shape == student
    common = tuple(slice(0, min(sizes)) for sizes in zip(teacher, student, strict=True))
    assert torch.equal(z[common], z_student[common])
    assert z_student.unique().numel() == z_student.numel()


@pytest.mark.parametrize("batch", [(), (5,), (5, 7)])
def test_different_numbers_of_categories_share_noise(batch):
    rows = torch.ones(*batch, 400, 1)
    z_student, z = draw(student=categorical(rows * torch.zeros(3)), teacher=categorical(rows * torch.zeros(4)))
    assert (z_student[z < 3] == z[z < 3]).all()
    z_student, z = draw(student=categorical(rows * torch.zeros(4)), teacher=categorical(rows * torch.zeros(3)))
    assert (z_student[z_student < 3] == z[z_student < 3]).all()


@pytest.mark.parametrize(("teacher", "student"), [((8,), (3,)), ((5, 8), (4, 8)), ((5, 8), (4, 3))])
def test_batch_dimensions_never_take_a_part(teacher, student):
    with pytest.raises(NoiseMismatchError, match="Give both programs the same shape"):
        draw(student=standard(*student, event=len(student) - 1), teacher=standard(*teacher, event=len(teacher) - 1))


def test_a_plate_of_different_size_never_takes_a_part_of_the_indices():
    def program(size):
        with pyro.plate("rows", size, subsample_size=10) as index:
            return index

    with record_noise() as noise:
        program(100)
    with pytest.raises(NoiseMismatchError, match="site 'rows'"):
        replay_noise(program, noise=noise)(50)


@pytest.mark.parametrize(
    ("teacher", "student"),
    [
        (dist.Normal(0.0, 1.0), dist.StudentT(4.0, 0.0, 1.0)),
        (dist.StudentT(4.0, 0.0, 1.0), dist.Normal(0.0, 1.0)),
        (dist.Gamma(3.0, 1.0), dist.LogNormal(1.0, 0.5)),
        (dist.LogNormal(1.0, 0.5), dist.Gamma(3.0, 1.0)),
        (dist.Laplace(0.0, 1.0), dist.Logistic(0.0, 1.0)),
        (dist.Exponential(2.0), dist.Weibull(2.0, 3.0)),
    ],
    ids=lambda fn: type(fn).__name__,
)
def test_different_families_share_noise(teacher, student):
    """Rank correlation: 1 is the best coupling of two continuous laws; families with two draws a value stay below it."""
    z_student, z = draw(student=student.expand([4000]), teacher=teacher.expand([4000]))
    ranks = [value.argsort().argsort().double() for value in (z, z_student)]
    assert torch.corrcoef(torch.stack(ranks))[0, 1] > 0.3


@pytest.mark.parametrize("loss", [SurrogateKD(["x"], latent_weight=2.0), LocalKD(["x"], latent_weight=2.0)])
@pytest.mark.parametrize(("teacher", "student"), [(categorical, one_hot), (one_hot, categorical)])
def test_a_category_is_compared_whatever_its_coding(loss, teacher, student):
    def program(family, logits):
        def model():
            with pyro.plate("rows", 50):
                z = pyro.sample("z", family(logits))
                z = z.argmax(-1) if family is one_hot else z
                pyro.sample("x", dist.Normal(z.double(), 1.0))

        return model

    p, q = table(4, seed=0), table(4, seed=1)
    terms = loss.terms(program(student, q), program(teacher, p))
    exact = torch.distributions.kl_divergence(categorical(p), categorical(q))
    assert terms["z"].analytic
    assert terms["z"].value.item() == pytest.approx(50 * exact.item())
    same = loss.terms(program(student, p), program(teacher, p))
    assert [term.value.item() for term in same.values()] == pytest.approx([0.0, 0.0], abs=1e-12)


@pytest.mark.parametrize("rank", [1, 2])
def test_a_coding_inside_an_event_of_any_rank(rank):
    shape = (2, 3)[2 - rank :]

    def program(family, logits, event):
        return lambda: pyro.sample("x", family(logits).to_event(event))

    p, q = table(*shape, 4, seed=0), table(*shape, 4, seed=1)
    exact = torch.distributions.kl_divergence(categorical(p), categorical(q)).sum().item()
    for teacher, student in ((categorical, one_hot), (one_hot, categorical)):
        value = SurrogateKD(["x"]).loss(program(student, q, rank), program(teacher, p, rank))
        assert value == pytest.approx(exact)


def test_a_subsampled_plate_may_have_a_different_name():
    data = torch.arange(100.0)

    def program(plate):
        def model():
            with pyro.plate(plate, 100, subsample_size=5) as index:
                pyro.sample("x", dist.Normal(data[index], 1.0))

        return model

    with pytest.raises(UnpairedSiteError, match="'rows'.*site_map"):
        SurrogateKD(["x"]).loss(program("rows"), program("data"))
    assert SurrogateKD(["x"], site_map={"rows": "data"}).loss(program("rows"), program("data")) == 0.0


# What cannot share noise is an error that says what to write.


def decoder(width):
    def model():
        with pyro.plate("rows", 20):
            z = pyro.sample("z", standard(width))
            pyro.sample("x", dist.Normal(z.sum(-1), 1.0))

    return model


def test_a_latent_of_different_width_has_no_term_and_shares_noise():
    with pytest.raises(SupportMismatchError, match=r"events of shape \(8,\) against \(3,\).*latent_weight=lambda") as error:
        SurrogateKD(["x"]).loss(decoder(3), decoder(8))
    remedy = eval(str(error.value).split("latent_weight=")[1].split(", which")[0])
    terms = SurrogateKD(["x"], latent_weight=remedy).terms(decoder(3), decoder(8))
    assert list(terms) == ["x"]
    assert terms["x"].value > 0


def test_local_distillation_refuses_to_give_a_value_of_different_width():
    loss = LocalKD(["x"])
    with pytest.raises(SupportMismatchError, match=r"'z'.*events of shape \(8,\) against \(3,\).*fresh=\['z'\]"):
        loss.loss(decoder(3), decoder(8))
    assert LocalKD(["x"], fresh=["z"]).loss(decoder(3), decoder(8)) > 0
    values = []
    for kind in (LocalKD, SurrogateKD):  # of weight 0, it is not compared, and so not given
        pyro.set_rng_seed(0)
        values.append(kind(["x"], latent_weight=0.0).loss(decoder(3), decoder(8)))
    assert values[0] == values[1] > 0


def test_laws_that_cannot_share_noise_are_an_error():
    with pytest.raises(NoiseMismatchError, match=r"site 'z' \(Categorical.*fresh=\['z'\]"):
        draw(student=categorical(torch.zeros(2)), teacher=dist.Bernoulli(torch.tensor(0.5)))


# Names, plates and masks that nearly fit.


def line(*sites):
    """z -> z -> ... -> x of given names and means, in one plate."""

    def model():
        with pyro.plate("rows", 100):
            for name, loc in sites:
                z = pyro.sample(name, dist.Normal(loc, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0))

    return model


def test_a_name_that_is_mapped_elsewhere_pairs_with_nothing_else():
    teacher, student = line(("z1", 5.0), ("z2", 0.0)), line(("z1", 0.5))
    with pytest.raises(UnpairedSiteError, match=r"site 'z1' is in the teacher only.*fresh=\['z1'\]"):
        SurrogateKD(["x"], site_map={"z1": "z2"}).loss(student, teacher)
    terms = SurrogateKD(["x"], site_map={"z1": "z2"}, fresh=["z1"]).terms(student, teacher)
    assert {name: term.value.item() for name, term in terms.items()} == pytest.approx({"z2": 12.5, "x": 12.5})


def test_a_latent_may_have_the_name_of_an_input():
    def teacher():
        a = pyro.sample("a", dist.Normal(0.0, 1.0), obs=torch.tensor(3.0))
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z + 0 * a, 1.0))

    def student():
        pyro.sample("x", dist.Normal(pyro.sample("a", dist.Normal(0.0, 1.0)), 1.0))

    terms = SurrogateKD(["x"], site_map={"a": "z"}).terms(student, teacher)
    assert {name: term.value.item() for name, term in terms.items()} == {"z": 0.0, "x": 0.0}


def test_a_full_plate_may_have_a_different_size():
    """Three components against two, as in a mixture: what lies in that plate stands alone."""

    def mixture(components):
        def model():
            with pyro.plate("components", components):
                locs = pyro.sample("locs", dist.Normal(0.0, 3.0))
            with pyro.plate("rows", 50):
                k = pyro.sample("k", dist.Categorical(torch.ones(components)))
                pyro.sample("x", dist.Normal(locs[k], 1.0))

        return model

    assert SurrogateKD(["x"], fresh=["locs", "k"]).loss(mixture(2), mixture(3)) > 0


def test_masks_of_a_latent_that_is_not_compared_may_differ():
    """A mask under to_event has the latent's width."""

    def model(width):
        def program():
            with pyro.plate("rows", 4):
                mask = torch.tensor([True, True, False, False])
                z = pyro.sample(
                    "z", dist.Normal(torch.zeros(4, width), 1.0).mask(mask[:, None].expand(4, width)).to_event(1)
                )
                pyro.sample("x", dist.Normal(z.sum(-1), 1.0).mask(mask))

        return program

    terms = SurrogateKD(["x"], latent_weight=0.0).terms(model(3), model(5))
    assert list(terms) == ["x"]


def test_categories_that_the_student_lacks_cannot_be_given():
    def model(family, count):
        def program():
            with pyro.plate("rows", 50):
                z = pyro.sample("z", family(torch.zeros(count)))
                z = z.argmax(-1) if family is one_hot else z
                pyro.sample("x", dist.Normal(torch.arange(float(count))[z], 1.0))

        return program

    for family in (categorical, one_hot):
        with pytest.raises(SupportMismatchError, match=r"'z'.*4 categories against 3.*fresh=\['z'\]"):
            LocalKD(["x"]).loss(model(family, 3), model(categorical, 4))


def test_the_exact_kl_takes_targets_in_two_codings():
    from pyro_kd.metrics import marginal_kl

    def model(family, logits):
        def program():
            with pyro.plate("rows", 4000):
                pyro.sample("y", family(logits))

        return program

    p, q = table(3, seed=0), table(3, seed=1)
    exact = torch.distributions.kl_divergence(categorical(p), categorical(q)).item()
    found = marginal_kl(model(one_hot, q), model(categorical, p), ["y"])
    assert abs(found.mean - exact) < 5 * found.standard_error


def test_noise_that_would_round_to_an_end_stays_inside():
    """From a normal beyond 5.4 standard deviations, and from float32 into bfloat16."""
    from pyro_kd.noise.laws import Draw, NoiseLaw

    far = {"z": (Draw(NoiseLaw.NORMAL, torch.tensor([5.5, -5.5, 8.0, -8.0]), "normal_"),)}
    for family in (dist.Laplace, dist.Logistic, dist.SoftLaplace):
        for dtype in (torch.float32, torch.bfloat16):
            with replay_noise(noise=far):
                assert pyro.sample("z", family(torch.zeros(4, dtype=dtype), torch.ones(4, dtype=dtype))).isfinite().all()


def test_a_target_without_a_sampler_can_be_registered():
    from pyro_kd import register_sampler
    from pyro_kd.errors import UnsupportedNoiseError
    from pyro_kd.noise import samplers

    def model(loc):
        return lambda: pyro.sample(
            "x", dist.LogNormalNegativeBinomial(torch.tensor(5.0), torch.tensor(loc), torch.tensor(0.3))
        )

    with pytest.raises(
        UnsupportedNoiseError, match=r"site 'x': LogNormalNegativeBinomial cannot be sampled.*register_sampler"
    ):
        SurrogateKD(["x"]).loss(model(1.0), model(0.0))
    saved = dict(samplers._SAMPLERS)
    try:

        @register_sampler(dist.LogNormalNegativeBinomial)
        def sample(fn, sample_shape):
            logits = fn.logits + fn.multiplicative_noise_scale * torch.randn(sample_shape + fn.batch_shape)
            return dist.NegativeBinomial(fn.total_count, logits=logits).sample()

        assert torch.isfinite(torch.tensor(SurrogateKD(["x"]).loss(model(1.0), model(0.0))))
    finally:
        samplers._SAMPLERS.clear()
        samplers._SAMPLERS.update(saved)


def test_a_bound_of_point_masses_is_refused():
    from pyro_kd import bound_report
    from pyro_kd.errors import UnsupportedDivergenceError

    def guide(shift):
        def program():
            draw = pyro.sample("mu_unconstrained", dist.Normal(shift, 1.0), infer={"is_auxiliary": True})
            pyro.sample("mu", dist.Delta(draw.exp()))

        return program

    with pytest.raises(UnsupportedDivergenceError, match="'mu' is a point mass.*'mu_unconstrained'"):
        bound_report(guide(1.0), guide(0.0), ["mu"])
    assert bound_report(guide(1.0), guide(0.0), ["mu_unconstrained"]).surrogate.mean == pytest.approx(0.5)
