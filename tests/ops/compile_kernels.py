"""Compile the kernels of sparse layers for a GPU that is not there: the interpreter forgives what compilers do not."""

from __future__ import annotations

import itertools

from triton import compile as compile_kernel
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from moevlm.ops.kernels import choosing, router, rows, sorting, swiglu

KERNELS = {
    choosing: ("_choose", "_choose_backward"),
    router: ("_logits", "_hidden_grad", "_weight_grad"),
    rows: ("_gather", "_sum"),
    sorting: ("_count", "_scan", "_place"),
    swiglu: ("_forward", "_backward"),
}
POINTERS = {"ids": "i64", "dropped": "i1", "hidden": "bf16", "source": "bf16", "rows": "bf16", "gate": "bf16"}
POINTERS |= dict.fromkeys(("blocks", "counts", "row_of_choice", "choice_of_row"), "i32")
SIZES = {"T": 32, "W": 128, "E": 16, "R": 4, "BLOCK": 512, "TILE": 32, "SPLIT": 256, "TOP_K": 2}

if __name__ == "__main__":
    for module, names in KERNELS.items():
        for name in names:
            kernel = getattr(module, name)
            flags = [argument for argument in kernel.arg_names if argument.isupper() and argument not in SIZES]
            for values in itertools.product((False, True), repeat=len(flags)):
                fixed = {**SIZES, **dict(zip(flags, values))}
                signature, constants = {}, {}
                for place, argument in enumerate(kernel.arg_names):
                    if argument.isupper():
                        signature[argument], constants[(place,)] = "constexpr", fixed[argument]
                    elif argument.endswith("_ptr"):
                        signature[argument] = "*" + POINTERS.get(argument.removesuffix("_ptr"), "fp32")
                    else:
                        signature[argument] = "i32"
                compiled = compile_kernel(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", 90, 32))
                assert "ptx" in compiled.asm
            print(name, 2 ** len(flags))
