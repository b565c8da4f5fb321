"""SiT image generation with representation alignment: prepare latents, train, sample, evaluate."""
