"""A drill: injects kills, damaged files, bad command lines and calls, payloads and disagreeing ranks."""
