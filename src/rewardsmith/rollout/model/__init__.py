"""A decoder as the fast path sees it: architecture in numbers, weights fused, layers written once.

An adapter is bound to the weights, with proof that it is. Nothing here samples or trains.
"""
