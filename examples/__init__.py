"""The optimizers in other training loops: standalone files that run on a CPU in seconds."""
