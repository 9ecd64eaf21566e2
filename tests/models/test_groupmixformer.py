"""GroupMixFormer against plain loops, and the properties of its variants."""

import math

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn
from torch.nn import functional as F

from models.groupmixformer import GroupMixAttention
from models.published import to_published
from tests.helpers.small_models import images, scrambled, shrunken

PARAMETERS = {"mobile": 5.7, "tiny": 11.0, "small": 22.4, "base": 45.8, "large": 71.8}  # large: the paper says 70.3


def conv(x, weight, bias=None):
    """Compute a depthwise convolution of a (H, W, C) map, pixel by pixel."""
    H, W, _ = x.shape
    k = weight.shape[-1]
    padded = F.pad(x.permute(2, 0, 1), [k // 2] * 4).permute(1, 2, 0)
    rows = [
        [(padded[i : i + k, j : j + k] * weight[:, 0].permute(1, 2, 0)).sum((0, 1)) for j in range(W)] for i in range(H)
    ]
    y = torch.stack([torch.stack(row) for row in rows])
    return y if bias is None else y + bias


def reference_attention(w, x, heads):
    """Group-mix attention by the published entries `w`, in train mode, one image, head and token at a time."""
    B, H, W, C = x.shape
    S, D = C // 5, 4 * (C // 5) // heads
    qkv = (x @ w["qkv.weight"].T + w["qkv.bias"]).unflatten(-1, (3, 5, S))
    segments = []
    for s in range(4):
        stacked = [qkv[b, :, :, t, s] for t in range(3) for b in range(B)]
        if s:
            stacked = [conv(m, w[f"aggregator.agg{s}.conv1.weight"]) for m in stacked]
            stacked = [m @ w[f"aggregator.agg{s}.pointwise_conv.weight"][:, :, 0, 0].T for m in stacked]
        rows = torch.stack(stacked)
        mean, var = rows.mean((0, 1, 2)), rows.var((0, 1, 2), unbiased=False)
        rows = (rows - mean) / (var + 1e-5).sqrt() * w[f"aggregator.norm{s}.weight"] + w[f"aggregator.norm{s}.bias"]
        segments.append(F.hardswish(rows))
    q, k, v = torch.cat(segments, -1).unflatten(0, (3, B))
    images = []
    for b in range(B):
        position, start = [], 0
        for n, width in enumerate((2 * D, 3 * D, 3 * D)):
            weight, bias = w[f"crpe.conv_list.{n}.weight"], w[f"crpe.conv_list.{n}.bias"]
            position.append(conv(v[b, :, :, start : start + width], weight, bias))
            start += width
        y = q[b] * torch.cat(position, -1)
        for h in range(heads):
            part = slice(h * D, (h + 1) * D)
            weight = k[b, :, :, part].flatten(0, 1).softmax(0)
            context = sum(torch.outer(weight[n], v[b, :, :, part].flatten(0, 1)[n]) for n in range(H * W))
            y = torch.cat(
                [
                    y[..., : h * D],
                    y[..., part] + (C / heads) ** -0.5 * q[b, :, :, part] @ context,
                    y[..., (h + 1) * D :],
                ],
                -1,
            )
        bypass = conv(qkv[b, :, :, :, 4].flatten(-2), w["aggregator.agg0.conv.conv1.weight"])
        bypass = bypass @ w["aggregator.agg0.conv.pointwise_conv.weight"][:, :, 0, 0].T
        bypass = F.layer_norm(bypass, (S,), w["aggregator.agg0.norm.weight"], w["aggregator.agg0.norm.bias"], 1e-5)
        images.append(torch.cat([y, F.hardswish(bypass)], -1))
    return torch.stack(images) @ w["proj.weight"].T + w["proj.bias"]


@pytest.fixture(scope="module")
def attention():
    """Return a small float64 model and its attention."""
    model = scrambled(shrunken("groupmixformer_mobile", depths=(1, 1, 1, 1), dims=(20, 20, 20, 20)).double())
    return model, model.stages[0].blocks[0].attn


def published_entries(model, tensors):
    ours, theirs = "stages.0.blocks.0.attn.", "groupmixformer_backbone.0.gma_stage.0.att."
    entries = to_published(model, {ours + name: tensor for name, tensor in tensors.items()})
    return {name.removeprefix(theirs): tensor for name, tensor in entries.items()}


def test_attention_equals_plain_loops(attention):
    model, attn = attention
    x = images(2, 5, 4, 20, dtype=torch.float64).requires_grad_()
    w = published_entries(model, {name: p.detach() for name, p in attn.named_parameters()})
    w = {name: tensor.clone().requires_grad_() for name, tensor in w.items()}
    y, want = attn.train()(x), reference_attention(w, x, heads=8)
    torch.testing.assert_close(y, want, rtol=1e-11, atol=1e-13)
    cotangent = images(*y.shape, seed=3, dtype=torch.float64)
    grads = torch.autograd.grad(y, [x, *attn.parameters()], cotangent)
    wanted = torch.autograd.grad(want, [x, *w.values()], cotangent)
    names = [name for name, _ in attn.named_parameters()]
    theirs = published_entries(model, dict(zip(names, grads[1:], strict=True)))
    torch.testing.assert_close(grads[0], wanted[0], rtol=1e-9, atol=1e-12)
    for name, grad in zip(w, wanted[1:], strict=True):
        torch.testing.assert_close(theirs[name], grad, rtol=1e-9, atol=1e-12, msg=name)


def test_batch_norm_statistics_run_over_q_k_and_v_together(attention):
    _, attn = attention
    x = images(2, 5, 4, 20, dtype=torch.float64)
    norm = attn.train().segments[0].norm
    norm.reset_running_stats()
    attn(x)
    rows = attn.qkv(x)[..., :12].reshape(-1, 4)  # of segment 0: q, k, v of 4 channels each
    torch.testing.assert_close(norm.running_mean, 0.1 * rows.mean(0))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * rows.var(0))
    assert norm.num_batches_tracked == 1


def test_attention_refuses_a_width_that_does_not_divide():
    with pytest.raises(ValueError, match="dim=42"):
        GroupMixAttention(42, 8)
    with pytest.raises(ValueError, match="num_heads=8"):
        GroupMixAttention(15, 8)


@pytest.mark.parametrize("size", PARAMETERS)
def test_variant_has_the_published_number_of_parameters(size):
    with torch.device("meta"):
        model = timm.create_model(f"groupmixformer_{size}")
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PARAMETERS[size], abs=0.06)


