"""metate in Hugging Face transformers: `attn_implementation="metate"`, `experts_implementation="metate"`, and quantised
checkpoints by `quantised()`; `PagedCausalLM` gives its models to `metate.generate`.

For attention two functions are registered, the attention and the mask. The mask function lowers what transformers
describes by closures (causal, sliding window, chunks, packed sequences) and the 2-D padding mask to one interval of
keys per query, which costs memory linear in the length; a pattern that it cannot read stays a bool mask. Intervals
travel through the model as an int32 tensor (batch, 1, seqlen_q, 2), followed in the last dimension by one bit per key
where padding has holes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from metate.compat import experts
from metate.compat.experts import quantize_experts, use_experts
from metate.errors import fail, require_package
from metate.generate import Batch, CacheLayout
from metate.masks import AttentionMask
from metate.ops.attention import attention, attention_varlen
from metate.ops.paged_attention import append_kv, paged_attention

__all__ = [
    "PagedCausalLM",
    "disable",
    "disable_quantised",
    "enable",
    "enable_quantised",
    "quantised",
    "quantize_experts",
    "use_experts",
]

_NAME = "metate"
_PACKAGE = "transformers", "transformers>=5"
_DECODES = "ensure_decode_fast_path_is_available"
_FAR = 2**30  # beyond any position
_SERVED_LAYERS = {"full_attention", "sliding_attention"}
_UNSERVED = ("indices", "block_indices", "sinks")  # arguments of some models that change the result

Runs = tuple[Tensor, Tensor]  # of every query the first visible key and the one behind the last, (batch or 1, seqlen_q)


def enable() -> None:
    """Makes `attn_implementation="metate"` and `experts_implementation="metate"` known to transformers; it changes no
    model that does not ask for them. A model whose code computes attention by itself (Bloom, Falcon) is then refused.

    Continuous batching (`model.generate_batch`) takes the attention too.

    Raises:
        ModuleNotFoundError: transformers is not installed.
    """
    require_package("compat.transformers.enable", *_PACKAGE)
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

    experts.register()
    AttentionInterface.register(_NAME, _attention)
    AttentionMaskInterface.register(_NAME, _mask)
    for module in _continuous_batching():
        asks = module.is_flash_attention_requested
        if not isinstance(asks, _AlsoMetate):
            module.is_flash_attention_requested = _AlsoMetate(asks)
        refuses = getattr(module, _DECODES, None)
        if refuses is not None and not hasattr(refuses, "original"):
            setattr(module, _DECODES, _keeping_pages(refuses))
    model: Any = PreTrainedModel
    if not hasattr(model.get_correct_attn_implementation, "original"):
        model.get_correct_attn_implementation = _refusing(model.get_correct_attn_implementation)


def disable() -> None:
    """Takes the registration back; models that were told to use it raise from then on."""
    from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

    experts.unregister()
    for interface in (AttentionInterface, AttentionMaskInterface):
        interface._global_mapping.pop(_NAME, None)
    for module in _continuous_batching():
        asks = module.is_flash_attention_requested
        if isinstance(asks, _AlsoMetate):
            module.is_flash_attention_requested = asks.original
        refuses = getattr(module, _DECODES, None)
        if refuses is not None:
            setattr(module, _DECODES, getattr(refuses, "original", refuses))
    model: Any = PreTrainedModel
    choose = model.get_correct_attn_implementation
    model.get_correct_attn_implementation = getattr(choose, "original", choose)


def _continuous_batching() -> tuple[Any, ...]:
    """Its modules that ask by name which attention works without masks of theirs and without repeated keys."""
    from transformers.generation.continuous_batching import cache, continuous_api, initialization

    return cache, continuous_api, initialization


class _AlsoMetate:
    """transformers' `is_flash_attention_requested`, which says yes to metate as well."""

    def __init__(self, original: Callable[..., bool]) -> None:
        self.original = original

    def __call__(
        self, config: Any = None, requested_attention_implementation: str | None = None, version: Any = None
    ) -> bool:
        name = requested_attention_implementation if config is None else config._attn_implementation
        if name == _NAME and version is None:
            return True
        return self.original(config, requested_attention_implementation, version)


def _keeping_pages(original: Callable[..., None]) -> Callable[..., None]:
    """transformers' check of whether a step of one token each may read its pages in place, as metate does anywhere."""

    @wraps(original)
    def ensure(config: Any, cb_config: Any, *args: Any, **kwargs: Any) -> None:
        wanted = cb_config.max_blocks_per_request
        if wanted and config._attn_implementation == _NAME:
            kinds = module.group_layers_by_attn_type(config)
            if all(module.ATTN_TYPE_TO_ALLOCATOR[kind].supports_block_table for kind in kinds):
                return
        original(config, cb_config, *args, **kwargs)

    module: Any = sys.modules[original.__module__]
    ensure.original = original  # type: ignore[attr-defined]
    return ensure


