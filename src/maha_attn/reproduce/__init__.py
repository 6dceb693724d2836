"""Running what the paper's tables and figures need: ``maha reproduce``."""
