"""Triton's own functions are made when it is first imported, by whatever test comes first: so its interpreter is chosen
here."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
