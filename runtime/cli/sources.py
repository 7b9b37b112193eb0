"""The adapters and LoRAs that a command line names."""

from __future__ import annotations

from runtime.errors import InputError


def adapter_sources(values: list[str]) -> dict[str, str]:
    """--adapter name=path, several times -> name: path."""
    sources: dict[str, str] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not (equals and name and path):
            raise InputError(
                f"--adapter {value!r}; expected name=path, such as canny=t2i-adapter-canny-sdxl-1.0"
            )
        if name in sources:
            raise InputError(f"--adapter {value!r}: the name {name} is given twice; expected another")
        sources[name] = path
    return sources


def lora_sources(values: list[str]) -> list[tuple[str, float]]:
    """--lora file[=weight], several times -> (file, weight)."""
    loras = []
    for value in values:
        path, equals, weight = value.rpartition("=")
        try:
            loras.append((path, float(weight)) if equals else (value, 1.0))
        except ValueError:
            loras.append((value, 1.0))  # a path with "=" in it
    return loras
