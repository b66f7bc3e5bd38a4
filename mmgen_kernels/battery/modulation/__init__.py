"""Cases of the family."""

CASES: list = []
