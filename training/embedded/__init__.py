"""How the small default model under `runtime/embedded` was made, from nothing."""
