"""Imports and exports models of other libraries and file formats, and offers ours to other tools."""

FORMATS = ("published", "transformers")  # of exported folders: the published code's own, and transformers'
