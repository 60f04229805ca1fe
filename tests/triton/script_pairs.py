"""Compile a kernel that widens bfloat16 and rounds it again; print its PTX as a JSON string.

Run by test_pairs.py in a process of its own, where Triton does not interpret.
"""

import json

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from resnet_fused.backends.triton.common import narrow_pairs, widen_pairs


@triton.jit
def there_and_back_kernel(x_ptr, y_ptr):
    at = tl.arange(0, 1024)
    tl.store(y_ptr + at, narrow_pairs(widen_pairs(tl.load(x_ptr + at)), tl.bfloat16))


def main():
    divisible = [["tt.divisibility", 16]]
    signature = {"x_ptr": "*bf16", "y_ptr": "*bf16"}
    source = ASTSource(there_and_back_kernel, signature, {}, {(0,): divisible, (1,): divisible})
    print(json.dumps(triton.compile(source, target=GPUTarget("cuda", 80, 32)).asm["ptx"]))


if __name__ == "__main__":
    main()
