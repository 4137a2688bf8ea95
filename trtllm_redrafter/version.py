"""The version, apart from the package's front door, so that every module may import it."""

__version__ = "0.1.0"
