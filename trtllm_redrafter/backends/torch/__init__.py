"""The torch backend: executes a TensorRT-LLM checkpoint with PyTorch.

OpenMP threads spin while they wait; with one other busy process that makes PyTorch 10 to 40 times slower. The
library reads the policy when torch is first imported, so it is set here, before that, unless the user has.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
