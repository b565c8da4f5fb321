"""SiT image generation with representation alignment: prepare latents, train, sample, evaluate."""

from common.guard import plain_interrupt

plain_interrupt()  # the imports below take seconds
