"""Ragged attention is dense attention under the mask that the definition gives, on every path and kernel version."""

import inspect
import itertools
import math
from types import SimpleNamespace

import pytest
import torch

from dpo_lightning.functional import attention, varlen
from dpo_lightning.functional.attention import plain_attention, ragged_causal_attention
from dpo_lightning.functional.layout import RaggedLayout, causal_mask, grouped
from dpo_lightning.functional.varlen import varlen_applies, varlen_keywords

# Prompt length and response lengths of each example, by the largest number of responses.
STREAMS = {
    1: [(3, [4]), (1, [1]), (6, [2])],
    2: [(5, [3, 4]), (1, [2, 1]), (2, [7])],
    3: [(7, [5, 6, 2]), (2, [3, 1])],
    4: [(4, [1, 6, 2, 5]), (1, [1, 1, 1, 1]), (3, [2, 8])],
}
WINDOW, HEADS, SIZE = 3, 4, 8
OPTIONS = {
    "plain": {},
    "window": {"window": WINDOW},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": torch.tensor([-1.0, 0.0, 1.0, 2.0], dtype=torch.float64)},
}
OPTIONS["all"] = {name: value for option in OPTIONS.values() for name, value in option.items()}


def layout_of(examples):
    """Spans and keys of a stream, written from their definition."""
    spans, keys, cursor = [], [], 0
    for prompt, responses in examples:
        begin, cursor = cursor, cursor + prompt
        for index, response in enumerate(responses):
            start, cursor = cursor, cursor + response
            first = index == 0
            spans.append((begin, cursor, begin, begin) if first else (start, cursor, begin, begin + prompt))
            keys += [*range(begin, begin + prompt), *range(start, cursor)]
    query = [end - start for start, end, _, _ in spans]
    key = [end - start + stop - begin for start, end, begin, stop in spans]
    return RaggedLayout(torch.tensor(spans), torch.tensor(keys), max(query), max(key))


def allowed(examples, window=None):
    """Who may see whom: of its own example, the prompt and its own response, up to its own position."""
    tokens = []
    for number, (prompt, responses) in enumerate(examples):
        tokens += [(number, None, position) for position in range(prompt)]
        for index, response in enumerate(responses):
            tokens += [(number, index, prompt + position) for position in range(response)]
    mask = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
    for (i, me), (j, other) in itertools.product(enumerate(tokens), repeat=2):
        related = me[0] == other[0] and other[1] in (None, me[1])
        distance = me[2] - other[2]
        mask[i, j] = related and distance >= 0 and (window is None or distance < window)
    return mask


