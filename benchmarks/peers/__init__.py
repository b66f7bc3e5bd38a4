"""The rivals. One file each: what it is, how it is called fairly, its licence.

A file offers `Contestant`s named after the op that they stand against. Nothing is imported until a contestant is made,
so a rival that is not installed is skipped with that reason.
"""
