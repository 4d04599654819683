"""Benchmarks: our calls beside what a programmer writes by hand, in turns within one run.

Each repetition starts at a barrier and counts the slower rank; the figures are medians. Ratios within one run hold where
times between runs do not.
"""
