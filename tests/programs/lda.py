"""Latent Dirichlet allocation.

Exercises three plates, two of them nested, a subsampled one of documents, Dirichlet and Gamma latents, and parallel
enumeration of topics.
"""

import pyro
import pyro.distributions as dist
import torch
from torch.distributions import constraints

from tests.programs import Program, trained

TOPICS, WORDS, DOCUMENTS, LENGTH = 4, 20, 30, 12


def model(data, batch_size):
    shape = pyro.param("shape", lambda: 0.5 + torch.rand(TOPICS), constraint=constraints.positive)
    smoothing = pyro.param("smoothing", lambda: 0.2 + 2 * torch.rand(TOPICS, WORDS), constraint=constraints.positive)
    with pyro.plate("topics", TOPICS):
        topic_weights = pyro.sample("topic_weights", dist.Gamma(shape, 1.0))
        topic_words = pyro.sample("topic_words", dist.Dirichlet(smoothing))
    with pyro.plate("documents", DOCUMENTS, subsample_size=batch_size) as rows:
        doc_topics = pyro.sample("doc_topics", dist.Dirichlet(topic_weights))
        with pyro.plate("words", LENGTH):
            word_topics = pyro.sample("word_topics", dist.Categorical(doc_topics), infer={"enumerate": "parallel"})
            pyro.sample("doc_words", dist.Categorical(topic_words[word_topics]), obs=data[:, rows])


def program():
    args = (torch.randint(WORDS, (LENGTH, DOCUMENTS)), 10)
    return Program(trained(model, *args), model, args)
