"""flash_attn2.nn against torch.nn.MultiheadAttention, and which of its two ways each call takes."""

import copy
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from op_counter import CountForward

from flash_attn2 import nn as flash_nn

HEADS, EMBED, BATCH, L, S = 4, 24, 3, 7, 9
# On a GPU torch computes a head_dim of 6 in fp32 throughout where keys are appended; its fused
# kernels, whose P is rounded as ours is, take multiples of 8.
EMBED_OF_FUSED = 8 * HEADS
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4}


def make_pair(device="cpu", dtype=torch.float32, embed=EMBED, **options):
    """torch's module and ours with the same random parameters, biases included."""
    theirs = torch.nn.MultiheadAttention(embed, HEADS, device=device, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.3)
    ours = flash_nn.MultiheadAttention(embed, HEADS, device=device, dtype=dtype, **options)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours


def make_inputs(
    sources, batch_first, dtype, device="cpu", batch=BATCH, kdim=EMBED, vdim=EMBED, embed=EMBED
):
    """query, key, value; sources "self" (one tensor), "memory" (key is value) or "three"."""

    def randn(seqlen, features):
        shape = (batch, seqlen, features) if batch_first else (seqlen, batch, features)
        shape = shape if batch else (seqlen, features)
        return torch.randn(shape, dtype=dtype, device=device, requires_grad=True)

    if sources == "self":
        x = randn(L, embed)
        return x, x, x
    if sources == "memory":
        memory = randn(S, kdim)
        return randn(L, embed), memory, memory
    return randn(L, embed), randn(S, kdim), randn(S, vdim)


def causal_mask(rows, columns, device="cpu"):
    """torch's causal mask: True hides, aligned to the top left."""
    return torch.ones(rows, columns, dtype=torch.bool, device=device).triu(1)


def make_masks(kind, keys, dtype, batch=BATCH, device="cpu"):
    """The mask arguments of one forward call; every query keeps some key."""
    seen_first = torch.arange(keys, device=device) == 0

    def as_float(hidden):
        random = torch.randn(hidden.shape, dtype=dtype, device=device)
        return random.masked_fill(hidden, -math.inf)

    def random_bool(*shape):
        return (torch.rand(*shape, device=device) < 0.3) & ~seen_first

    padding_shape = (batch, keys) if batch else (keys,)
    attn2 = random_bool(L, keys)
    attn3 = random_bool(max(batch, 1) * HEADS, L, keys)
    padding = random_bool(*padding_shape)
    return {
        "none": {},
        "padding-bool": {"key_padding_mask": padding},
        "padding-float": {"key_padding_mask": as_float(padding)},
        "attn2-bool": {"attn_mask": attn2},
        "attn2-float": {"attn_mask": as_float(attn2)},
        "attn3-bool": {"attn_mask": attn3},
        "attn3-float": {"attn_mask": as_float(attn3)},
        "both-bool": {"attn_mask": attn2, "key_padding_mask": padding},
        "both-float": {"attn_mask": as_float(attn3), "key_padding_mask": as_float(padding)},
        "causal": {"attn_mask": causal_mask(L, keys, device), "is_causal": True},
        "causal-padding": {
            "attn_mask": causal_mask(L, keys, device),
            "is_causal": True,
            "key_padding_mask": padding & ~seen_first,
        },
    }[kind]


MASKS = [
    "none",
    "padding-bool",
    "padding-float",
    "attn2-bool",
    "attn2-float",
    "attn3-bool",
    "attn3-float",
    "both-bool",
    "both-float",
    "causal",
    "causal-padding",
]
APPENDED = [
    {},
    {"add_bias_kv": True},
    {"add_zero_attn": True},
    {"add_bias_kv": True, "add_zero_attn": True},
]


