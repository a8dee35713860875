"""Time to quality: how long a student takes until it is as good as a loop written by hand makes it.

    python -m tests.benchmarks.time_to_quality --models chain helmholtz --seeds 3       # runs what is missing, then writes the report
    python -m tests.benchmarks.time_to_quality --models vrnn --reuse 1 8 --compile on   # adds to it
    python -m tests.benchmarks.time_to_quality --page docs/performance.md               # copies tables and pictures into the page

One student is trained by a plain PyTorch loop with the paper's loss (``tests/benchmarks/applications``), and others, from the same
start, with the same rows, Adam, learning rate and schedule, by the library's trainer with the objective that docs/objectives.md
advises; with and without reuse of teacher draws, with and without capture. At checkpoints all are measured by one function, on the
same noise, which no training step sees. Measuring stops the clock; everything else counts, from the making of the trainer on,
capture included. Each run has a process of its own, with one thread and an empty compiler cache. Runs of the variants alternate, so that
a load on the machine falls on all of them; beside wall time stands processor time, on which it has little effect.

- ``variants.py``: what is compared; ``problem.py``: what a comparison needs to know of an application; ``problems/``: the applications;
- ``clock.py``, ``training.py``: one run, which gives quality against time; ``isolation.py``: in its own process;
- ``curves.py``: the time at which a curve reaches a quality; ``report.py``, ``pictures.py``: tables, pictures and the page.
"""
