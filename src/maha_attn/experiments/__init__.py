"""What is reproduced: experiments, the paper's exhibits and claims, and the files of results.

An *experiment* is a base recipe and its *rows*, each a few settings that differ from it; a *run* is
one row with one seed at one *budget*. An *exhibit* is a table or figure of the paper: which runs it
shows, and which claims they decide. Both are YAML files (``recipes/experiments``,
``recipes/exhibits``); nothing here runs a model.
"""