def dense(query, key, value, mask, *, scale, softcap=None, sinks=None):
    """Attention of T tokens to T tokens under a mask; states (T, H, size)."""
    groups = query.shape[1] // key.shape[1]
    key, value = (torch.stack([part[:, h // groups] for h in range(query.shape[1])], 1) for part in (key, value))
    scores = torch.einsum("ihd,jhd->hij", query, key) * scale
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~mask, float("-inf"))
    total = scores.logsumexp(-1)
    if sinks is not None:
        total = torch.logaddexp(total, sinks.to(scores)[:, None])
    return torch.einsum("hij,jhd->ihd", (scores - total[..., None]).exp(), value)


def random_states(examples, kv_heads=HEADS, dtype=torch.float64, value_size=SIZE):
    tokens = sum(prompt + sum(responses) for prompt, responses in examples)
    generator = torch.Generator().manual_seed(0)
    shapes = (tokens, HEADS, SIZE), (tokens, kv_heads, SIZE), (tokens, kv_heads, value_size)
    return [torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def value_and_gradients(out, states):
    cotangent = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out).sin()
    return [out, *torch.autograd.grad((out * cotangent).sum(), states)]


def assert_equals_dense(states, examples, layout, **kwargs):
    out = ragged_causal_attention(*states, layout, **kwargs)
    window = kwargs.pop("window", None)
    exact = [state.detach().double().requires_grad_() for state in states]
    expected = value_and_gradients(dense(*exact, allowed(examples, window), **kwargs), exact)
    tolerance = 1e-12 if out.dtype == torch.float64 else 1e-5
    for got, want in zip(value_and_gradients(out, states), expected, strict=True):
        assert got.dtype == out.dtype
        torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=tolerance)


# What a call costs by itself: nothing, so that every sequence is one; a little; so much that all are padded together.
@pytest.fixture(params=[0, 10 * HEADS * SIZE, 2**30], ids=["one by one", "some together", "all together"])
def cost_of_a_call(request, monkeypatch):
    monkeypatch.setitem(attention.CALL, "cpu", request.param)


@pytest.mark.usefixtures("cost_of_a_call")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("num_responses", STREAMS)
def test_the_stream_equals_dense_attention_under_its_mask(num_responses, option, kv_heads, dtype):
    examples = STREAMS[num_responses]
    states = random_states(examples, kv_heads, dtype)
    assert_equals_dense(states, examples, layout_of(examples), scale=0.4, **OPTIONS[option])


@pytest.mark.usefixtures("cost_of_a_call")
@pytest.mark.parametrize("window", [1, 2, 7, 8, 13, 14, 100])
def test_any_window_counts_positions_across_the_prompts_end(window):
    examples = STREAMS[3]  # sequences of 12, 13, 9, 5 and 3 tokens
    assert_equals_dense(random_states(examples), examples, layout_of(examples), scale=0.4, window=window)


@pytest.mark.usefixtures("cost_of_a_call")
@pytest.mark.parametrize("option", ["plain", "all"])
def test_values_may_have_another_size_than_keys(option):
    examples = STREAMS[2]
    states = random_states(examples, value_size=3)
    assert_equals_dense(states, examples, layout_of(examples), scale=0.4, **OPTIONS[option])


@pytest.mark.usefixtures("cost_of_a_call")
@pytest.mark.parametrize("option", OPTIONS)
def test_without_prefixes_the_stream_itself_is_the_keys(option):
    examples = STREAMS[1]
    gathered = layout_of(examples)
    assert gathered.key_index.tolist() == list(range(len(gathered.key_index)))
    direct = RaggedLayout(gathered.spans, None, gathered.max_query, gathered.max_key)
    states = random_states(examples)
    out = [ragged_causal_attention(*states, layout, scale=0.4, **OPTIONS[option]) for layout in (direct, gathered)]
    assert torch.equal(*out)
    assert_equals_dense(states, examples, direct, scale=0.4, **OPTIONS[option])


def test_lengths_of_queries_and_keys_by_hand():
    layout = layout_of([(2, [3, 4]), (1, [1])])  # p p a a a b b b b | p a
    assert layout.spans.tolist() == [[0, 5, 0, 0], [5, 9, 0, 2], [9, 11, 9, 9]]
    assert layout.key_index.tolist() == [0, 1, 2, 3, 4, 0, 1, 5, 6, 7, 8, 9, 10]
    assert layout.lengths == [(5, 5), (4, 6), (2, 2)]
    assert (layout.cu_query.tolist(), layout.cu_key.tolist()) == ([0, 5, 9, 11], [0, 5, 11, 13])
    assert layout.cu_query.dtype == layout.cu_key.dtype == torch.int32  # what the kernel takes


@pytest.mark.parametrize(
    ("lengths", "overhead", "expected"),
    [
        ([(5, 5), (4, 4), (5, 5)], 0, [[0, 2], [1]]),  # equal shapes need no padding
        ([(5, 5), (4, 4)], 9, [[0, 1]]),
        ([(5, 5), (4, 4)], 8, [[0], [1]]),
        ([(5, 5), (2, 5), (5, 5), (3, 5)], 100, [[0, 2], [3, 1]]),  # with a prefix a mask is needed
        ([(2, 6), (4, 5)], 100, [[0, 1]]),  # the second has more queries
        ([(2, 6), (4, 5)], 3, [[0], [1]]),  # 2 x (4 x 6) for 12 + 20 wastes 16
        ([(9, 9)], 0, [[0]]),
    ],
)
def test_sequences_of_like_shape_go_together_where_padding_costs_less_than_a_call(lengths, overhead, expected):
    assert grouped(lengths, overhead) == expected


def test_blocks_are_made_once_a_forward_for_all_layers():
    layout = layout_of(STREAMS[3])
    assert layout.blocks(50) is layout.blocks(50)
    assert layout.blocks(50, window=layout.max_key) is layout.blocks(50)  # a window that nothing leaves
    assert layout.blocks(50, window=2) is not layout.blocks(50)


@pytest.mark.parametrize(
    ("query", "key", "window", "expected"),
    [
        (3, 3, None, ["x..", "xx.", "xxx"]),
        (2, 4, None, ["xxx.", "xxxx"]),  # the queries are the last two keys
        (3, 3, 2, ["x..", "xx.", ".xx"]),
        (2, 5, 2, ["..xx.", "...xx"]),
        (1, 3, 1, ["..x"]),
    ],
)
def test_causal_mask_by_hand(query, key, window, expected):
    mask = causal_mask(torch.arange(key - query, key), torch.arange(key), window)
    assert mask.tolist() == [[mark == "x" for mark in row] for row in expected]


@pytest.mark.parametrize("wide_up_to", [0, 256])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sixteen_bit_states_give_sixteen_bit_outputs_within_rounding(option, dtype, wide_up_to, monkeypatch):
    monkeypatch.setattr(attention, "WIDE_UP_TO", wide_up_to)
    examples = STREAMS[3]
    states = [state.detach().to(dtype) for state in random_states(examples)]
    out = ragged_causal_attention(*states, layout_of(examples), scale=0.4, **OPTIONS[option])
    exact = ragged_causal_attention(
        *(state.double() for state in states), layout_of(examples), scale=0.4, **OPTIONS[option]
    )
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, atol=4 * torch.finfo(dtype).eps, rtol=4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("option", ["plain", "softcap"])
def test_dropout_drops_weights_and_keeps_their_mean(option):
    examples = [(1, [1])] * 500
    layout = RaggedLayout(torch.arange(1000).view(-1, 1) + torch.tensor([0, 1, 0, 0]), None, 1, 1)  # a token a sequence
    query, key, _ = random_states(examples)
    torch.manual_seed(0)
    ones = torch.ones(1000, HEADS, SIZE, dtype=torch.float64)
    out = ragged_causal_attention(query, key, ones, layout, scale=1.0, dropout=0.25, **OPTIONS[option])
    kept = (out[..., 0] > 0).double()
    torch.testing.assert_close(out, (kept / 0.75)[..., None].expand_as(out))
    assert kept.mean() == pytest.approx(0.75, abs=0.03)


def test_a_query_that_may_see_nothing_is_finite():
    # Left padding when a batch of prompts is continued: NaN would spread to every later layer.
    mask = torch.tensor([[False, False], [False, True]])
    query = torch.randn(1, 2, 8)
    out = plain_attention(query, query, query, mask, scale=1.0, softcap=2.0)
    assert out.isfinite().all()


def test_sixteen_bit_scores_meet_sinks_in_fp32():
    state = torch.tensor([[[8.0, 0.0]]], dtype=torch.bfloat16)  # score 64
    sinks = torch.tensor([64.1])  # which bf16 would round to 64, and the weight to one half
    out = plain_attention(state, state, torch.ones_like(state), None, scale=1.0, sinks=sinks)
    torch.testing.assert_close(out.float(), torch.full((1, 1, 2), 1 / (1 + math.exp(0.1))), atol=2e-3, rtol=0)


# What `inspect.signature` says of `varlen_attn` in each version.
def kernel_2_10(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False, return_aux=None):
    return cpu_kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window=(-1, 0) if is_causal else (-1, -1))


def kernel_2_11(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, return_aux=None, scale=None, window_size=(-1, -1)):
    return cpu_kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window=window_size, scale=scale)


