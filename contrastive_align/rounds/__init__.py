"""Rounds of own samples: drawn from a policy, scored, kept in a pool, and given out to be trained on."""
