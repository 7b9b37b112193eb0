"""Noise schedules that end at zero SNR (arXiv 2305.08891), for the classes of diffusers that have no option for it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from diffusers import EulerDiscreteScheduler, SchedulerMixin

from runtime.errors import InputError, first_line

OPTION = "rescale_betas_zero_snr"
BETAS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", OPTION)
LAST = 2.0**-24  # of the cumulative product of alphas: diffusers' classes that have the option leave so much


def spelled_out(scheduler_class: type[SchedulerMixin], config: Mapping) -> dict:
    """Return a config; where it asks for zero SNR and the class has no such option, with the betas that this makes.

    It says nothing of which values were defaults: `from_config` would drop those, whatever they are now.
    """
    config = {key: value for key, value in config.items() if key != "_use_default_values"}
    if not config.get(OPTION) or OPTION in inspect.signature(scheduler_class.__init__).parameters:
        return config
    try:
        betas = EulerDiscreteScheduler(**{key: config[key] for key in BETAS if key in config}).betas.double()
    except NotImplementedError as error:
        raise InputError(
            f"scheduler {scheduler_class.__name__}: without {OPTION}: {first_line(error)}"
        ) from error
    betas[-1] = 1 - LAST / (1 - betas[:-1]).prod()
    others = {key: value for key, value in config.items() if key != OPTION}
    return others | {"trained_betas": betas.tolist()}
