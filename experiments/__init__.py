"""The programs. What the tensor library says of torchao's enums as transformers imports it is nothing a user can act on."""

import logging

logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)
