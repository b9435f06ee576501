"""Blocks that several systems share."""

import timm  # noqa: F401  (its import registers the models, which import these modules)
