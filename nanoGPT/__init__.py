"""GPT-2 language models: prepare a corpus, train, sample."""

from common.guard import plain_interrupt

plain_interrupt()  # the imports below take seconds
