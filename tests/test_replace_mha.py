"""flash_attn2.nn.replace_mha: models keep their answers, parameters, hooks and shape."""

import copy
import runpy
from pathlib import Path

import pytest
import torch
from op_counter import CountForward
from torch import nn

from flash_attn2.nn import MultiheadAttention, replace_mha

D_MODEL, HEADS, BATCH, LENGTH = 16, 4, 3, 6


def encoder(dropout=0.0, **options):
    layer = nn.TransformerEncoderLayer(
        D_MODEL, HEADS, 32, dropout=dropout, batch_first=True, **options
    )
    stack = nn.TransformerEncoder(layer, 2)
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return stack


def left_padding():
    lengths = torch.tensor([6, 2, 4])
    return torch.arange(LENGTH) >= lengths[:, None]


def causal():
    return nn.Transformer.generate_square_subsequent_mask(LENGTH)


def encoder_calls():
    padding = left_padding()
    return {
        "plain": {},
        "padding": {"src_key_padding_mask": padding},
        "scattered padding": {"src_key_padding_mask": padding.flip(1)},
        "mask": {"mask": causal()},
        "bool mask": {"mask": causal() != 0},
        "causal hint": {"mask": causal(), "is_causal": True},
        "mask and padding": {"mask": causal() != 0, "src_key_padding_mask": padding},
    }


