"""Llama-2 pretrained through torchtitan, with the optimizers of this repository."""

from common.guard import plain_interrupt

plain_interrupt()  # what a program here imports takes seconds

from Llama.cpu import adapt_torchtitan  # noqa: E402

adapt_torchtitan()  # before a module here imports torchtitan, which asks once, when imported, for its device
