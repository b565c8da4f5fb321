"""A drill: kills, damaged files, bad command lines and calls, payloads, and ranks that disagree; nothing is lost."""
