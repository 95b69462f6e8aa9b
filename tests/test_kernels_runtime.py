"""The kernels inside a CUDA program: streams, graphs, devices, memory, 64-bit offsets."""

import concurrent.futures
import gc

import pytest
import torch
from cases import Case, random_inputs
from numerics import Result, assert_result, run_op

from flash_attn2 import flash_attn_func, flash_attn_qkvpacked_func

pytestmark = pytest.mark.gpu

forward = torch.ops.flash_attn2.forward.default
backward = torch.ops.flash_attn2.backward.default

GIB = 1 << 30


@pytest.fixture
def clean_memory():
    """Tests that count or fill memory: nothing cached before, nothing left behind."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    yield
    gc.collect()
    torch.cuda.empty_cache()


def needs_memory(gib: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < gib * GIB:
        pytest.skip(f"needs {gib} GiB of free GPU memory, {free / GIB:.0f} GiB are there")


# Streams, graphs, devices -------------------------------------------------------------------------


def test_current_stream_is_used():
    """Inputs that are written late on a side stream: a launch on another one would miss them."""
    case = Case(300, 300, 4, 4, mask="causal")
    inputs = random_inputs(case, torch.bfloat16, "cuda")
    expected = run_op(inputs, case.softmax_scale, case.window, deterministic=True)
    q, k, v, dout, dlse = (torch.zeros_like(x) for x in inputs)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)  # about 50 ms
        for x, late in zip((q, k, v, dout, dlse), inputs, strict=True):
            x.copy_(late.detach())
        out, lse = forward(q, k, v, case.softmax_scale, *case.window)
        grads = backward(dout, q, k, v, out, lse, dlse, case.softmax_scale, *case.window, True)
    stream.synchronize()
    for name, x, want in zip(Result._fields, (out, lse, *grads), expected, strict=True):
        assert torch.equal(x, want), name


def test_no_synchronisation_with_the_host():
    q = torch.randn(2, 300, 4, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    flash_attn_func(q, q, q, causal=True).sum().backward()  # what is set up once
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        flash_attn_func(q, q, q, causal=True).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # The mode sees torch's calls alone: a wait inside the op would also take as long as the sleep.
    start, end = torch.cuda.Event(), torch.cuda.Event()
    start.record()
    torch.cuda._sleep(1_000_000_000)
    flash_attn_func(q, q, q, causal=True)
    end.record()
    assert not end.query()


@pytest.mark.parametrize("deterministic", [False, True])
def test_graph_capture_and_replay(deterministic):
    case = Case(300, 400, 8, 2, head_dim=128, mask="causal")
    inputs = random_inputs(case, torch.bfloat16, "cuda")
    q, k, v, dout, dlse = inputs

    def run():
        out, lse, _ = flash_attn_func(
            q, k, v, causal=True, deterministic=deterministic, return_attn_probs=True
        )
        return Result(out, lse, *torch.autograd.grad((out, lse), (q, k, v), (dout, dlse)))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()

    for _ in range(3):
        fresh = random_inputs(case, torch.bfloat16, "cuda")
        with torch.no_grad():
            for x, new in zip(inputs, fresh, strict=True):
                x.copy_(new)
            for x in captured:
                x.fill_(torch.nan)
        graph.replay()
        got = Result(*(x.detach().clone() for x in captured))
        assert_result(got, fresh, case)
        if deterministic:
            eager = run_op(fresh, case.softmax_scale, case.window, deterministic=True)
            for name, x, want in zip(Result._fields, got, eager, strict=True):
                assert torch.equal(x, want), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_device():
    case = Case(300, 400, 8, 2, mask="causal")
    inputs = random_inputs(case, torch.bfloat16, "cuda:1")
    assert torch.cuda.current_device() == 0
    got = run_op(inputs, case.softmax_scale, case.window)
    assert torch.cuda.current_device() == 0
    assert all(x.device == torch.device("cuda", 1) for x in got)
    assert_result(got, inputs, case)
    with pytest.raises(RuntimeError, match="k: device is cuda:0, it must be q's cuda:1"):
        forward(inputs.q, inputs.k.to("cuda:0"), inputs.v, 0.125)


@pytest.mark.parametrize("length", [0, 100])
def test_the_first_call_to_cuda_of_a_thread(length):
    """Memory comes from the cache, so nothing before the kernels makes a context current."""
    q = torch.randn(2, length, 4, 64, device="cuda", dtype=torch.float16)
    k, v = torch.randn(2, 2, 70, 4, 64, device="cuda", dtype=torch.float16).unbind()

    def run():
        out, lse = forward(q, k, v, 0.125)
        return out, lse, *backward(q, q, k, v, out, lse, None, 0.125, deterministic=True)

    expected = run()
    run()  # its memory goes to the cache
    torch.cuda.synchronize()
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        results = pool.submit(run).result()
    for x, y in zip(results, expected, strict=True):
        assert torch.equal(x, y)


def test_threads():
    """Calls from several threads at once, each with a stream of its own."""
    from concurrent.futures import ThreadPoolExecutor

    case = Case(200, 300, 4, 4, mask="causal")
    all_inputs = [random_inputs(case, torch.bfloat16, "cuda") for _ in range(8)]
    torch.cuda.synchronize()

    def run(inputs):
        q, k, v, dout, dlse = (x.detach() for x in inputs)
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(10):
                out, lse = forward(q, k, v, case.softmax_scale, *case.window)
                grads = backward(dout, q, k, v, out, lse, dlse, case.softmax_scale, *case.window)
        torch.cuda.synchronize()
        return Result(out, lse, *grads)

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(run, all_inputs))
    for got, inputs in zip(results, all_inputs, strict=True):
        assert_result(got, inputs, case)


# Memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("length", [32_768, 131_072])
def test_peak_memory_is_linear(clean_memory, length, head_dim):
    """Within 10% of inputs, outputs, gradients, LSE and the fp32 dq."""
    needs_memory(16)
    heads = 4
    before = torch.cuda.memory_allocated()
    q, k, v, dout = (
        torch.randn(1, length, heads, head_dim, device="cuda", dtype=torch.bfloat16)
        for _ in range(4)
    )
    for x in (q, k, v):
        x.requires_grad_()
    tensor = q.numel() * q.element_size()
    torch.cuda.reset_peak_memory_stats()
    out = flash_attn_func(q, k, v, causal=True)
    grads = torch.autograd.grad(out, (q, k, v), dout)
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    lse, dq_accum = heads * length * 4, 2 * tensor
    expected = 4 * tensor + tensor + 3 * tensor + lse + dq_accum
    assert peak <= 1.1 * expected, f"{peak / GIB:.2f} GiB, expected {expected / GIB:.2f} GiB"
    assert all(x.isfinite().all() for x in (out, *grads))


@pytest.mark.parametrize("head_dim_v", [192, 128])
def test_forward_allocates_its_outputs_alone(clean_memory, head_dim_v):
    q = torch.randn(2, 4096, 8, 192, device="cuda", dtype=torch.bfloat16)
    v = torch.randn(2, 4096, 8, head_dim_v, device="cuda", dtype=torch.bfloat16)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out, lse = forward(q, q, v, 0.1)
    needed = out.numel() * 2 + lse.numel() * 4
    # Less than a MiB more: the allocator rounds, a copy would take 16 MiB.
    assert torch.cuda.max_memory_allocated() - before < needed + (1 << 20)


def test_a_fused_projection_is_not_copied(clean_memory):
    qkv = torch.randn(2, 4096, 3, 8, 128, device="cuda", dtype=torch.bfloat16)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out, lse, _ = flash_attn_qkvpacked_func(qkv, causal=True, return_attn_probs=True)
    needed = out.numel() * 2 + lse.numel() * 4
    # Less than a MiB more: the allocator rounds, a copy would take 16 MiB.
    assert torch.cuda.max_memory_allocated() - before < needed + (1 << 20)


# More than 2^31 elements --------------------------------------------------------------------------


def test_contiguous_tensors_beyond_2_31_elements(clean_memory):
    needs_memory(50)
    case = Case(128, 128, 64, 1, head_dim=64, batch=4100)
    inputs = random_inputs(case, torch.bfloat16, "cuda")
    q, k, v, dout, dlse = (x.detach() for x in inputs)
    assert q.numel() > 2**31
    out, lse = forward(q, k, v, case.softmax_scale, -1, 0)
    dq, dk, dv = backward(dout, q, k, v, out, lse, dlse, case.softmax_scale, -1, 0)
    # The first batch elements and the last, those beyond 2^31 elements among them.
    for part in (slice(0, 2), slice(4098, 4100)):
        sample = type(inputs)(*(x[part] for x in (q, k, v, dout, dlse)))
        got = Result(*(x[part] for x in (out, lse, dq, dk, dv)))
        assert_result(got, sample, Case(128, 128, 64, 1, batch=2, mask="causal"))


def test_strides_beyond_2_31_elements(clean_memory):
    """Views of one large buffer, whose batch, row and head strides reach past 2^31 elements."""
    needs_memory(20)
    buffer = torch.empty(2**32, dtype=torch.bfloat16, device="cuda")
    sizes = (2, 130, 2, 64)
    far = 2**31 + 2**20
    strides = (
        (far, 128, 64, 1),  # batch
        (2**14, 2**24, 64, 1),  # rows: 129 * 2^24 > 2^31
        (128 * 130, 64, far, 1),  # heads
    )
    for stride in strides:
        case = Case(130, 130, mask="causal")
        inputs = random_inputs(case, torch.bfloat16, "cuda")
        views = []
        for i, x in enumerate(inputs[:4]):
            view = buffer.as_strided(sizes, stride, storage_offset=i * 2**16)
            view.copy_(x.detach())
            views.append(view)
        q, k, v, dout = views
        out, lse = forward(q, k, v, case.softmax_scale, *case.window)
        grads = backward(dout, q, k, v, out, lse, inputs.dlse, case.softmax_scale, *case.window)
        assert_result(Result(out, lse, *grads), inputs, case)


# Host ---------------------------------------------------------------------------------------------


def test_a_right_answer_follows_an_error():
    """A refused call leaves the context usable, and the next call right."""
    case = Case(100, 100)
    inputs = random_inputs(case, torch.bfloat16, "cuda")
    wrong = torch.randn(2, 100, 3, 64, device="cuda", dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="k: has 3 heads"):
        forward(inputs.q, wrong, wrong, 0.125)
    torch.cuda.synchronize()
    assert_result(run_op(inputs, case.softmax_scale), inputs, case)