def kernel_2_13(
    query,
    key,
    value,
    cu_seq_q,
    cu_seq_k,
    max_q,
    max_k,
    *,
    return_aux=None,
    scale=None,
    window_size=(-1, -1),
    enable_gqa=False,
    seqused_k=None,
    block_table=None,
    num_splits=None,
):
    return cpu_kernel(
        query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, window=window_size, scale=scale, grouped=enable_gqa
    )


def cpu_kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, window, scale=None, grouped=False):
    """What flash attention says that it computes: query i of a sequence stands at key i + keys - queries."""
    assert grouped or query.shape[1] == key.shape[1] == value.shape[1], "this kernel does not repeat heads"
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert max_q == cu_seq_q.diff().max()
    assert max_k == cu_seq_k.diff().max()
    left, right = window
    outputs = []
    for (q0, q1), (k0, k1) in zip(
        itertools.pairwise(cu_seq_q.tolist()), itertools.pairwise(cu_seq_k.tolist()), strict=True
    ):
        at = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0)
        column = torch.arange(k1 - k0)
        mask = ((left < 0) | (column >= at - left)) & ((right < 0) | (column <= at + right))
        states = query[q0:q1], key[k0:k1], value[k0:k1]
        outputs.append(dense(*states, mask, scale=query.shape[-1] ** -0.5 if scale is None else scale))
    return torch.cat(outputs)


