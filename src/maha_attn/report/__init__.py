"""Result files in, tables and pictures out. Nothing here runs a model."""
