"""Large Margin aware Focal loss for imbalanced data: one definition, four implementations.

``lmf_multi.torch``, ``lmf_multi.jax`` and ``lmf_multi.keras`` give the same values and gradients as
``lmf_multi.reference``. Importing this package imports NumPy and no framework.
"""

from lmf_multi._adjustment import adjust_logits, tune_adjustment
from lmf_multi._deferred import deferred_weights
from lmf_multi.spec import LMFSpec, class_counts, class_margins, class_weights, log_priors

__version__ = "0.2.0"
__all__ = [
    "LMFSpec",
    "__version__",
    "adjust_logits",
    "class_counts",
    "class_margins",
    "class_weights",
    "deferred_weights",
    "log_priors",
    "tune_adjustment",
]
