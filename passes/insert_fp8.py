"""Compute products as the models were trained: weights in FP8, in blocks of 128 x 128.

What           a weight that linears or experts multiply by becomes the nearest e4m3 codes with a
               scale in fp32 for each 128 rows x 128 columns. What is stored in FP8 already stays
               bit for bit, and rows of x become FP8 too once formats are chosen
               (`quantize_activations`: a scale for each 128 columns of a token).
Why it pays    half the bytes of bf16, and FP8 products where the machine has them.
Preconditions  as of `quantize_weights`, and the product is no head: norms, router, embedding,
               softmax and head stay as they are (DeepSeek-V3, section 3.3), a head but where
               `heads` names it. What absorbed attention reads of kv_b is no product's, and stays
               too.
Before         program "example" {stage=CANONICAL}
               symbols {N=[1,8]}
               weights {
                 @a : f32[6,8] = source "a" : f32[6,8]
               }
               graph main(%x: f32[N,8]) {
                 %y = linear %x, @a : f32[N,6]
                 %z = silu %y : f32[N,6]
                 return %z
               }
After          program "example" {stage=CANONICAL}
               symbols {N=[1,8]}
               weights {
                 @a : f32[6,8] = dequantize(scaled(block_codes(source "a" : f32[6,8],
                   block_scales(source "a" : f32[6,8]) {block=[128,128], codes=f8e4m3, dtype=f32})
                   {block=[128,128], codes=f8e4m3}, block_scales(source "a" : f32[6,8])
                   {block=[128,128], codes=f8e4m3, dtype=f32}) {block=[128,128]}) {dtype=f32}
               }
               graph main(%x: f32[N,8]) {
                 %y = linear %x, @a : f32[N,6]
                 %z = silu %y : f32[N,6]
                 return %z
               }
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dsc.ir.types import DType
from dsc.passes.quantize_weights import Kept, Kind, Quantising, _named

BLOCK = 128


@dataclass(frozen=True)
class InsertFp8(Quantising):
    """One kind for all but the head, unless that is one of `heads`."""

    heads: tuple[str, ...] = ()

    @property
    def patterns(self) -> tuple[str, ...]:
        """Those of heads too."""
        return (*self.keep, *self.heads)

    def kind(self, names: Sequence[str], is_head: bool, is_table: bool = False) -> Kind:
        """Blocks of 128 x 128. Raises `Kept` for the head."""
        if is_head and not any(_named(pattern, names) for pattern in self.heads):
            raise Kept("the head stays in higher precision")
        return Kind(DType.f8e4m3, (BLOCK, BLOCK), DType.f32)
