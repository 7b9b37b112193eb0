"""From a prompt and a control to pixels: text, the denoising loop, decoding."""
