"""ControlNets beside the UNet: what is the same at every step computed once, the rest with each step's sample."""

from __future__ import annotations

from torch import Tensor

from runtime.control.residuals import Residuals
from runtime.control.rows import over_rows
from runtime.control.words import Words
from runtime.model.blocks import Injection
from runtime.sampling.rows import of_words, repeat_rows


class ControlNets:
    """The ControlNets of a picture's regions, ready to run.

    They are given the UNet's sample, time and text, regions' words among it.
    """

    def __init__(
        self,
        residuals: Residuals,
        timesteps: Tensor,
        text: Tensor,
        pooled: Tensor,
        time_ids: Tensor,
        repeat: int,
        words: Words | None = None,
    ):
        """text: with words beside the prompt where there are `words`; the others: see `Denoiser.prepare`."""
        self.residuals, self.words = residuals, words
        self.time, self.text = [], []
        self.levels = [run.net.text_levels() for run in residuals.runs]
        for net in (run.net for run in residuals.runs):
            time = net.embed_time(timesteps, pooled, time_ids)
            self.time.append([repeat_rows(t, repeat, dim=1) for t in time])
            pairs = net.project_text(text.to(net.conv_in.weight.dtype))
            self.text.append([(repeat_rows(k, repeat), repeat_rows(v, repeat)) for k, v in pairs])

    def __call__(self, sample: Tensor, step: int, shallow: bool = False) -> list[Injection] | None:
        """Return what they add to the UNet's tensors at a step, None where none acts.

        sample: the UNet's input (B, C, h, w), in its dtype. shallow: of the finest level's skip tensors alone.
        """
        found, rows = {}, len(sample)
        for number in self.residuals.acting(step):
            run = self.residuals.runs[number]
            text = [(k[-rows:], v[-rows:]) for k, v in self.text[number]]
            text = of_words(text, self.words, step, sample, self.levels[number])
            forward = run.net.forward_shallow if shallow else run.net
            time = [t[step, -rows:] for t in self.time[number]]
            found[number] = forward(sample, time, text, over_rows(run.condition, rows))
        return self.residuals.injections(step, found)
