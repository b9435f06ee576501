"""Backbones, one file a system. Importing this package imports every file, and so registers all models."""

from importlib import import_module
from pkgutil import iter_modules

for module in iter_modules(__path__):
    import_module(f".{module.name}", __name__)
