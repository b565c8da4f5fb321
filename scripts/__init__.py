"""The programs around the experiments: sweeps, figures, plans, benchmarks."""

from common.guard import plain_interrupt

plain_interrupt()  # what a program here imports takes seconds
