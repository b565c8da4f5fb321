"""The optimizers in other training loops: each file runs on a CPU in seconds, and stands alone."""
