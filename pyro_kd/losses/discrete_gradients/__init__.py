"""Gradients through the student's discrete latents, of which the paper passes on none.

    choice     what the user asks for at each site
    rows       which parts of a run are independent, and each part's share of the loss
    boundary   an unbiased gradient: the loss on both sides of a step of the student's draw
    score      an unbiased gradient: the law of the student's draw given the teacher's
    surrogate  adds the last two to a loss, as a term whose value is 0

The implicit derivative needs no term: it is a derivative of the draw itself (:mod:`pyro_kd.noise.implicit`).
"""
