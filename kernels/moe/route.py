"""Choosing experts: the k best of every row of logits with their weights, and the gradient of those weights."""

import triton
import triton.language as tl

from ..shared import rounded

SOFTMAX, SOFTMAX_CHOSEN, SIGMOID, SQRT_SOFTPLUS = (tl.constexpr(score) for score in range(4))
WORST = tl.constexpr(-(2**63))  # below the key of every number


@triton.jit
def keys_of(value, number):
    """Whole numbers in the order of the values, NaN above all; of equal values the lower number has the higher key."""
    bits = (value + 0.0).to(tl.int32, bitcast=True)  # one zero
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (tl.where(value == value, bits, 0x7FFFFFFF).to(tl.int64) << 32) | (0x7FFFFFFF - number).to(tl.int64)


@triton.jit
def value_of(key):
    bits = (key >> 32).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def log1p(x):
    """log(1 + x) for 0 ≤ x ≤ 1, as 2 artanh(x / (2 + x)): the series needs no logarithm that is exact beside 1."""
    s = x / (2.0 + x)
    square = s * s
    series = 1.0 / 17
    for term in tl.static_range(15, 0, -2):
        series = series * square + 1.0 / term
    return 2.0 * s * series


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def softplus(x):
    return tl.where(x > 0.0, x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def own_score(x, SCORE: tl.constexpr):
    """Scores that no other logit has a part in."""
    if SCORE == SIGMOID:
        x = sigmoid(x)
    elif SCORE == SQRT_SOFTPLUS:
        x = tl.sqrt_rn(softplus(x))
    return x


@triton.jit
def load_logits(logits, strides, t, tokens, expert, real):
    """-inf where there is no expert."""
    pointers = logits + (t.to(tl.int64) * strides[0])[:, None] + (expert.to(tl.int64) * strides[1])[None, :]
    x = tl.load(pointers, mask=(t < tokens)[:, None] & real[None, :], other=0.0)
    return tl.where(real[None, :], x.to(tl.float32), float("-inf"))


@triton.jit
def allowed_groups(values, number, real, groups, top_groups, GROUP_RULE: tl.constexpr, GROUPS: tl.constexpr,
                   SIZE: tl.constexpr):  # fmt: skip
    """Whether each column's group is one of the best."""
    ROWS: tl.constexpr = values.shape[0]
    key = tl.reshape(tl.where(real[None, :], keys_of(values, number[None, :]), WORST), (ROWS, GROUPS, SIZE))
    best = tl.max(key, 2)
    value = value_of(best)
    if GROUP_RULE == 1:
        second = tl.max(tl.where(key == best[:, :, None], WORST, key), 2)
        value += tl.where(second == WORST, 0.0, value_of(second))
    group = tl.arange(0, GROUPS)
    left = tl.where((group < groups)[None, :], keys_of(value, group[None, :]), WORST)
    for _ in range(top_groups):
        left = tl.where(left == tl.max(left, 1)[:, None], WORST, left)
    allowed = tl.broadcast_to((left == WORST)[:, :, None], (ROWS, GROUPS, SIZE))
    return tl.reshape(allowed, (ROWS, GROUPS * SIZE))


@triton.jit(do_not_specialize=["tokens", "k", "top_groups"])
def topk_kernel(logits, bias, weights, experts, strides, tokens, group_size, groups, top_groups, k, scaling,
                SCORE: tl.constexpr, GROUP_RULE: tl.constexpr, RENORMALISE: tl.constexpr, BLOCK_T: tl.constexpr,
                GROUPS: tl.constexpr, SIZE: tl.constexpr, K: tl.constexpr):  # fmt: skip
    """BLOCK_T rows a program; experts lie in GROUPS runs of SIZE columns, the last of each empty."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, GROUPS * SIZE)
    number = column // SIZE * group_size + column % SIZE
    real = (column // SIZE < groups) & (column % SIZE < group_size)
    x = load_logits(logits, strides, t, tokens, number, real)
    scores = own_score(x, SCORE)
    if SCORE == SOFTMAX:
        scores = tl.exp(x - tl.max(x, 1)[:, None])
        scores = scores / tl.sum(scores, 1)[:, None]
    choice = x
    if bias is not None:
        choice = scores + tl.load(bias[0] + number.to(tl.int64) * bias[1], mask=real, other=0.0).to(tl.float32)[None, :]
    key = tl.where(real[None, :], keys_of(choice, number[None, :]), WORST)
    if GROUPS > 1:
        values = scores if GROUP_RULE == 1 and bias is None else choice
        key = tl.where(allowed_groups(values, number, real, groups, top_groups, GROUP_RULE, GROUPS, SIZE), key, WORST)

    j = tl.arange(0, K)[None, :]
    weight = tl.zeros((BLOCK_T, K), tl.float32)
    chosen = tl.zeros((BLOCK_T, K), tl.int32)
    for i in range(k):
        top = tl.max(key, 1)[:, None]
        weight = tl.where(j == i, tl.sum(tl.where(key == top, scores, 0.0), 1)[:, None], weight)
        chosen = tl.where(j == i, (0x7FFFFFFF - (top & 0x7FFFFFFF)).to(tl.int32), chosen)
        key = tl.where(key == top, WORST, key)
    if SCORE == SOFTMAX_CHOSEN:
        weight = tl.where(j < k, weight, float("-inf"))
        weight = tl.exp(weight - tl.max(weight, 1)[:, None])
        weight = weight / tl.sum(weight, 1)[:, None]
    if RENORMALISE:
        weight = weight / (tl.sum(tl.where(j < k, weight, 0.0), 1)[:, None] + 1e-20)
    at = t.to(tl.int64)[:, None] * k + j
    inside = (t < tokens)[:, None] & (j < k)
    tl.store(weights + at, weight * scaling, mask=inside)
    tl.store(experts + at, chosen, mask=inside)


@triton.jit(do_not_specialize=["tokens", "k"])
def topk_backward_kernel(grad, logits, experts, d_logits, grad_strides, strides, expert_strides, tokens, size, k,
                         scaling, SCORE: tl.constexpr, RENORMALISE: tl.constexpr, BLOCK_T: tl.constexpr,
                         SIZE: tl.constexpr, K: tl.constexpr):  # fmt: skip
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.arange(0, SIZE)
    wide = t.to(tl.int64)[:, None]
    inside = (t < tokens)[:, None] & (column < size)[None, :]
    j = tl.arange(0, K).to(tl.int64)
    given = (t < tokens)[:, None] & (j < k)[None, :]
    number = tl.load(experts + wide * expert_strides[0] + (j * expert_strides[1])[None, :], mask=given, other=-1)
    given &= (number >= 0) & (number < size)
    slope = tl.load(grad + wide * grad_strides[0] + (j * grad_strides[1])[None, :], mask=given, other=0.0)
    slope = rounded(slope, scaling)  # or it would not cancel against their sum
    pointers = logits + wide * strides[0] + number.to(tl.int64) * strides[1]
    logit = tl.load(pointers, mask=given, other=float("-inf")).to(tl.float32)

    weight = own_score(logit, SCORE)
    scores = tl.zeros((BLOCK_T, SIZE), tl.float32)
    if SCORE == SOFTMAX:
        x = load_logits(logits, strides, t, tokens, column, column < size)
        largest = tl.max(x, 1)[:, None]
        scores = tl.exp(x - largest)
        total = tl.sum(scores, 1)[:, None]
        weight = tl.exp(logit - largest) / total
        scores = scores / total
    elif SCORE == SOFTMAX_CHOSEN:
        weight = tl.exp(logit - tl.max(logit, 1)[:, None])
        weight = weight / tl.sum(weight, 1)[:, None]
    weight = tl.where(given, weight, 0.0)
    if RENORMALISE:
        total = tl.sum(weight, 1)[:, None] + 1e-20
        slope = (slope - tl.sum(slope * (weight / total), 1)[:, None]) / total  # 0 of a weight that is alone
    common = tl.sum(slope * weight, 1)[:, None]
    if SCORE == SOFTMAX_CHOSEN:
        slope = weight * (slope - common)
    elif SCORE == SIGMOID:
        slope = slope * weight * (1.0 - weight)
    elif SCORE == SQRT_SOFTPLUS:
        slope = slope * sigmoid(logit) / (2.0 * weight)

    d_x = tl.zeros((BLOCK_T, SIZE), tl.float32)
    for i in range(k):
        own = (j == i)[None, :] & given
        where = tl.max(tl.where(own, number, -1), 1)[:, None]
        d_x += tl.where(column[None, :] == where, tl.sum(tl.where(own, slope, 0.0), 1)[:, None], 0.0)
    if SCORE == SOFTMAX:
        d_x = scores * (d_x - common)
    tl.store(d_logits + wide * size + column[None, :], d_x.to(d_logits.dtype.element_ty), mask=inside)
