"""Callbacks for tests of the training loop."""

import signal

from pyro_kd.training import Callback


class CtrlC(Callback):
    """Presses Ctrl-C after some steps."""

    def __init__(self, *steps):
        self.steps = steps or (3,)
        self.is_ended = False

    def on_step(self, trainer, row):
        if trainer.num_steps in self.steps:
            signal.raise_signal(signal.SIGINT)

    def on_end(self, trainer):
        self.is_ended = True


class Stop(Callback):
    """Ends the fit after a number of steps, or before the first step of one that has taken as many."""

    def __init__(self, steps):
        self.steps = steps

    def on_start(self, trainer, steps):
        if trainer.num_steps >= self.steps:
            trainer.stop()

    def on_step(self, trainer, row):
        if trainer.num_steps == self.steps:
            trainer.stop()


class Recorder(Callback):
    """Records its calls."""

    def __init__(self):
        self.calls = []

    def on_start(self, trainer, steps):
        self.calls.append(("start", trainer.num_steps, steps))

    def on_step(self, trainer, row):
        self.calls.append(("step", int(row["step"])))

    def on_checkpoint(self, trainer, path):
        self.calls.append(("checkpoint", path.name))

    def on_end(self, trainer):
        self.calls.append(("end", trainer.num_steps))