def _refusing(original: Callable[..., str]) -> Callable[..., str]:
    """transformers' choice of an implementation, which takes any registered name for any model."""

    @wraps(original)
    def choose(model: Any, requested: str | None, *args: Any, **kwargs: Any) -> str:
        if requested == _NAME and _attends_by_itself(type(model)):
            name = type(model).__name__
            raise ValueError(f'metate: {name} computes attention by itself, use attn_implementation="eager" with it')
        return original(model, requested, *args, **kwargs)

    choose.original = original  # type: ignore[attr-defined]
    return choose


def _attends_by_itself(model: type) -> bool:
    """Whether it would get our masks, or none at all, and read them as eager's: its numbers would be wrong."""
    members = vars(sys.modules[model.__module__])
    asks = any(getattr(member, "__module__", None) == "transformers.masking_utils" for member in members.values())
    return asks and "ALL_ATTENTION_FUNCTIONS" not in members and not getattr(model, "_supports_attention_backend", True)


def enable_quantised() -> None:
    """Lets `from_pretrained` load GPTQ, AWQ and bitsandbytes checkpoints, metate's own and GGUF files, on any device.

    Their own packages need not be there (but transformers wants gguf and accelerate for GGUF). Linear layers become
    metate.nn.QuantLinear: inference, and training of what stands on top (PEFT's LoRA). Of GGUF files (`gguf_file=`)
    those of Llama, Mistral, Mixtral (with config=), Qwen 2 and 3 (with experts too), Gemma 2 and 3 are read, embeddings
    and experts dequantised. A BitsAndBytesConfig given for a dense checkpoint quantises it. A model so loaded keeps its
    layers when this is disabled; `save_pretrained` refuses it, `metate.quant.save_quantized` writes it.

    Raises:
        ModuleNotFoundError: transformers is not installed.
    """
    require_package("compat.transformers.enable_quantised", *_PACKAGE)
    from metate.compat import quantised_loading

    quantised_loading.enable()


def disable_quantised() -> None:
    """Puts transformers' own quantisers back."""
    from metate.compat import quantised_loading

    quantised_loading.disable()


@contextmanager
def quantised() -> Iterator[None]:
    """`enable_quantised` for the length of a with block."""
    enable_quantised()
    try:
        yield
    finally:
        disable_quantised()


