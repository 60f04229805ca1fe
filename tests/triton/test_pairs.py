"""What is written in PTX is what it stands for: the interpreter runs something else in its place."""

import re

from triton_processes import rows_of


def test_pairs_of_bfloat16_keep_their_order(tmp_path):
    """The first of two values is the lower half of a register, also behind the rounding, which takes it second."""
    (ptx,) = rows_of("script_pairs.py", tmp_path)
    of = re.findall(r"shl\.b32 (%r\d+), (%r\d+), 16; and\.b32 (%r\d+), (%r\d+), 0xffff0000;", ptx)
    packed = re.findall(r"cvt\.rn\.bf16x2\.f32 (%r\d+), (%r\d+), (%r\d+);", ptx)
    assert len(of) == len(packed) == 4, "eight values a thread"
    halves = {(upper, lower): word for lower, word, upper, same in of if word == same}
    back = {words[0]: halves[words[1:]] for words in packed}
    (loaded,) = re.findall(r"ld\.global\S* \{ (.*?) \}", ptx)
    (stored,) = re.findall(r"st\.global\S* \[.*?\], \{ (.*?) \}", ptx)
    assert [back[word] for word in stored.split(", ")] == loaded.split(", ")
