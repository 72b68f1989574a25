"""The version of the package, said once: setup, hello and `rfaas version` read it here."""

__version__ = "0.1.0"
