"""Programs with plates, markov, mask, scale, factors and control flow, and their terms worked out by hand.

The programs are Gaussian. A location ``loc`` enters every mean linearly: the teacher has 0 and the student 1. Then every term
is a constant times ``loc`` squared, and the gradient at 1 is twice the loss.
"""

from collections import defaultdict

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine


def draw(name, mean):
    return pyro.sample(name, dist.Normal(mean, 1.0))


def pair(loc, suffix=""):
    """z ~ N(loc, 1), x ~ N(z + loc, 1): 1/2 at z, 4/2 at x of the surrogate loss, 1/2 at x of the local loss."""
    return draw("x" + suffix, draw("z" + suffix, loc) + loc)


def is_x(site):
    return site["name"].startswith("x")


def totals(terms):
    """The terms by the part of the name before an underscore: z_0, z_1, ... count as z."""
    sums = defaultdict(float)
    for term in terms.values():
        sums[term.name.split("_")[0]] += float(term.value.detach())
    return dict(sums)


# Each takes loc and draws z (latent) and x (target) sites.


def nested_plates(loc):
    with pyro.plate("outer", 3, dim=-2):
        z = draw("z", loc)
        with pyro.plate("inner", 4, dim=-1):
            draw("x", z + loc)


def nested_plates_without_dim(loc):
    with pyro.plate("outer", 3):
        z = draw("z", loc)
        with pyro.plate("inner", 4):
            draw("x", z + loc)


def crossed_plates(loc):
    rows, columns = pyro.plate("rows", 3, dim=-2), pyro.plate("columns", 4, dim=-1)
    with rows:
        z = draw("z_row", loc)
    with columns:
        w = draw("z_column", loc)
    with rows, columns:
        draw("x", z + w + loc)


def plate_entered_twice(loc):
    rows = pyro.plate("rows", 3)
    with rows:
        z = draw("z", loc)
    with rows:
        draw("x", z + loc)


def plate_stack(loc):
    with pyro.plate_stack("stack", (2, 3)):
        pair(loc)


def plate_of_dim_minus_two(loc):
    with pyro.plate("rows", 3, dim=-2):
        pair(loc)


def sequential_plate(loc):
    for i in pyro.plate("rows", 3):
        pair(loc, f"_{i}")


def sequential_in_vectorized(loc):
    with pyro.plate("rows", 3):
        for i in pyro.plate("steps", 2):
            pair(loc, f"_{i}")


def subsampled_plate(loc):
    with pyro.plate("rows", 10, subsample_size=2):
        pair(loc)


def full_subsample(loc):
    with pyro.plate("rows", 4, subsample_size=4):
        pair(loc)


def nested_subsampled_plates(loc):
    with pyro.plate("outer", 10, subsample_size=2, dim=-2):
        z = draw("z", loc)
        with pyro.plate("inner", 6, subsample_size=3, dim=-1):
            draw("x", z + loc)


def sequential_subsampled_plate(loc):
    for i in pyro.plate("rows", 10, subsample_size=3):
        pair(loc, f"_{i}")


def explicit_subsample(loc):
    with pyro.plate("rows", 10, subsample=torch.tensor([7, 3])):
        pair(loc)


def explicit_subsample_as_a_list(loc):
    for i in pyro.plate("rows", 10, subsample=[7, 3]):
        pair(loc, f"_{i}")


def steps(loc, times):
    z = 0.0
    for t in times:
        z = draw(f"z_{t}", z + loc)
    draw("x", z + loc)


def markov_loop(loc):
    steps(loc, pyro.markov(range(3)))


def markov_loop_in_a_plate(loc):
    with pyro.plate("rows", 4):
        steps(loc, pyro.markov(range(3)))


def markov_with_history(loc):
    steps(loc, pyro.markov(range(3), history=2, keep=True))


def markov_recursion(loc):
    @pyro.markov
    def recur(z, t):
        if t == 3:
            return draw("x", z + loc)
        return recur(draw(f"z_{t}", z + loc), t + 1)

    recur(0.0, 0)


def markov_context(loc):
    with pyro.plate("rows", 4), poutine.markov(history=1):
        steps(loc, range(3))


def mask_of_rows(loc):
    with pyro.plate("rows", 4), poutine.mask(mask=torch.tensor([True, False, True, True])):
        pair(loc)


def mask_of_one_site(loc):
    with pyro.plate("rows", 4):
        z = draw("z", loc)
        with poutine.mask(mask=torch.tensor([True, False, False, True])):
            draw("x", z + loc)


def masks_that_meet(loc):
    columns, rows = torch.tensor([True, True, False]), torch.tensor([[True], [False]])
    with pyro.plate("outer", 2, dim=-2), poutine.mask(mask=rows), pyro.plate("inner", 3, dim=-1), poutine.mask(mask=columns):
        pair(loc)


def mask_of_everything(loc):
    with pyro.plate("rows", 4):
        z = draw("z", loc)
        with poutine.mask(mask=False):
            draw("z_ignored", 3 * loc)
        draw("x", z + loc)


