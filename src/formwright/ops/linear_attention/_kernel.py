"""The Triton kernel itself; imported only where Triton is there (see ``triton.py``)."""

import triton
import triton.language as tl


@triton.jit
def causal_product_kernel(
    a, b, c, out, state, offsets, heads, inner, outer,
    REVERSE: tl.constexpr, CHUNK: tl.constexpr, INNER: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """a and b (T, heads, inner), c and out (T, heads, outer), state (documents, heads, inner, outer), in and out."""
    pair = tl.program_id(0)
    document, head = pair // heads, pair % heads
    first, last = tl.load(offsets + document), tl.load(offsets + document + 1)
    d = tl.arange(0, INNER)
    e = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    step = tl.arange(0, CHUNK)
    held = state + pair * inner * outer + d[:, None] * outer + e[None]
    inside = (d[:, None] < inner) & (e[None] < outer)
    sums = tl.load(held, mask=inside, other=0.0)
    seen = (step[None] >= step[:, None]) if REVERSE else (step[None] <= step[:, None])
    chunks = tl.cdiv(last - first, CHUNK)
    for number in range(chunks):
        chunk = chunks - 1 - number if REVERSE else number
        tokens = first + chunk * CHUNK + step
        row = tokens * heads + head
        wide = (tokens < last)[:, None] & (d[None] < inner)
        narrow = (tokens < last)[:, None] & (e[None] < outer)
        a_rows = tl.load(a + row[:, None] * inner + d[None], mask=wide, other=0.0)
        b_rows = tl.load(b + row[:, None] * inner + d[None], mask=wide, other=0.0)
        c_rows = tl.load(c + row[:, None] * outer + e[None], mask=narrow, other=0.0)
        scores = tl.where(seen, tl.dot(a_rows, tl.trans(b_rows), input_precision="ieee"), 0.0)
        made = tl.dot(scores, c_rows, input_precision="ieee") + tl.dot(a_rows, sums, input_precision="ieee")
        tl.store(out + row[:, None] * outer + e[None], made, mask=narrow)
        sums += tl.dot(tl.trans(b_rows), c_rows, input_precision="ieee")
    tl.store(held, sums, mask=inside)
