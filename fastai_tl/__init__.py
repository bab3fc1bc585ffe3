"""Transfer learning for text, the fastai way."""

__version__ = "0.1.0"