@pytest.mark.parametrize("call", encoder_calls())
@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_encoder_answers_the_same(call, norm_first):
    arguments = encoder_calls()[call]
    theirs = encoder(norm_first=norm_first)
    ours = replace_mha(copy.deepcopy(theirs))
    src = torch.randn(BATCH, LENGTH, D_MODEL)

    for model in (theirs, ours):
        model.train()
    outs = [model(src, **arguments) for model in (theirs, ours)]
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-5, atol=1e-5)
    gradients = [
        torch.autograd.grad(out.square().sum(), list(model.parameters()))
        for out, model in zip(outs, (theirs, ours), strict=True)
    ]
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-4)

    for model in (theirs, ours):
        model.eval()
    for fused in (True, False):
        torch.backends.mha.set_fastpath_enabled(fused)
        try:
            with torch.no_grad():
                fast = [model(src, **arguments) for model in (theirs, ours)]
            with_grad = ours(src, **arguments)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        torch.testing.assert_close(fast[1], fast[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(with_grad, outs[0], rtol=1e-5, atol=1e-5)


def test_evaluation_runs_the_kernels_once_torchs_fused_layer_is_off():
    model = replace_mha(encoder()).eval()
    src = torch.randn(BATCH, LENGTH, D_MODEL)
    counts = []
    for fused in (True, False):
        torch.backends.mha.set_fastpath_enabled(fused)
        try:
            with torch.no_grad(), CountForward() as op:
                model(src)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
        counts.append(op.calls)
    assert counts == [0, 2]


@pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
@pytest.mark.parametrize("batch_first", [False, True])
def test_whole_transformer(batch_first):
    theirs = nn.Transformer(D_MODEL, HEADS, 2, 2, 32, dropout=0.0, batch_first=batch_first)
    ours = replace_mha(copy.deepcopy(theirs))
    kinds = [type(m) for m in ours.modules() if isinstance(m, nn.MultiheadAttention)]
    assert kinds == [MultiheadAttention] * 6
    src, tgt = torch.randn(BATCH, LENGTH, D_MODEL), torch.randn(BATCH, 5, D_MODEL)
    if not batch_first:
        src, tgt = src.transpose(0, 1), tgt.transpose(0, 1)
    calls = [
        {},
        {"tgt_mask": nn.Transformer.generate_square_subsequent_mask(5), "tgt_is_causal": True},
        {
            "tgt_mask": nn.Transformer.generate_square_subsequent_mask(5) != 0,
            "src_key_padding_mask": left_padding(),
            "memory_key_padding_mask": left_padding(),
        },
        {
            "memory_mask": torch.ones(5, LENGTH, dtype=torch.bool).triu(1),
            "memory_is_causal": True,
        },
    ]
    for training in (True, False):
        for call in calls:
            outs = [model.train(training)(src, tgt, **call) for model in (theirs, ours)]
            torch.testing.assert_close(outs[1], outs[0], rtol=1e-5, atol=1e-5)
    with CountForward() as op:
        ours.train()(src, tgt)
    assert op.calls == 6


def test_parameters_hooks_and_flags_are_kept():
    model = encoder().double()
    model.layers[1].eval()
    seen = []
    handle = model.layers[0].self_attn.register_forward_hook(lambda *_: seen.append("hook"))
    before = dict(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    keys = list(model.state_dict())

    assert replace_mha(model) is model
    after = dict(model.named_parameters())
    assert list(model.state_dict()) == keys
    assert all(after[name] is parameter for name, parameter in before.items())
    assert model.layers[0].self_attn.training and not model.layers[1].self_attn.training
    assert next(model.parameters()).dtype == torch.float64

    src = torch.randn(BATCH, LENGTH, D_MODEL, dtype=torch.float64)
    model(src).square().sum().backward()
    assert seen == ["hook"]
    handle.remove()
    model(src)
    assert seen == ["hook"]
    weight = model.layers[0].self_attn.in_proj_weight
    old = weight.detach().clone()
    optimizer.step()
    assert not torch.equal(weight, old)


def test_shared_modules_stay_shared():
    attention = nn.MultiheadAttention(D_MODEL, HEADS)
    model = nn.ModuleDict({"a": attention, "b": nn.ModuleList([attention])})
    replace_mha(model)
    assert model["a"] is model["b"][0]
    assert type(model["a"]) is MultiheadAttention


def test_a_bare_module_and_a_second_call():
    attention = nn.MultiheadAttention(D_MODEL, HEADS, batch_first=True)
    x = torch.randn(2, LENGTH, D_MODEL)
    expected = attention(x, x, x)
    replaced = replace_mha(replace_mha(attention))
    assert type(replaced) is MultiheadAttention
    torch.testing.assert_close(replaced(x, x, x), expected)


def test_subclasses_are_left_alone():
    class Doubled(nn.MultiheadAttention):
        def forward(self, *args, **kwargs):
            out, weights = super().forward(*args, **kwargs)
            return 2 * out, weights

    model = nn.Sequential(Doubled(D_MODEL, HEADS))
    replace_mha(model)
    assert type(model[0]) is Doubled


def test_wrong_argument():
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got list"):
        replace_mha([nn.Linear(2, 2)])


def test_compiled_encoder():
    torch.compiler.reset()
    model = replace_mha(encoder())
    src = torch.randn(BATCH, LENGTH, D_MODEL)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(src), model(src))


@pytest.mark.gpu
@pytest.mark.parametrize("training", [True, False])
def test_gpu_encoder_answers_the_same(training):
    theirs = encoder().to("cuda", torch.bfloat16).train(training)
    ours = replace_mha(copy.deepcopy(theirs))
    exact = copy.deepcopy(theirs).double()
    src = torch.randn(BATCH, LENGTH, D_MODEL, device="cuda", dtype=torch.bfloat16)
    with CountForward() as op:
        actual = ours(src)
    assert op.calls == 2
    reference, expected = exact(src.double()), theirs(src)
    allowed = 1.3 * (expected - reference).norm() + 1e-3 * reference.norm()
    assert (actual - reference).norm() <= allowed


def test_example_runs(capsys):
    sizes = ["--layers", "1", "--heads", "2", "--hidden", "16", "--seqlen", "20", "--repeats", "1"]
    path = Path(__file__).resolve().parents[1] / "examples" / "replace_mha.py"
    main = runpy.run_path(str(path))["main"]
    assert main(["--device", "cpu", *sizes]) < 1e-5
    assert capsys.readouterr().out.count("ms, forward and backward") == 2
