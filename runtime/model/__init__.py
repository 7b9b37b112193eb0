"""SDXL's UNet."""
