"""Methods compared fairly: the same rows and steps, a learning-rate sweep for each, several seeds, within a budget of
time. Knows what a run comes to, not how it trains.
"""

from lorakit.comparison.methods import METHODS, Method, parse_method
from lorakit.comparison.run import Comparison, compare

__all__ = ["METHODS", "Comparison", "Method", "compare", "parse_method"]
