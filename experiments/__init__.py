"""The programs. A user can do nothing about what torch says of torchao's enums while transformers imports it."""

import logging

logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