def test_drop_path_rises_linearly_over_all_blocks():
    model = timm.create_model("groupmixformer_mobile", drop_path_rate=0.21)
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.01 * i for i in range(22)])
    model.set_drop_path_rate(0.42)
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.02 * i for i in range(22)])


def test_drop_path_drops_whole_samples():
    block = shrunken("groupmixformer_mobile").stages[0].blocks[0].eval()
    x = images(64, 2, 2, 40)
    kept = block(x)
    block.drop_path.train()
    block.drop_path.drop_prob = 0.5
    base = x + block.cpe(x)
    torch.manual_seed(0)
    changed = (block(x) - base).flatten(1).norm(dim=1) > 0
    without_both = (~changed).sum().item()
    assert 6 <= without_both <= 28  # both branches of a sample fall with probability 1/4: 16 of 64 expected
    assert ((kept - base).flatten(1).norm(dim=1) > 0).all()


def test_initial_weights_are_the_published_ones():
    model = timm.create_model("groupmixformer_mobile")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            assert module.weight.std().item() == pytest.approx(0.02, rel=0.05), name
            assert not module.bias.any(), name
        if isinstance(module, nn.Conv2d):
            bound = 1 / math.sqrt(module.weight[0].numel())
            assert 0.8 * bound < module.weight.abs().max() <= bound, name
