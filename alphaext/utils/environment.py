"""What a result depends on besides its data and options: versions."""

__version__ = "0.1.0"
