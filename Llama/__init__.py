"""Llama-2 pretrained through torchtitan, with the optimizers of this repository."""

from Llama.cpu import adapt_torchtitan

adapt_torchtitan()  # before a module here imports torchtitan, which asks once, when imported, for its device
