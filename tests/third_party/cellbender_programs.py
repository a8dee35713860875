"""cellbender: counts of genes in droplets, with cells in some of them and what floats around in all."""

from typing import Any

import numpy
import pytest
import torch

from tests.third_party.cases import Case, Programs

model = pytest.importorskip("cellbender.remove_background.model")
encoders = pytest.importorskip("cellbender.remove_background.vae.encoder")
decoders = pytest.importorskip("cellbender.remove_background.vae.decoder")

GENES, CELLS, EMPTY, LATENTS = 12, 30, 30, 3
IN_CELL, IN_EMPTY = 1000.0, 50.0


def counts() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    rates = torch.cat([torch.full((CELLS, 1), IN_CELL), torch.full((EMPTY, 1), IN_EMPTY)]) / GENES
    return torch.poisson(rates * (0.5 + torch.rand(CELLS + EMPTY, GENES, generator=generator)), generator=generator)


def droplets(width: int) -> Any:
    shares = torch.full((GENES,), 1 / GENES)
    crossover = float(numpy.log(200.0))
    encoder = encoders.CompositeEncoder(
        {
            "z": encoders.EncodeZ(
                input_dim=GENES, hidden_dims=[width, width], output_dim=LATENTS, input_transform="normalize"
            ),
            "other": encoders.EncodeNonZLatents(
                n_genes=GENES,
                z_dim=LATENTS,
                log_count_crossover=crossover,
                prior_log_cell_counts=float(numpy.log1p(IN_CELL)),
                empty_log_count_threshold=float(numpy.log1p(20.0)),
                prior_logit_cell_prob=0.0,
                input_transform="log_normalize",
            ),
        }
    )
    priors = {"d_std": 0.3, "cell_counts": IN_CELL, "empty_counts": IN_EMPTY, "d_empty_std": 0.2, "cell_logit": 0.0}
    return model.RemoveBackgroundPyroModel(
        model_type="full",
        encoder=encoder,
        decoder=decoders.Decoder(input_dim=LATENTS, hidden_dims=[width], output_dim=GENES, use_batch_norm=True),
        dataset_obj_priors=priors | {"chi_ambient": shares, "chi_bar": shares},
        n_analyzed_genes=GENES,
        n_droplets=CELLS + EMPTY,
        analyzed_gene_names=numpy.arange(GENES),
        empty_UMI_threshold=20,
        log_counts_crossover=crossover,
        use_cuda=False,
    )


def encoder() -> Programs:
    teacher, student = droplets(32), droplets(8)
    return Programs(
        teacher.guide, student.guide, (counts(),), ["y", "z", "d_cell", "epsilon"]
    )  # y decides which cells have a z


CASES = [Case("cellbender", "the encoder of counts in droplets, with cells or without", encoder)]
