"""GPT-2 language models: prepare a corpus, train, sample."""
