"""Fits and predictions judged: rows that do not belong, equations that cannot be, errors, coverage, figures."""
