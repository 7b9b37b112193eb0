"""The machine: its arithmetic, devices, files, and the facts about a run."""
