"""Llamas pretrained and fine-tuned through torchtitan, with the optimizers of this repository."""

from common.guard import plain_interrupt

plain_interrupt()  # the imports below take seconds

from Llama.cpu import adapt_torchtitan  # noqa: E402

adapt_torchtitan()  # before torchtitan is imported, which chooses its device on import
