"""GPU kernels of the local-control pipeline, each beside its plain-torch specification.

`kernels.ops` is the public door; `kernels.reference` is the specification. This file imports nothing:
transformers and diffusers look a package of this name up by import, and must find it cheap and harmless.
"""

__version__ = "0.1.0"
