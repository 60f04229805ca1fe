"""Whether float32 convolutions may be rounded to TF32, whichever of PyTorch's two interfaces said so.

``torch.backends.cudnn.allow_tf32``, the older one, raises once the newer one was written to
(``torch.backends.cudnn.conv.fp32_precision``, or ``fp32_precision`` of ``cudnn`` or of ``torch.backends``, from which
it inherits). The newer one can always be read, follows what is written to the older one, and is what ATen's own
convolutions ask.
"""

from __future__ import annotations

import torch

from .constant import constant_in_graphs


@constant_in_graphs
def allowed() -> bool:
    """Whether they may. A graph keeps the answer of when it was traced: what it decides there is a plan, no value."""
    return torch.backends.cudnn.conv.fp32_precision == "tf32"
