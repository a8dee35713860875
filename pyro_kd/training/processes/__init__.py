"""Training in several processes: each takes its own rows and noise, and all take the same step."""
