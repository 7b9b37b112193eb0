"""training.loop.progress: means over the steps since the last update, for the logs and the bar."""

import torch
from accelerate import Accelerator

from training.loop.progress import LOG_STEPS, Progress


class Recorder(Accelerator):
    def __init__(self):
        super().__init__(cpu=True)
        self.logged = {}

    def log(self, values, step=None, **_):
        self.logged[step] = values


def test_losses_are_means_since_the_last_update():
    recorder = Recorder()
    progress = Progress(recorder, step=0, steps=LOG_STEPS + 2, samples=4)
    for step in range(1, LOG_STEPS + 3):
        progress.update(step, {"noise": torch.tensor(float(step))}, lr=0.1)
    progress.close()
    assert list(recorder.logged) == [LOG_STEPS, LOG_STEPS + 2]  # the last step is never left out
    assert recorder.logged[LOG_STEPS]["loss/noise"] == (LOG_STEPS + 1) / 2
    assert recorder.logged[LOG_STEPS + 2]["loss/noise"] == LOG_STEPS + 1.5
    assert recorder.logged[LOG_STEPS]["samples_per_second"] > 0 and recorder.logged[LOG_STEPS]["lr"] == 0.1


def test_a_resumed_run_shows_the_steps_that_are_done():
    progress = Progress(Recorder(), step=30, steps=40, samples=1)
    assert (progress.bar.n, progress.bar.total) == (30, 40)
    progress.close()
