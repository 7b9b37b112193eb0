"""What the server takes at most: each limit an option of `runtime.serve`, refused by its name where it is passed."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

MIB = 2**20


def limit(default: float, help: str):
    """Return a field that is an option of the command line too."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Limits:
    """All that bounds a request, the queue, and what is kept."""

    body_mib: int = limit(32, "MiB of a request's body, counted while it comes in")
    head_seconds: float = limit(15.0, "seconds in which a request's head must have come in")
    body_seconds: float = limit(60.0, "seconds in which a request's body must have come in")
    megapixels: float = limit(16.0, "millions of pixels of a picture, by its header")
    side: int = limit(4096, "pixels of a picture's side")
    condition_megapixels: float = limit(4.0, "millions of pixels of a picture that /v1/conditions makes")
    oversize: float = limit(4.0, "times the rows of a step that one request may have by itself")
    regions: int = limit(16, "regions of a request")
    images: int = limit(4, "pictures of a request")
    steps: int = limit(100, "denoising steps of a request")
    characters: int = limit(4000, "characters of a prompt")
    queue: int = limit(64, "requests that wait")
    queue_per_key: int = limit(8, "requests that wait of one API key")
    queue_mib: int = limit(1024, "MiB of decoded pictures of the requests that wait")
    queued_seconds: float = limit(60.0, "seconds that a request waits for its first step")
    running_seconds: float = limit(300.0, "seconds from its first step to its picture")
    rows: int = limit(0, "rows of the UNet in a step, two of a picture with guidance (0: by the machine)")
    patience: float = limit(2.0, "seconds after which a large request is not passed by smaller ones")
    drain_seconds: float = limit(30.0, "seconds that running work has to end in after SIGTERM")
    jobs: int = limit(1000, "jobs that are kept")
    files: int = limit(10000, "files that are kept")
    kept_mib: int = limit(2048, "MiB of pictures of jobs, and as many of files, that are kept")
    kept_hours: float = limit(24.0, "hours for which jobs and files are kept")
    connections: int = limit(512, "connections at a time")

    def __post_init__(self) -> None:
        from runtime.errors import InputError

        for each in fields(self):
            value, least = getattr(self, each.name), 1 if isinstance(each.default, int) else 1e-3
            least = 0 if each.name == "rows" else least
            if not least <= value < float("inf"):
                name = f"--{each.name.replace('_', '-')}"
                raise InputError(f"{name} {value:g}: expected a number of {least:g} or more")
