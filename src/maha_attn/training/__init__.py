"""Recipes, run folders and training. The work is done by transformers' Trainer."""
