"""One message for an absent framework."""

import importlib


def require(framework: str, user: str | None = None, requirement: str | None = None) -> None:
    """Import a framework, or say which extra brings it.

    Args:
        framework: the package to import.
        user: what needs it; default: ``lmf_multi.`` and its name.
        requirement: what pip installs for it; default: the extra of its name.

    Raises:
        ModuleNotFoundError: the framework itself is absent. An error inside an installed framework
            passes through unchanged, because another extra would not cure it.
    """
    try:
        importlib.import_module(framework)
    except ModuleNotFoundError as error:
        if error.name != framework:
            raise
        raise ModuleNotFoundError(
            f"{user or f'lmf_multi.{framework}'} needs {framework}, which is not installed; "
            f"run: pip install {requirement or repr(f'lmf-multi[{framework}]')}",
            name=framework,
        ) from error