KERNELS = {"2.10": kernel_2_10, "2.11": kernel_2_11, "2.13": kernel_2_13}


@pytest.fixture
def installed(monkeypatch):
    """A function that makes a version of the kernel the installed one, on the CPU; returns the calls that it gets."""

    def install(version):
        calls = []

        def kernel(*args, **kwargs):
            calls.append(kwargs)
            return KERNELS[version](*args, **kwargs)

        kernel.__signature__ = inspect.signature(KERNELS[version])
        monkeypatch.setattr(varlen, "varlen_kernel", lambda: kernel)
        monkeypatch.setattr(varlen, "varlen_applies", lambda query, value: True)
        return calls

    return install


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("scale", [SIZE**-0.5, 0.4], ids=["default scale", "other scale"])
@pytest.mark.parametrize("window", [None, WINDOW])
@pytest.mark.parametrize("version", KERNELS)
def test_every_version_of_the_kernel_gives_the_same_stream(version, window, scale, kv_heads, installed):
    calls = installed(version)
    examples = STREAMS[4]
    states = random_states(examples, kv_heads)
    assert_equals_dense(states, examples, layout_of(examples), scale=scale, window=window)
    by_loop = version == "2.10" and window is not None  # it has no sliding window
    assert len(calls) == (0 if by_loop else 1)


@pytest.mark.parametrize("version", KERNELS)
def test_the_kernel_reads_a_stream_without_prefixes(version, installed):
    calls = installed(version)
    examples = STREAMS[1]
    gathered = layout_of(examples)
    direct = RaggedLayout(gathered.spans, None, gathered.max_query, gathered.max_key)
    assert_equals_dense(random_states(examples), examples, direct, scale=0.4)
    assert len(calls) == 1


@pytest.mark.parametrize("option", ["softcap", "sinks"])
def test_what_the_kernel_lacks_is_written_out(option, installed):
    calls = installed("2.13")
    examples = STREAMS[2]
    assert_equals_dense(random_states(examples), examples, layout_of(examples), scale=0.4, **OPTIONS[option])
    assert not calls


def test_dropout_keeps_away_from_the_kernel(installed):
    calls = installed("2.13")
    examples = STREAMS[2]
    ragged_causal_attention(*random_states(examples), layout_of(examples), scale=0.4, dropout=0.5)
    assert not calls


