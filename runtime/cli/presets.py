"""Settings that go together, by name: what `--preset` sets, and any option given beside it overrides.

Those of few steps are for models and LoRAs that were distilled to them; on any other they draw poorly.
"""

from __future__ import annotations

PRESETS: dict[str, dict[str, object]] = {
    # ByteDance/SDXL-Lightning's card: Euler with trailing timesteps, no guidance
    "lightning4": {"scheduler": "euler_trailing", "steps": 4, "guidance": 1.0},
    # latent-consistency/lcm-lora-sdxl's card: the LCM scheduler, no guidance
    "lcm4": {"scheduler": "lcm", "steps": 4, "guidance": 1.0},
    # stabilityai/sdxl-turbo's card and scheduler: ancestral Euler with trailing timesteps, one step, no guidance
    "turbo1": {"scheduler": "euler_a_trailing", "steps": 1, "guidance": 1.0},
    # the defaults of diffusers' StableDiffusionXLPipeline
    "quality": {"steps": 50, "guidance": 5.0},
    # DPM-Solver++ of second order, arXiv 2211.01095: 15 to 20 steps; the noise levels of arXiv 2206.00364
    "fast": {"scheduler": "dpm++2m_karras", "steps": 20, "guidance": 5.0},
}
