"""The training loop: data, steps, checkpoints, telemetry."""
