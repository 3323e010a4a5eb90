"""The mathematical operations of RAT+, each a plain torch reference with a Triton kernel behind one public function.

Ops know neither ranks nor models: tensors and patterns (dilation, window, initial) in, tensors out. `MEGARAT_OPS=reference` forces
the references everywhere (see `ops.dispatch`).
"""

from megarat.ops.accumulate import accumulate_
from megarat.ops.cross_entropy import Statistics, linear_cross_entropy, partial_statistics
from megarat.ops.decode_attention import cache_slots, cache_write, decode_attention, decode_step, gate_step
from megarat.ops.dilated_attention import dilated_attention, visible
from megarat.ops.fp8_linear import fp8_linear, fp8_missing
from megarat.ops.gated_scan import ScanState, gated_scan
from megarat.ops.gelu import gelu_and_gradient, gelu_linear
from megarat.ops.output_gate import output_gate
from megarat.ops.parts import parts
from megarat.ops.rms_norm import add_rms_norm, rms_norm
from megarat.ops.rotary import apply_rotary, rotary_tables

__all__ = [
    "ScanState",
    "Statistics",
    "accumulate_",
    "add_rms_norm",
    "apply_rotary",
    "cache_slots",
    "cache_write",
    "decode_attention",
    "decode_step",
    "dilated_attention",
    "fp8_linear",
    "fp8_missing",
    "gate_step",
    "gated_scan",
    "gelu_and_gradient",
    "gelu_linear",
    "linear_cross_entropy",
    "output_gate",
    "partial_statistics",
    "parts",
    "rms_norm",
    "rotary_tables",
    "visible",
]
