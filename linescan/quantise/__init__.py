"""Quantisation after training: weights and activations as integers of a few bits.

hadamard.py     rotations: Hadamard matrices, the Karhunen-Loeve basis
quantisers.py   grids, observers of ranges, weights that are kept as integers
recipes.py      the methods: MambaQuant, Quamba, dynamic int8
layers.py       quantised linear layers, convolutions and selective scans
transforms.py   rotations and smoothing that leave a model's function as it is
convert.py      a float model to a quantised one, and what that does to each layer
"""

from .convert import LayerError, arithmetic, quantise, restructure
from .recipes import METHODS, Recipe

__all__ = ["METHODS", "LayerError", "Recipe", "arithmetic", "quantise", "restructure"]