def mask_of_the_distribution(loc):
    keep = torch.tensor([True, False, True, True])
    with pyro.plate("rows", 4):
        z = pyro.sample("z", dist.Normal(loc, 1.0).mask(keep))
        with poutine.mask(mask=torch.tensor([True, True, False, True])):
            pyro.sample("x", dist.Normal(z + loc, 1.0).mask(keep))


def scales_that_meet(loc):
    with poutine.scale(scale=2.0), pyro.plate("rows", 4):
        z = draw("z", loc)
        with poutine.scale(scale=1.5):
            draw("x", z + loc)


def scale_of_rows(loc):
    with pyro.plate("rows", 3), poutine.scale(scale=torch.tensor([1.0, 2.0, 4.0])):
        pair(loc)


def scale_mask_and_subsample(loc):
    keep = torch.tensor([True, False, True, False])
    with pyro.plate("rows", 10, subsample_size=4), poutine.scale(scale=3.0), poutine.mask(mask=keep):
        pair(loc)


def factor_and_deterministic(loc):
    with pyro.plate("rows", 3):
        z = draw("z", loc)
        pyro.factor("penalty", -5 * z)
        shifted = pyro.deterministic("shifted", z + loc)
        draw("x", shifted)


def observed_beside_drawn(loc):
    with pyro.plate("rows", 3):
        data = pyro.sample("data", dist.Normal(loc, 1.0), obs=torch.tensor([1.0, 2.0, 3.0]))
        z = draw("z", loc * data)
        draw("x", z + loc * data)


def loop_and_if(loc):
    z = 0.0
    for i in range(4):
        if i % 2 == 0:
            z = draw(f"z_{i}", z + loc)
    draw("x", z + loc)


def helper_functions(loc):
    def first():
        return draw("z", loc)

    def second():
        return draw("x", first() + loc)

    with pyro.plate("rows", 3):
        second()


def barrier_between(loc):
    with pyro.plate("rows", 3):
        z = draw("z", loc)
        z = pyro.barrier(z)
        draw("x", z + loc)


# program -> (z, x of the surrogate loss, x of the local loss)
PROGRAMS = {
    nested_plates: (3 / 2, 12 * 4 / 2, 12 / 2),
    nested_plates_without_dim: (3 / 2, 12 * 4 / 2, 12 / 2),
    crossed_plates: (7 / 2, 12 * 9 / 2, 12 / 2),
    plate_entered_twice: (3 / 2, 3 * 4 / 2, 3 / 2),
    plate_stack: (6 / 2, 6 * 4 / 2, 6 / 2),
    plate_of_dim_minus_two: (3 / 2, 3 * 4 / 2, 3 / 2),
    sequential_plate: (3 / 2, 3 * 4 / 2, 3 / 2),
    sequential_in_vectorized: (6 / 2, 6 * 4 / 2, 6 / 2),
    subsampled_plate: (10 / 2, 10 * 4 / 2, 10 / 2),
    full_subsample: (4 / 2, 4 * 4 / 2, 4 / 2),
    nested_subsampled_plates: (10 / 2, 60 * 4 / 2, 60 / 2),
    sequential_subsampled_plate: (10 / 2, 10 * 4 / 2, 10 / 2),
    explicit_subsample: (10 / 2, 10 * 4 / 2, 10 / 2),
    explicit_subsample_as_a_list: (10 / 2, 10 * 4 / 2, 10 / 2),
    markov_loop: ((1, 14), 16 / 2, 1 / 2),
    markov_loop_in_a_plate: ((4, 14), 4 * 16 / 2, 4 / 2),
    markov_with_history: ((1, 14), 16 / 2, 1 / 2),
    markov_recursion: ((1, 14), 16 / 2, 1 / 2),
    markov_context: ((4, 14), 4 * 16 / 2, 4 / 2),
    mask_of_rows: (3 / 2, 3 * 4 / 2, 3 / 2),
    mask_of_one_site: (4 / 2, 2 * 4 / 2, 2 / 2),
    masks_that_meet: (2 / 2, 2 * 4 / 2, 2 / 2),
    mask_of_everything: (4 / 2, 4 * 4 / 2, 4 / 2),
    mask_of_the_distribution: (3 / 2, 2 * 4 / 2, 2 / 2),
    scales_that_meet: (2 * 4 / 2, 3 * 4 * 4 / 2, 3 * 4 / 2),
    scale_of_rows: (7 / 2, 7 * 4 / 2, 7 / 2),
    scale_mask_and_subsample: (3 * 10 / 4 * 2 / 2, 3 * 10 / 4 * 2 * 4 / 2, 3 * 10 / 4 * 2 / 2),
    factor_and_deterministic: (3 / 2, 3 * 4 / 2, 3 / 2),
    observed_beside_drawn: (14 / 2, 14 * 4 / 2, 14 / 2),
    loop_and_if: ((1, 5, 2), 9 / 2, 1 / 2),
    helper_functions: (3 / 2, 3 * 4 / 2, 3 / 2),
    barrier_between: (3 / 2, 3 * 4 / 2, 3 / 2),
}
