"""Cost: time, memory, operations; certificates of the solver. Results go to ``results/``."""
