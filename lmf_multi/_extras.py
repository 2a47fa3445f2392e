"""One message for an absent framework."""

import importlib


def require(framework: str) -> None:
    """Import a framework, or say which extra brings it.

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
            f"lmf_multi.{framework} needs {framework}, which is not installed; "
            f"run: pip install 'lmf-multi[{framework}]'",
            name=framework,
        ) from error
