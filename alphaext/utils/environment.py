"""What a result depends on besides its data and options: versions."""

__version__ = "0.1.0"

RESULT_DEPENDS_ON = ("python", "alphaext", "torch", "torchvision", "timm", "numpy", "scikit-learn", "safetensors")
"""What a result of the command line depends on."""


def versions(*packages: str) -> dict[str, str | None]:
    """Versions of packages by name, ``"python"`` and ``"alphaext"`` among them; None for what is not installed.

    Example:
        >>> versions("alphaext", "nothing-of-this-name")
        {'alphaext': '0.1.0', 'nothing-of-this-name': None}
    """
    import importlib.metadata
    import platform

    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = {"python": platform.python_version(), "alphaext": __version__}.get(name)
    return found