def assert_same_results(theirs, ours, inputs, call, tolerance):
    """Outputs, weights and the gradients of inputs and parameters agree, shapes included."""
    results = []
    for module in (theirs, ours):
        module.zero_grad()
        leaves = list(dict.fromkeys(inputs))
        out, weights = module(*inputs, **call)
        loss = (out * torch.linspace(-1, 1, out.numel()).to(out).view_as(out)).sum()
        if weights is not None:
            loss = loss + (weights**2).sum()
        gradients = torch.autograd.grad(loss, [*leaves, *module.parameters()])
        results.append((out, weights, *gradients))
    for index, (expected, actual) in enumerate(zip(*results, strict=True)):
        assert (expected is None) == (actual is None)
        if expected is not None:
            assert expected.shape == actual.shape
            torch.testing.assert_close(
                actual, expected, rtol=tolerance, atol=tolerance, msg=lambda m, i=index: f"{i}: {m}"
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("batch_first", [False, True], ids=["seq-first", "batch-first"])
@pytest.mark.parametrize("sources", ["self", "memory", "three"])
@pytest.mark.parametrize("mask", MASKS)
def test_same_as_torch(dtype, batch_first, sources, mask):
    keys = L if sources == "self" else S
    for appended, bias in itertools.product(APPENDED, [True, False]):
        theirs, ours = make_pair(dtype=dtype, batch_first=batch_first, bias=bias, **appended)
        inputs = make_inputs(sources, batch_first, dtype)
        masks = make_masks(mask, keys, dtype)
        for outputs in (
            {"need_weights": False},
            {"need_weights": True},
            {"need_weights": True, "average_attn_weights": False},
        ):
            call = {**masks, **outputs}
            assert_same_results(theirs, ours, inputs, call, TOLERANCE[dtype])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kdim, vdim", [(10, 14), (EMBED, 14), (10, None)])
def test_other_key_and_value_sizes(mask, kdim, vdim):
    for batch_first, appended in itertools.product([False, True], APPENDED):
        theirs, ours = make_pair(
            dtype=torch.float64, batch_first=batch_first, kdim=kdim, vdim=vdim, **appended
        )
        inputs = make_inputs("three", batch_first, torch.float64, kdim=kdim, vdim=vdim or EMBED)
        for need_weights in (False, True):
            call = {**make_masks(mask, S, torch.float64), "need_weights": need_weights}
            assert_same_results(theirs, ours, inputs, call, 1e-11)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("sources", ["self", "memory", "three"])
def test_unbatched(mask, sources):
    keys = L if sources == "self" else S
    for batch_first, appended in itertools.product([False, True], APPENDED):
        theirs, ours = make_pair(dtype=torch.float64, batch_first=batch_first, **appended)
        inputs = make_inputs(sources, batch_first, torch.float64, batch=0)
        for need_weights in (False, True):
            call = {**make_masks(mask, keys, torch.float64, batch=0), "need_weights": need_weights}
            assert_same_results(theirs, ours, inputs, call, 1e-11)


@pytest.mark.parametrize("rows, keys", [(7, 7), (4, 9), (9, 4), (1, 5), (5, 1)])
@pytest.mark.parametrize("appended", APPENDED, ids=lambda options: "+".join(options) or "plain")
def test_causal_is_aligned_to_the_top_left(rows, keys, appended):
    """torch aligns the hint to the top left for any lengths; the kernels align to bottom right."""
    theirs, ours = make_pair(dtype=torch.float64, batch_first=True, **appended)
    query = torch.randn(2, rows, EMBED, dtype=torch.float64, requires_grad=True)
    memory = torch.randn(2, keys, EMBED, dtype=torch.float64, requires_grad=True)
    call = {"attn_mask": causal_mask(rows, keys), "is_causal": True, "need_weights": False}
    with CountForward() as op:
        ours(query, memory, memory, **call)
    assert op.calls == 1
    assert_same_results(theirs, ours, (query, memory, memory), call, 1e-11)
    if not appended:  # then the hint and the mask mean the same
        call["is_causal"] = False
        by_mask = theirs(query, memory, memory, **call)[0]
        call["is_causal"] = True
        torch.testing.assert_close(ours(query, memory, memory, **call)[0], by_mask)


def test_same_initialisation_and_state_dict():
    for options in itertools.product([True, False], [True, False], [None, 10]):
        bias, add_bias_kv, kdim = options
        args = {"bias": bias, "add_bias_kv": add_bias_kv, "kdim": kdim}
        torch.manual_seed(4)
        theirs = torch.nn.MultiheadAttention(EMBED, HEADS, **args)
        torch.manual_seed(4)
        ours = flash_nn.MultiheadAttention(EMBED, HEADS, **args)
        expected, actual = theirs.state_dict(), ours.state_dict()
        assert list(expected) == list(actual)
        for name in expected:
            assert torch.equal(expected[name], actual[name]), name
        # Both ways: each loads the other's.
        torch.manual_seed(5)
        other = flash_nn.MultiheadAttention(EMBED, HEADS, **args)
        theirs.load_state_dict(other.state_dict(), strict=True)
        ours.load_state_dict(theirs.state_dict(), strict=True)
        for name, tensor in other.state_dict().items():
            assert torch.equal(ours.state_dict()[name], tensor), name


def test_survives_pickling_and_copying(tmp_path):
    _, ours = make_pair(batch_first=True)
    x = torch.randn(2, L, EMBED)
    expected = ours(x, x, x)[0]
    torch.save(ours, tmp_path / "module.pt")
    loaded = torch.load(tmp_path / "module.pt", weights_only=False)
    for other in (loaded, copy.deepcopy(ours)):
        assert type(other) is flash_nn.MultiheadAttention
        assert torch.equal(other(x, x, x)[0], expected)


@pytest.mark.parametrize("need_weights", [True, False])
def test_dropout_draws_what_torch_draws(need_weights):
    theirs, ours = make_pair(dropout=0.4, batch_first=True)
    x = torch.randn(2, L, EMBED)
    results = []
    for module in (theirs, ours):
        torch.manual_seed(6)
        results.append(module(x, x, x, need_weights=need_weights)[0])
    torch.testing.assert_close(*results, rtol=0, atol=0)
    without = ours.eval()(x, x, x, need_weights=need_weights)[0]
    assert not torch.allclose(results[0], without)


def fast_path_calls():
    """(name, module options, call options, training, expected number of op calls)."""
    plain, no_weights = {}, {"need_weights": False}
    mask = {**no_weights, "attn_mask": causal_mask(L, L)}
    padding = {**no_weights, "key_padding_mask": torch.zeros(BATCH, L, dtype=torch.bool)}
    return [
        ("plain", plain, no_weights, True, 1),
        ("evaluation", plain, no_weights, False, 1),
        ("causal hint", plain, {**mask, "is_causal": True}, True, 1),
        ("dropout in evaluation", {"dropout": 0.5}, no_weights, False, 1),
        ("appended keys", {"add_bias_kv": True, "add_zero_attn": True}, no_weights, True, 1),
        ("no bias", {"bias": False}, no_weights, True, 1),
        ("weights asked for", plain, {}, True, 0),
        ("mask without the hint", plain, mask, True, 0),
        ("padding", plain, padding, True, 0),
        ("causal and padding", plain, {**mask, **padding, "is_causal": True}, True, 0),
        ("dropout in training", {"dropout": 0.5}, no_weights, True, 0),
    ]


@pytest.mark.parametrize(
    "options, call, training, expected",
    [pytest.param(*case[1:], id=case[0]) for case in fast_path_calls()],
)
@pytest.mark.parametrize("batch_first", [False, True])
def test_which_calls_take_the_fast_path(options, call, training, expected, batch_first):
    _, ours = make_pair(batch_first=batch_first, **options)
    ours.train(training)
    (x, *_) = make_inputs("self", batch_first, torch.float32)
    with CountForward() as op:
        ours(x, x, x, **call)
    assert op.calls == expected


def test_self_attention_hands_views_of_one_product_to_the_kernel(monkeypatch):
    """No copy between the in-projection and the op, whichever dimension comes first."""
    seen = []

    def spy(q, k, v, **options):
        seen.append((q, k, v))
        return torch.zeros_like(q, memory_format=torch.contiguous_format)

    monkeypatch.setattr("flash_attn2.nn.mha.flash_attn_func", spy)
    for batch_first in (False, True):
        _, ours = make_pair(batch_first=batch_first)
        (x, *_) = make_inputs("self", batch_first, torch.float32)
        ours(x, x, x, need_weights=False)
        q, k, v = seen.pop()
        assert q.shape == (BATCH, L, HEADS, EMBED // HEADS)
        storages = {t.untyped_storage().data_ptr() for t in (q, k, v)}
        assert len(storages) == 1
        assert q.untyped_storage().nbytes() == 3 * BATCH * L * EMBED * q.element_size()


def test_errors_are_torchs():
    theirs, ours = make_pair(batch_first=True)
    x, wrong = torch.randn(2, L, EMBED), torch.randn(2, L, EMBED + 1)
    mask = causal_mask(L, L)
    calls = [
        ((x, x, x), {"is_causal": True}),
        ((x, x, x), {"is_causal": True, "need_weights": False}),
        ((x, x, x), {"attn_mask": mask.int(), "is_causal": True, "need_weights": False}),
        ((x, x, x), {"attn_mask": mask[:, :-1], "need_weights": False}),
        ((x, x, x), {"attn_mask": mask[None, None], "is_causal": True, "need_weights": False}),
        ((wrong, x, x), {"need_weights": False}),
        ((x, wrong, wrong), {"need_weights": False}),
        ((x, x, x[:, :-1]), {"need_weights": False}),
        ((x, x[0], x[0]), {"need_weights": False}),
        ((x[None], x[None], x[None]), {"need_weights": False}),
    ]
    for args, options in calls:
        with pytest.raises((RuntimeError, AssertionError)) as expected:
            theirs(*args, **options)
        with pytest.raises(type(expected.value)) as actual:
            ours(*args, **options)
        assert str(actual.value) == str(expected.value)
    with pytest.raises(RuntimeError, match="dtype"):
        ours(x.double(), x.double(), x.double(), need_weights=False)
    for bad in ((0, 1), (8, 3)):
        with pytest.raises((ValueError, AssertionError)):
            flash_nn.MultiheadAttention(*bad)


def test_hint_with_a_mask_of_a_wrong_shape_is_left_to_torch():
    """torch drops the mask without looking at its shape; so must the replacement."""
    theirs, ours = make_pair(dtype=torch.float64, batch_first=True)
    x = torch.randn(2, L, EMBED, dtype=torch.float64, requires_grad=True)
    call = {"attn_mask": causal_mask(3, 3), "is_causal": True, "need_weights": False}
    assert_same_results(theirs, ours, (x, x, x), call, 1e-11)


@pytest.mark.parametrize("batch, rows, keys", [(0, 4, 4), (2, 0, 4), (2, 4, 0)])
def test_empty_inputs(batch, rows, keys):
    theirs, ours = make_pair(batch_first=True)
    query, memory = torch.randn(batch, rows, EMBED), torch.randn(batch, keys, EMBED)
    expected = theirs(query, memory, memory, need_weights=False)[0]
    actual = ours(query, memory, memory, need_weights=False)[0]
    assert actual.shape == (batch, rows, EMBED)
    torch.testing.assert_close(actual, expected)


def test_nested_tensors_behave_as_in_torch():
    theirs, ours = make_pair(batch_first=True)
    rows = [torch.randn(n, EMBED) for n in (3, 5)]
    x = torch.nested.nested_tensor(rows)
    with torch.no_grad():
        expected = theirs.eval()(x, x, x, need_weights=False)[0]
        actual = ours.eval()(x, x, x, need_weights=False)[0]
    assert actual.is_nested
    for a, b, row in zip(actual.unbind(), expected.unbind(), rows, strict=True):
        torch.testing.assert_close(a, b)
        alone = ours(row, row, row, need_weights=False)[0]
        torch.testing.assert_close(a, alone, rtol=1e-5, atol=1e-5)
    with pytest.raises(AssertionError, match="NestedTensor"):
        ours.train()(x, x, x, need_weights=False)


def test_autocast():
    theirs, ours = make_pair(batch_first=True)
    x = torch.randn(2, L, EMBED)
    exact = theirs.double()(*[x.double()] * 3, need_weights=False)[0]
    theirs.float()
    with torch.autocast("cpu", dtype=torch.bfloat16), CountForward() as op:
        expected = theirs(x, x, x, need_weights=False)[0]
        actual = ours(x, x, x, need_weights=False)[0]
    assert op.calls == 1
    assert actual.dtype == expected.dtype == torch.bfloat16
    assert (actual - exact).norm() < 1.5 * (expected - exact).norm()


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_compile_fullgraph(dynamic, causal):
    torch.compiler.reset()
    _, ours = make_pair(batch_first=True)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for length in (5, 8):
        x = torch.randn(2, length, EMBED, requires_grad=True)
        call = {"need_weights": False}
        if causal:
            call |= {"attn_mask": causal_mask(length, length), "is_causal": True}
        expected, actual = ours(x, x, x, **call)[0], compiled(x, x, x, **call)[0]
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(
            *(torch.autograd.grad(out.square().sum(), x)[0] for out in (actual, expected))
        )


def dense_attention(q, k, v, hidden=None, scale=None):
    """Reference in fp64: (b, s, h, d) inputs, heads of k and v repeated."""
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -math.inf)
    return (F.softmax(scores, dim=-1) @ v).transpose(1, 2)


def test_flash_self_attention():
    qkv = torch.randn(2, 6, 3, 4, 8)
    q, k, v = qkv.unbind(2)
    hidden = causal_mask(6, 6)
    module = flash_nn.FlashSelfAttention(softmax_scale=0.2)
    close = {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False}
    torch.testing.assert_close(module(qkv), dense_attention(q, k, v, scale=0.2), **close)
    causal = dense_attention(q, k, v, hidden, scale=0.2)
    torch.testing.assert_close(module(qkv, causal=True), causal, **close)
    module = flash_nn.FlashSelfAttention(causal=True, window_size=(2, -1))
    band = hidden | torch.ones(6, 6, dtype=torch.bool).tril(-3)
    torch.testing.assert_close(module(qkv), dense_attention(q, k, v, band), **close)
    torch.testing.assert_close(
        module(qkv, causal=False, max_seqlen=6),
        dense_attention(q, k, v, torch.ones(6, 6, dtype=torch.bool).tril(-3)),
        **close,
    )


def test_flash_cross_attention():
    q, kv = torch.randn(2, 4, 6, 8), torch.randn(2, 7, 2, 3, 8)
    k, v = kv.unbind(2)
    close = {"rtol": 1e-4, "atol": 1e-5, "check_dtype": False}
    module = flash_nn.FlashCrossAttention()
    torch.testing.assert_close(module(q, kv), dense_attention(q, k, v), **close)
    bottom_right = torch.ones(4, 7, dtype=torch.bool).triu(4)
    causal = dense_attention(q, k, v, bottom_right)
    torch.testing.assert_close(module(q, kv, causal=True), causal, **close)
    torch.testing.assert_close(flash_nn.FlashCrossAttention(causal=True)(q, kv), causal, **close)


def test_arguments_not_supported_yet_are_named():
    qkv, cu = torch.randn(2, 6, 3, 4, 8), torch.tensor([0, 6, 12], dtype=torch.int32)
    q, kv = qkv[:, :, 0], qkv[:, :, 1:]
    with pytest.raises(NotImplementedError, match="cu_seqlens"):
        flash_nn.FlashSelfAttention()(qkv, cu_seqlens=cu, max_seqlen=6)
    with pytest.raises(NotImplementedError, match="cu_seqlens "):
        flash_nn.FlashCrossAttention()(q, kv, cu_seqlens=cu)
    with pytest.raises(NotImplementedError, match="cu_seqlens_k"):
        flash_nn.FlashCrossAttention()(q, kv, cu_seqlens_k=cu)
    with pytest.raises(NotImplementedError, match="alibi_slopes"):
        flash_nn.FlashSelfAttention(alibi_slopes=torch.rand(4))(qkv)
    module = flash_nn.FlashSelfAttention(attention_dropout=0.1)
    with pytest.raises(NotImplementedError, match="dropout"):
        module(qkv)
    expected = flash_nn.FlashSelfAttention()(qkv)
    assert torch.equal(module.eval()(qkv), expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("mask", ["none", "padding-bool", "attn2-float", "causal"])
@pytest.mark.parametrize("batch_first", [False, True])
def test_gpu_error_is_no_larger_than_torchs(dtype, mask, batch_first):
    """Outputs and input gradients against fp64; the yardstick is torch's module in the dtype.

    The tensors are tiny, so the squares of the errors are summed over several draws.
    """
    for appended in APPENDED:
        squares = torch.zeros(2, 3, dtype=torch.float64, device="cuda")
        for _ in range(8):
            squares += module_error_squares(dtype, mask, batch_first, appended)
        for theirs, own, exact in squares.sqrt():
            assert own <= 1.3 * theirs + 1e-4 * exact


def module_error_squares(dtype, mask, batch_first, appended):
    """Rows: output, input gradient. Columns: squared error of torch's, of ours, squared norm."""
    theirs, ours = make_pair("cuda", dtype, EMBED_OF_FUSED, batch_first=batch_first, **appended)
    exact = copy.deepcopy(theirs).double()
    (x, *_) = make_inputs("self", batch_first, dtype, "cuda", embed=EMBED_OF_FUSED)
    call = {**make_masks(mask, L, dtype, device="cuda"), "need_weights": False}
    exact_call = {
        name: m.double() if torch.is_tensor(m) and m.is_floating_point() else m
        for name, m in call.items()
    }
    with CountForward() as op:
        actual = ours(x, x, x, **call)[0]
    assert op.calls == (mask in ("none", "causal"))
    expected = theirs(x, x, x, **call)[0]
    x64 = x.detach().double().requires_grad_()
    reference = exact(x64, x64, x64, **exact_call)[0]
    loss_weights = torch.randn_like(reference)
    gradients = [
        torch.autograd.grad((out.double() * loss_weights).sum(), leaf)[0].double()
        for out, leaf in ((reference, x64), (expected, x), (actual, x))
    ]
    rows = [
        [x.detach().norm() for x in (torchs - exact_value, own - exact_value, exact_value)]
        for exact_value, torchs, own in ((reference, expected, actual), gradients)
    ]
    return torch.stack([torch.stack(row) for row in rows]).double() ** 2


@pytest.mark.gpu
def test_gpu_fp32_takes_sdpa_unless_autocast_is_on():
    theirs, ours = make_pair("cuda", batch_first=True)
    (x, *_) = make_inputs("self", True, torch.float32, "cuda")
    with CountForward() as op:
        actual = ours(x, x, x, need_weights=False)[0]
    assert op.calls == 0
    torch.testing.assert_close(actual, theirs(x, x, x, need_weights=False)[0])
    with torch.autocast("cuda", dtype=torch.bfloat16), CountForward() as op:
        ours(x, x, x, need_weights=False)
    assert op.calls == 1


@pytest.mark.gpu
def test_gpu_compile_fullgraph():
    torch.compiler.reset()
    _, ours = make_pair("cuda", torch.bfloat16, batch_first=True)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, L, EMBED, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    call = {"need_weights": False, "attn_mask": causal_mask(L, L, "cuda"), "is_causal": True}
    with CountForward() as op:
        expected = ours(x, x, x, **call)[0]
    assert op.calls == 1
    actual = compiled(x, x, x, **call)[0]
    torch.testing.assert_close(actual, expected)
    gradients = [torch.autograd.grad(out.square().sum(), x)[0] for out in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=2e-2, atol=2e-2)