class PagedCausalLM:
    """A causal language model of transformers for `metate.generate` and `Scheduler`: many texts, one paged cache.

    Args:
        model: loaded with attn_implementation="metate"; layers of full or sliding-window attention, all of one shape.

    >>> enable()
    >>> model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="metate")
    >>> texts = metate.generate(PagedCausalLM(model), prompts, max_new_tokens=100)

    Raises:
        ValueError, NotImplementedError: another attention implementation; layers of another kind.
    """

    def __init__(self, model: Any) -> None:
        config = model.config.get_text_config(decoder=True)
        if config._attn_implementation != _NAME:
            expected = f'a model with attn_implementation="{_NAME}"; call its set_attn_implementation("{_NAME}")'
            raise fail("PagedCausalLM", "model", f'one with "{config._attn_implementation}"', expected)
        kinds = set(getattr(config, "layer_types", None) or ()) - _SERVED_LAYERS
        if kinds or getattr(config, "attention_chunk_size", None):
            named = ", ".join(sorted(kinds)) or "chunked_attention"
            raise NotImplementedError(f"metate.PagedCausalLM: layers of {named}: {' or '.join(sorted(_SERVED_LAYERS))}")
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        self.model, self.vocab_size = model.eval(), int(config.vocab_size)
        self.cache_layout = CacheLayout(
            config.num_hidden_layers, kv_heads, head_dim, head_dim, model.dtype, model.device
        )
        # Finished masks pass through transformers as they are, and attention over pages looks at none.
        self._mask = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=model.device)

    def forward_paged(self, batch: Batch) -> Tensor:
        """Logits (len(batch.rows), vocab_size) of the tokens `batch.rows`."""
        logits: Tensor = self.model(
            input_ids=batch.tokens[None], position_ids=batch.positions[None], attention_mask=self._mask,
            use_cache=False, logits_to_keep=batch.rows, pages=batch,
        ).logits  # fmt: skip
        return logits[0]


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    cache: Any = None,
    pages: Batch | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of query (batch, heads, seqlen_q, head_dim) over key and value that are not repeated for the group.

    A sliding window is in the mask already, as for eager attention; with the paged `cache` of continuous batching it
    comes as a number, and with the `pages` of `PagedCausalLM`.
    """
    if kwargs.get("output_attentions"):
        raise NotImplementedError(
            'metate: output_attentions is True, but the probabilities are never formed; use attn_implementation="eager"'
        )
    for name in _UNSERVED:
        if kwargs.get(name) is not None:
            raise NotImplementedError(f'metate: {name} is given to attention, use attn_implementation="eager"')
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if pages is not None:
        layer: Any = module.layer_idx
        sliding = kwargs.get("sliding_window")
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        window = (-1, -1) if sliding is None else (sliding - 1, -1)
        return pages.attend(layer, q, k, v, scale=scaling, softcap=softcap or 0.0, sinks=s_aux, window=window)[
            None
        ], None
    if cache is not None:
        options = {"scale": scaling, "softcap": softcap or 0.0, "sinks": s_aux, "causal": causal}
        return _continuous(cache, module, query, key, value, options, kwargs), None
    mask, bias = _lower(attention_mask, position_bias, key.shape[2])
    if query.shape[0] != key.shape[0]:  # learned queries of batch 1
        query = query.expand(key.shape[0], *query.shape[1:])
    out = attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        causal=causal and attention_mask is None and query.shape[2] > 1,
        top_left=True,
        scale=scaling,
        softcap=softcap or 0.0,
        bias=bias,
        sinks=s_aux,
        mask=mask,
        dropout_p=dropout,
    )
    return out, None


def _continuous(
    cache: Any, module: Any, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any], kwargs: dict[str, Any]
) -> Tensor:
    """(1, tokens, heads, value_dim): packed sequences over the paged cache, which takes their new keys and values."""
    if (sliding := kwargs.get("sliding_window")) is not None:
        options["window"] = (sliding - 1, -1 if options["causal"] else sliding - 1)
    key, value = cache.update(key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=kwargs)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    cu_seqlens_q, cu_seqlens_k = (kwargs[f"cu_seq_lens_{x}"].to(torch.int32) for x in "qk")
    if (table := kwargs.get("block_table")) is None:
        packed: Tensor = attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, **options)
        return packed[None]
    k_cache, v_cache = kwargs["k_cache"], kwargs["v_cache"]  # one new token for every sequence; not written yet
    entries, page_size = table.shape[0], k_cache.shape[1]
    lengths = cu_seqlens_k.diff()[:entries]
    last = lengths.long() - 1
    slots = table.gather(1, (last.clamp(min=0) // page_size)[:, None])[:, 0].long() * page_size + last % page_size
    slots = torch.where(last >= 0, slots, -1)
    for new, pages in ((k, k_cache), (v, v_cache)):  # one by one: they are views of one memory, by turns page for page
        append_kv(new[:entries], None, pages, None, slots)
    out = paged_attention(q[:entries], k_cache, v_cache, table, lengths, **options)
    return pad(out, (0, 0, 0, 0, 0, q.shape[0] - entries))[None]


def _lower(
    attention_mask: Tensor | None, position_bias: Tensor | None, seqlen_k: int
) -> tuple[AttentionMask | Tensor | None, Tensor | None]:
    """What may be seen, and what is added to the scores."""
    if attention_mask is None:
        return None, position_bias
    if attention_mask.dim() == 4:
        if attention_mask.dtype == torch.bool:
            return attention_mask, position_bias
        if attention_mask.is_floating_point():
            return None, attention_mask if position_bias is None else position_bias + attention_mask
        if attention_mask.dtype == torch.int32 and attention_mask.shape[3] in (2, 2 + -(-seqlen_k // 32)):
            bits = attention_mask[..., 2:] if attention_mask.shape[3] > 2 else None
            return AttentionMask(intervals=attention_mask[..., :2], bits=bits), position_bias
    got = f"{attention_mask.dtype} of shape {tuple(attention_mask.shape)}"
    if attention_mask.dtype == torch.int32:
        raise NotImplementedError(f'metate: the model changes its mask, now {got}; use attn_implementation="eager"')
    raise ValueError(
        f"metate: attention_mask is {got}, expected a bool or floating-point mask (batch, heads, seqlen_q, seqlen_k)"
    )


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,  # a tensor with static caches
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **kwargs: Any,
) -> Tensor | None:
    """The mask of a forward pass, in its cheapest form; None leaves it to is_causal of the layers."""
    from transformers import masking_utils

    function = mask_function or masking_utils.causal_mask_function
    runs = None
    # Without leave to skip the mask, its caller may go on computing with a bool one; packed sequences never may skip.
    lowers = allow_is_causal_skip or allow_is_bidirectional_skip or _is_packed(function)
    if lowers and not use_vmap and not torch.compiler.is_compiling():
        queries = torch.arange(q_length, device=device)[None] + q_offset
        runs = _runs(function, queries)
    if runs is None:
        dense: Tensor | None = masking_utils.sdpa_mask(
            batch_size=batch_size, q_length=q_length, kv_length=kv_length, q_offset=q_offset, kv_offset=kv_offset,
            mask_function=function, attention_mask=attention_mask, allow_is_causal_skip=allow_is_causal_skip,
            allow_is_bidirectional_skip=allow_is_bidirectional_skip, use_vmap=use_vmap, device=device, **kwargs,
        )  # fmt: skip
        return dense
    valid = _padding(attention_mask, kv_length, kv_offset)
    if valid is None:
        # Layers that say they are not causal take part in decoders too: of more queries than one the mask speaks.
        if function is masking_utils.causal_mask_function and allow_is_causal_skip and q_length == 1:
            return None
        if function is masking_utils.bidirectional_mask_function and allow_is_bidirectional_skip:
            return None
    return _intervals(runs, valid, batch_size, q_length, kv_length, kv_offset)


def _intervals(runs: Runs, valid: Tensor | None, batch: int, q_length: int, kv_length: int, kv_offset: int) -> Tensor:
    """The int32 mask from runs of absolute positions and the valid keys (batch, kv_length)."""
    start, end = ((x - kv_offset).clamp(0, kv_length).expand(batch, q_length) for x in runs)
    bits = None
    if valid is not None:
        first = valid.to(torch.uint8).argmax(1, keepdim=True)
        count = valid.sum(1, keepdim=True)
        last = torch.where(count > 0, kv_length - valid.flip(1).to(torch.uint8).argmax(1, keepdim=True), first)
        start, end = torch.maximum(start, first), torch.minimum(end, last)
        if not bool((last - first == count).all()):
            bits = AttentionMask.dense(valid[:, None, None]).bits
    intervals = torch.stack([start, end], -1)[:, None].to(torch.int32)
    return intervals if bits is None else torch.cat([intervals, bits.expand(-1, 1, q_length, -1)], -1)


def _padding(attention_mask: Tensor | None, kv_length: int, kv_offset: int) -> Tensor | None:
    """Which keys are no padding (batch, kv_length), keys beyond the mask being padding; None where all are valid."""
    if attention_mask is None:
        return None
    valid = attention_mask[:, kv_offset : kv_offset + kv_length].bool()
    valid = pad(valid, (0, kv_length - valid.shape[1]))
    return None if bool(valid.all()) else valid


def _is_packed(function: Callable[..., Any]) -> bool:
    return _pattern(function) == "and_masks" and any(
        _pattern(part) == "packed_sequence_mask_function" for part in _enclosed(function)["mask_functions"]
    )


def _runs(function: Callable[..., Any], q: Tensor) -> Runs | None:
    """The run of keys that each query position q (batch or 1, seqlen_q) sees under a mask function of transformers.

    None where the function is not one whose meaning is known here.
    """
    whole = torch.zeros_like(q), torch.full_like(q, _FAR)
    pattern, enclosed = _pattern(function), _enclosed(function)
    if pattern == "bidirectional_mask_function":
        return whole
    if pattern == "causal_mask_function":
        return whole[0], q + 1
    if pattern == "sliding_window_overlay":
        return q - enclosed["sliding_window"] + 1, whole[1]
    if pattern == "sliding_window_bidirectional_overlay":
        return q - enclosed["sliding_window"], q + enclosed["sliding_window"] + 1
    if pattern == "chunked_overlay":
        padding, size = enclosed["left_padding"][:, None], enclosed["chunk_size"]
        start = torch.div(q - padding, size, rounding_mode="floor") * size + padding
        return start, start + size
    if pattern == "packed_sequence_mask_function":
        start, end = AttentionMask.documents(enclosed["packed_sequence_mask"]).intervals[:, 0].long().unbind(-1)  # type: ignore[index]
        return start, end
    if pattern == "remap_positions_for_packed_sequence":
        positions = enclosed["position_ids"]  # within the sequence: runs come back as positions there
        runs = _runs(enclosed["mask_function"], positions)
        return None if runs is None else (runs[0] + q - positions, runs[1] + q - positions)
    if pattern == "and_masks":
        for part in enclosed["mask_functions"]:
            runs = _runs(part, q)
            if runs is None:
                return None
            whole = torch.maximum(whole[0], runs[0]), torch.minimum(whole[1], runs[1])
        return whole
    return None


def _pattern(function: Callable[..., Any]) -> str | None:
    """Which function of transformers.masking_utils this is, or made it."""
    if getattr(function, "__module__", None) != "transformers.masking_utils":
        return None
    return str(getattr(function, "__qualname__", "")).split(".")[0]


def _enclosed(function: Callable[..., Any]) -> dict[str, Any]:
    """Its closure by name."""
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    return {} if code is None else {n: c.cell_contents for n, c in zip(code.co_freevars, cells or (), strict=True)}
