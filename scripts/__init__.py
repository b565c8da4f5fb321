"""The programs around the experiments: sweeps, figures, plans, benchmarks."""

from common.guard import plain_interrupt

plain_interrupt()  # the imports below take seconds
