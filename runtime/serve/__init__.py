"""Pictures over HTTP: `python -m runtime.serve`. One thread owns the pipeline; requests share its steps."""
