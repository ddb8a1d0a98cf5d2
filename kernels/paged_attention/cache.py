"""Reading a paged cache, whatever it holds: rows of pages become tiles of numbers.

A cache is (pointer, strides of page, row, head, column); its scales (pointer, strides of page, row, head) or None.
FORMAT says how an element lies in memory: "plain", "int8", "float8" (e4m3, as bytes: older GPUs do not know it), or
"int4" (two codes a byte, the even element in the low nibble).
"""

import triton
import triton.language as tl


@triton.jit
def read(pointers, inside, nothing):
    """What lies there, `nothing` where it is not `inside`. `inside` is None where all is."""
    return tl.load(pointers) if inside is None else tl.load(pointers, mask=inside, other=nothing)


@triton.jit
def find_keys(n0, inside, sequence, table, page_size, BLOCK_N: tl.constexpr):
    """Page and row there of the keys n0 …; page 0 for keys that are not `inside`. `table` = (pointer, two strides,
    pages of a sequence, pages). A page number that lies is cut to what the cache holds."""
    j = n0 + tl.arange(0, BLOCK_N)
    pointers = table[0] + sequence.to(tl.int64) * table[1] + (j // page_size).to(tl.int64) * table[2]
    page = read(pointers, inside, 0)
    page = tl.minimum(tl.maximum(page, 0), table[4] - 1)
    return page.to(tl.int64), (j % page_size).to(tl.int64)


@triton.jit
def float8_to_half(byte):
    """e4m3 in the bits of a float16 is 2^-8 of itself, subnormals too; only its NaN must be looked for."""
    byte = byte.to(tl.uint16)
    half = ((byte & 0x80) << 8 | (byte & 0x7F) << 7).to(tl.float16, bitcast=True) * 256.0
    return tl.where((byte & 0x7F) == 0x7F, float("nan"), half.to(tl.float32))


@triton.jit
def load_elements(cache, places, head, inside, C0: tl.constexpr, COLS: tl.constexpr, DIM: tl.constexpr,
                  FORMAT: tl.constexpr):  # fmt: skip
    """Columns C0 … C0+COLS-1 of some keys without their scales; zeros beyond DIM and where a key is not `inside`.
    `inside` may be None."""
    PACKED: tl.constexpr = 2 if FORMAT == "int4" else 1
    NOTHING: tl.constexpr = 0x88 if FORMAT == "int4" else 0
    page, row = places
    col = C0 // PACKED + tl.arange(0, COLS // PACKED)
    rows = page * cache[1] + row * cache[2] + head.to(tl.int64) * cache[3]
    pointers = cache[0] + rows[:, None] + (col.to(tl.int64) * cache[4])[None, :]
    mask = None
    if inside is not None:
        mask = inside[:, None]
    if C0 + COLS > DIM:
        within = (col < DIM // PACKED)[None, :]
        mask = within if mask is None else mask & within
    x = read(pointers, mask, NOTHING)
    if FORMAT == "float8":
        x = float8_to_half(x)
    elif FORMAT == "int4":
        x = tl.reshape(tl.join(x & 15, x >> 4), (x.shape[0], COLS)).to(tl.float32) - 8.0
    elif FORMAT == "int8":
        x = x.to(tl.float32)
    return x


@triton.jit
def load_scale(scale, places, head, inside):
    page, row = places
    pointers = scale[0] + page * scale[1] + row * scale[2] + head.to(tl.int64) * scale[3]
    return read(pointers, inside, 0.0)


@triton.jit
def load_values(cache, scale, places, head, inside, dtype: tl.constexpr, DIM: tl.constexpr, COLS: tl.constexpr,
                FORMAT: tl.constexpr):  # fmt: skip
    """Rows of v with their scales. Unlike those of k, these cannot wait for the product: a sum runs over the rows."""
    x = load_elements(cache, places, head, inside, 0, COLS, DIM, FORMAT)
    if scale is not None:
        x = x * load_scale(scale, places, head, inside)[:, None]
    return x.to(dtype)


@triton.jit
def sound_values(cache, scale, places, head, inside, dtype: tl.constexpr, DIM: tl.constexpr, COLS: tl.constexpr,
                 FORMAT: tl.constexpr):  # fmt: skip
    """Keys whose value is numbers only. The others are left out of tiles that a mask cuts through and taken in one by
    one afterwards: the factor 0 of a masked row would not keep a NaN out of a product."""
    x = load_values(cache, scale, places, head, inside, dtype, DIM, COLS, FORMAT).to(tl.float32)
    return tl.min((x - x == 0).to(tl.int32), 1) > 0
