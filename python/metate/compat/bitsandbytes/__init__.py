"""bitsandbytes' layers, formats, functions and optimizers over metate, on CPU tensors too.

Import it as it is, or let `metate.compat.install("bitsandbytes")` put it under the name `bitsandbytes`.
"""

from metate.compat.bitsandbytes import functional, nn, optim
from metate.compat.bitsandbytes.functional import MatmulLtState, matmul, matmul_4bit

__version__ = "0.50.2"  # the bitsandbytes release whose signatures these are
features = {"multi_backend"}
supported_torch_devices = {"cpu", "cuda"}
__all__ = ["MatmulLtState", "functional", "matmul", "matmul_4bit", "nn", "optim"]
