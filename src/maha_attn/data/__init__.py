"""Text in, rows of tokens out. The work is done by tokenizers and datasets."""
