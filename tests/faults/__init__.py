"""What a training run survives: real processes that are killed, corrupted, signalled, and starved of disk.

`python -m tests.faults` injects every kind of fault into the real training path and prints the table of outcomes.
"""
