"""Pure tensor functions: the pyramid, attention of one scale, fusion and its solver."""
