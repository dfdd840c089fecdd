"""Models of other libraries and file formats: imported, exported, and offered to other tools."""

FORMATS = ("published", "transformers")  # of exported folders: the published code's own, and transformers'