@pytest.mark.parametrize(
    ("version", "grouped", "scale", "window", "expected"),
    [
        ("2.10", False, 0.25, None, {"is_causal": True}),
        ("2.10", True, 0.4, None, {"is_causal": True}),
        ("2.10", False, 0.25, 5, None),
        ("2.11", False, 0.25, None, {"window_size": (-1, 0)}),
        ("2.11", True, 0.4, 5, {"window_size": (4, 0), "scale": 0.4}),
        ("2.13", False, 0.25, 1, {"window_size": (0, 0)}),
        ("2.13", True, 0.4, 5, {"window_size": (4, 0), "scale": 0.4, "enable_gqa": True}),
    ],
)
def test_keywords_of_every_version_by_hand(version, grouped, scale, window, expected):
    parameters = inspect.signature(KERNELS[version]).parameters
    assert varlen_keywords(parameters, head_size=16, grouped=grouped, scale=scale, window=window) == expected


def test_the_installed_kernel_takes_what_it_is_given():
    signature = inspect.signature(varlen.varlen_kernel())
    keywords = varlen_keywords(signature.parameters, head_size=16, grouped=True, scale=0.4, window=None)
    signature.bind(*range(7), **keywords)  # raises if a name or the number of arguments is wrong
    assert [*signature.parameters][:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]


@pytest.mark.parametrize(
    ("capability", "dtype", "size", "value_size", "applies"),
    [
        ((8, 0), torch.bfloat16, 64, 64, True),
        ((7, 5), torch.float16, 64, 64, False),
        ((9, 0), torch.float16, 256, 256, True),
        (None, torch.bfloat16, 64, 64, False),
        ((9, 0), torch.float32, 64, 64, False),
        ((9, 0), torch.bfloat16, 60, 60, False),
        ((9, 0), torch.bfloat16, 264, 264, False),
        ((9, 0), torch.bfloat16, 64, 128, False),
    ],
)
def test_the_kernel_is_for_16_bit_states_of_even_sizes_on_ampere(
    capability, dtype, size, value_size, applies, monkeypatch
):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: capability)
    query = SimpleNamespace(is_cuda=capability is not None, device="cuda", dtype=dtype, shape=(10, 4, size))
    assert varlen_applies(query, SimpleNamespace(shape=(10, 4, value_size))) is applies


@pytest.mark.skipif(
    not torch.cuda.is_available(),
    reason="needs an NVIDIA GPU (Ampere or later); there, run `pytest tests/functional/test_attention.py -k cuda`",
)
@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("scale", [64**-0.5, 0.2])
def test_cuda_kernel_in_bf16_equals_the_loop_in_fp32(window, kv_heads, scale, monkeypatch):
    examples = [(70, [30, 41, 5]), (1, [64]), (128, [1, 129])]
    tokens = sum(prompt + sum(responses) for prompt, responses in examples)
    torch.manual_seed(0)
    states = [torch.randn(tokens, heads, 64).bfloat16() for heads in (HEADS, kv_heads, kv_heads)]
    exact = [state.float().requires_grad_() for state in states]
    layout = layout_of(examples)
    expected = value_and_gradients(ragged_causal_attention(*exact, layout, scale=scale, window=window), exact)
    on_gpu = RaggedLayout(layout.spans.cuda(), layout.key_index.cuda(), layout.max_query, layout.max_key)
    states = [state.cuda().requires_grad_() for state in states]
    monkeypatch.setattr(RaggedLayout, "blocks", None)  # the other path would need it
    out = ragged_causal_attention(*states, on_gpu, scale=scale, window=window)
    cotangent = torch.linspace(-1, 1, out.numel()).view_as(out).sin().to(out)
    got = [out, *torch.autograd.grad((out * cotangent).sum(), states)]
    for value, want in zip(got, expected, strict=True):
        assert (value.float().cpu() - want).norm() < 0.02 * want.norm()  # bf16 rounds by up to 0.004
