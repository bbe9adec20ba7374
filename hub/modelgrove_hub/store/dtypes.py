"""Every number type a safetensors file may hold, in one table: its size and who can read it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SmallFloat:
    """How to widen an 8- or 16-bit float to float32 with integer operations.

    The magnitude bits, shifted left until the exponent's last bit is at bit 23, are a float32
    whose exponent is off by the difference of the two biases: one multiplication with
    2^`scale` repairs it, subnormals included.
    """

    magnitude: int
    """Mask of the exponent and mantissa bits."""
    shift: int
    scale: int
    nonfinite: int
    """The smallest magnitude that is infinite or not a number."""
    limit: float
    """A sum of squares of widened magnitudes below it has no term that is infinite or not a number."""
    negative_zero_is_nan: bool = False


@dataclass(frozen=True)
class Dtype:
    """One stored number type."""

    bits: int
    numpy: str | None
    """The stored items as NumPy sees them (unsigned integers for small floats); None below a byte."""
    torch: str | None
    """Name of the dtype in torch; None where torch has none."""
    is_float: bool = False
    """Real floating point of at least a byte: norms and sketches are computed."""
    small: SmallFloat | None = None

    @property
    def itemsize(self) -> int:
        """Bytes of one element; 1 for types below a byte, which are packed."""
        return max(1, self.bits // 8)


DTYPES: dict[str, Dtype] = {
    "BOOL": Dtype(8, "|u1", "bool"),
    "U8": Dtype(8, "|u1", "uint8"),
    "I8": Dtype(8, "|i1", "int8"),
    "U16": Dtype(16, "<u2", "uint16"),
    "I16": Dtype(16, "<i2", "int16"),
    "U32": Dtype(32, "<u4", "uint32"),
    "I32": Dtype(32, "<i4", "int32"),
    "U64": Dtype(64, "<u8", "uint64"),
    "I64": Dtype(64, "<i8", "int64"),
    "F16": Dtype(16, "<u2", "float16", True, SmallFloat(0x7FFF, 13, 112, 0x7C00, 65536.0**2)),
    "BF16": Dtype(16, "<u2", "bfloat16", True, SmallFloat(0x7FFF, 16, 0, 0x7F80, 1e38)),
    "F32": Dtype(32, "<f4", "float32", True),
    "F64": Dtype(64, "<f8", "float64", True),
    "C64": Dtype(64, "<c8", "complex64"),
    "F8_E4M3": Dtype(8, "|u1", "float8_e4m3fn", True, SmallFloat(0x7F, 20, 120, 0x7F, 480.0**2)),
    "F8_E5M2": Dtype(8, "|u1", "float8_e5m2", True, SmallFloat(0x7F, 21, 112, 0x7C, 65536.0**2)),
    "F8_E4M3FNUZ": Dtype(8, "|u1", "float8_e4m3fnuz", True, SmallFloat(0x7F, 20, 119, 0x80, 0.0, True)),
    "F8_E5M2FNUZ": Dtype(8, "|u1", "float8_e5m2fnuz", True, SmallFloat(0x7F, 21, 111, 0x80, 0.0, True)),
    "F8_E8M0": Dtype(8, "|u1", "float8_e8m0fnu"),
    "F6_E2M3": Dtype(6, None, None),
    "F6_E3M2": Dtype(6, None, None),
    "F4": Dtype(4, None, "float4_e2m1fn_x2"),
}
"""By the name safetensors 0.8 writes. F8_E8M0 is a block scale (powers of two), so it has no norm.
torch packs two F4 values in an element: its last size is half of the stored one."""

NAMES = {f"torch.{dtype.torch}": name for name, dtype in DTYPES.items() if dtype.torch}
"""From `str(tensor.dtype)` to the stored name."""
