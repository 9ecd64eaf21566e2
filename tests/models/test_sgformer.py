"""SG-Former against plain loops, and the properties of its variants."""

import itertools
import math

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from models.layers import DepthwiseConv
from models.published import to_published
from models.sgformer import DepthwiseMlp
from models.sgformer_attention import HybridScaleAttention, SelfGuidedAttention, run_tokens, window_attention
from tests.helpers.small_models import images, scrambled, shrunken

PARAMETERS = {"small": 22_545_981, "medium": 38_689_316, "base": 77_950_293}  # published: 22.5M, 39M, 78M
DIM, HEADS = 16, 4
GRIDS = [(14, 7), (9, 8), (5, 3), (16, 23)]  # only the first is made of whole windows


def linear(w, name, x):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def position(w, x):
    """The local position term of a (H, W, C) map, pixel by pixel."""
    H, W, C = x.shape
    x = linear(w, "lepe_linear", x)
    rows = []
    for i in range(H):
        for j in range(W):
            pixel = w["lepe_conv.bias"]
            for di in (-1, 0, 1):
                for dj in (-1, 0, 1):
                    if 0 <= i + di < H and 0 <= j + dj < W:
                        pixel = pixel + x[i + di, j + dj] * w["lepe_conv.weight"][:, 0, di + 1, dj + 1]
            rows.append(pixel)
    return torch.stack(rows).view(H, W, C)


def reference_hybrid(w, x, heads, r):
    """Hybrid-scale attention by the published entries `w`, an image, head, cell and window at a time."""
    ys, maps = [], []
    for image in x:
        H, W, C = image.shape
        D, half, near = C // heads, C // 2, heads // 2
        cells, where = [], []
        for i in range(0, H, r):
            for j in range(0, W, r):
                patch = image[i : i + r, j : j + r]
                kernel = w["sr.weight"][:, :, : patch.shape[0], : patch.shape[1]]
                cells.append(torch.einsum("hwc,ochw->o", patch, kernel) + w["sr.bias"])
                where.append((slice(i, i + r), slice(j, j + r)))
        cells = F.layer_norm(torch.stack(cells), (C,), w["norm.weight"], w["norm.bias"], 1e-5)
        kv = linear(w, "kv1", F.gelu(cells))
        q = linear(w, "q1", image)
        outs, wide = [], []
        for h in range(near):
            part = slice(h * D, (h + 1) * D)
            p = (q[..., part] @ kv[:, :half][:, part].T / math.sqrt(D)).softmax(-1)  # (H, W, M)
            outs.append(p @ kv[:, half:][:, part])
            wide.append(p)
        mean = torch.stack(wide).mean((0, 1, 2))
        significance = torch.zeros(H, W, dtype=x.dtype)
        for m, cell in enumerate(where):
            significance[cell] += mean[m]
        q, kv = linear(w, "q2", image), linear(w, "kv2", image)
        for h in range(near):
            out = torch.zeros(H, W, D, dtype=x.dtype)
            for i in range(0, H, 7):
                for j in range(0, W, 7):
                    window = slice(i, i + 7), slice(j, j + 7)
                    size = q[window].shape[:2]
                    part = slice(h * D, (h + 1) * D)
                    keys, values = kv[window][..., :half][..., part], kv[window][..., half:][..., part]
                    p = (q[window][..., part].flatten(0, 1) @ keys.flatten(0, 1).T / math.sqrt(D)).softmax(1)
                    out[window] = (p @ values.flatten(0, 1)).unflatten(0, size)
                    significance[window] += p.mean(0).view(size) / near
            outs.append(out)
        ys.append(linear(w, "proj", torch.cat(outs, -1) + position(w, image)))
        maps.append(significance)
    return torch.stack(ys), torch.stack(maps)


def reference_self_guided(w, x, significance, heads, r):
    """Self-guided attention by the published entries `w`, an image, run and head at a time."""
    cuts = (0, 1 / 2, 1) if r == 2 else (0, 1 / 4, 3 / 4, 1)
    ys = []
    for image, scores in zip(x, significance, strict=True):
        H, W, C = image.shape
        N, D, half = H * W, C // heads, C // 2
        ranked = image.flatten(0, 1)[scores.flatten().argsort()]
        ends = [math.ceil(N * cut) if cut > 1 / 2 else math.floor(N * cut) for cut in cuts]
        tokens = []
        for n, (start, end) in enumerate(itertools.pairwise(ends), 1):
            weight, bias = w[f"f{n}.weight"][0], w[f"f{n}.bias"]
            for first in range(start, end, len(weight)):
                run = ranked[first : min(first + len(weight), end)]
                tokens.append(sum(weight[i] * token for i, token in enumerate(run)) + bias)
        tokens, q, outs = torch.stack(tokens), linear(w, "q", image), []
        for h in range(heads):
            kv = linear(w, "kv1" if h < heads // 2 else "kv2", tokens)
            part = slice(h % (heads // 2) * D, (h % (heads // 2) + 1) * D)
            p = (q[..., h * D : (h + 1) * D] @ kv[:, :half][:, part].T / math.sqrt(D)).softmax(-1)
            outs.append(p @ kv[:, half:][:, part])
        ys.append(linear(w, "proj", torch.cat(outs, -1) + position(w, image)))
    return torch.stack(ys)


@pytest.fixture(scope="module")
def model():
    """A narrow model in float64."""
    return scrambled(shrunken("sgformer_small", dims=(DIM,) * 4, num_heads=(HEADS,) * 4).double())


def published_entries(model, stage, block, tensors):
    ours, theirs = f"stages.{stage}.blocks.{block}.attn.", f"block{stage + 1}.{block}.attn."
    entries = to_published(model, {ours + name: tensor for name, tensor in tensors.items()})
    return {name.removeprefix(theirs): tensor for name, tensor in entries.items()}


def check_against_reference(model, stage, block, reference, significance, grid):
    """Compare an attention's output and all its gradients; return the significance of both."""
    attn = model.stages[stage].blocks[block].attn
    x = images(2, *grid, DIM, dtype=torch.float64).requires_grad_()
    w = published_entries(model, stage, block, {name: p.detach() for name, p in attn.named_parameters()})
    w = {name: tensor.clone().requires_grad_() for name, tensor in w.items()}
    y, made = attn(x, significance)
    want, wanted_map = reference(w, x)
    torch.testing.assert_close(y, want, rtol=1e-11, atol=1e-13)
    cotangent = images(*y.shape, seed=3, dtype=torch.float64)
    grads = torch.autograd.grad(y, [x, *attn.parameters()], cotangent)
    wanted = torch.autograd.grad(want, [x, *w.values()], cotangent, materialize_grads=True)
    torch.testing.assert_close(grads[0], wanted[0], rtol=1e-9, atol=1e-12)
    names = [name for name, _ in attn.named_parameters()]
    theirs = published_entries(model, stage, block, dict(zip(names, grads[1:], strict=True)))
    assert theirs.keys() == w.keys()
    for name, grad in zip(w, wanted[1:], strict=True):
        torch.testing.assert_close(theirs[name], grad, rtol=1e-9, atol=1e-12, msg=name)
    return made, wanted_map


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_hybrid_scale_attention_equals_loops_over_unpadded_windows_and_cells(model, stage, grid):
    def reference(w, x):
        return reference_hybrid(w, x, HEADS, (8, 4, 2)[stage])

    made, wanted = check_against_reference(model, stage, 0, reference, None, grid)
    assert not made.requires_grad
    torch.testing.assert_close(made, wanted.detach(), rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("grid", [(14, 8), (9, 7), (5, 3), (1, 2), (16, 23)], ids=str)
@pytest.mark.parametrize("stage", [0, 1, 2])
def test_self_guided_attention_equals_loops_over_unpadded_runs(model, stage, grid):
    significance = images(2, *grid, seed=4, dtype=torch.float64)

    def reference(w, x):
        return reference_self_guided(w, x, significance, HEADS, (8, 4, 2)[stage]), None

    made, _ = check_against_reference(model, stage, 1, reference, significance, grid)
    assert made is None


@pytest.mark.parametrize("grid", [(7, 7), (3, 2)], ids=str)
def test_plain_attention_equals_loops(model, grid):
    def reference(w, x):
        D, ys = DIM // HEADS, []
        for image in x:
            q, (k, v) = linear(w, "q", image), linear(w, "kv", image).flatten(0, 1).chunk(2, -1)
            parts = [slice(h * D, (h + 1) * D) for h in range(HEADS)]
            heads = [(q[..., p] @ k[:, p].T / math.sqrt(D)).softmax(-1) @ v[:, p] for p in parts]
            ys.append(linear(w, "proj", torch.cat(heads, -1) + position(w, image)))
        return torch.stack(ys), None

    check_against_reference(model, 3, 0, reference, None, grid)


@pytest.mark.parametrize(("size", "counts"), [(224, (60, 60, 147)), (384, (178, 178, 432)), (250, (78, 80, 192))])
def test_reduced_tokens_grow_with_the_map(size, counts):
    for grid, lengths, count in zip((4, 8, 16), [(196, 56, 28), (49, 14, 7), (2, 1)], counts, strict=True):
        N = math.ceil(size / grid) ** 2
        runs = [(torch.zeros(1, length), torch.zeros(1)) for length in lengths]
        assert run_tokens(torch.zeros(1, N, 1), runs).shape == (1, count, 1)


def test_windows_never_see_their_padding():
    qkv = images(1, 8, 7, 3 * DIM, dtype=torch.float64)
    y, mean = window_attention(qkv, HEADS)
    first, first_mean = window_attention(qkv[:, :7], HEADS)
    torch.testing.assert_close(y[:, :7], first)
    torch.testing.assert_close(mean[:, :7], first_mean)
    torch.testing.assert_close(mean[:, 7:].sum(), torch.tensor(1.0, dtype=torch.float64))


def test_significance_is_made_where_the_next_block_uses_it():
    stages = shrunken("sgformer_small", depths=(3, 2, 1, 1)).stages
    hybrids = [[b.attn.guides for b in s.blocks if isinstance(b.attn, HybridScaleAttention)] for s in stages]
    assert hybrids == [[True, False], [True], [False], []]
    assert stages[0].blocks[2].attn(images(1, 7, 7, 64))[1] is None


def test_significance_stays_float32_under_autocast():
    attn = scrambled(shrunken("sgformer_small")).stages[0].blocks[0].attn
    x = images(2, 9, 15, 64)
    exact = attn(x)[1]
    with torch.autocast("cpu", torch.bfloat16):
        y, significance = attn(x)
    assert y.dtype == torch.bfloat16
    assert significance.dtype == torch.float32
    assert not torch.equal(significance, significance.bfloat16().float())
    torch.testing.assert_close(significance, exact, rtol=0.02, atol=0)


@pytest.mark.parametrize("size", PARAMETERS)
def test_variant_has_the_published_shape(size):
    with torch.device("meta"):
        model = timm.create_model(f"sgformer_{size}")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[size]
    depths = {"small": (2, 4, 16, 1), "medium": (2, 6, 28, 2), "base": (4, 6, 24, 2)}[size]
    assert tuple(len(stage.blocks) for stage in model.stages) == depths
    heads = (4, 6, 12, 24) if size == "base" else (2, 4, 8, 16)
    assert tuple(stage.blocks[0].attn.num_heads for stage in model.stages) == heads
    attentions = [block.attn for stage in list(model.stages)[:3] for block in stage.blocks]
    assert all(isinstance(attn, HybridScaleAttention) for attn in attentions[::2])
    assert all(isinstance(attn, SelfGuidedAttention) for attn in attentions[1::2])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": (3, 4, 8, 16), "dims": (96, 128, 256, 512)}, "num_heads=3 must be even"),
        ({"num_heads": (6, 4, 8, 16)}, "dim=64 must be a multiple of num_heads=6"),
        ({"dims": (66, 128, 256, 512), "num_heads": (2, 4, 8, 16)}, "dim=66 must be a multiple of 4"),
    ],
)
def test_width_that_does_not_divide_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        shrunken("sgformer_small", **arguments)


def test_drop_path_rises_linearly_over_all_blocks():
    model = timm.create_model("sgformer_small", drop_path_rate=0.22)
    rates = [block.drop_path.drop_prob for stage in model.stages for block in stage.blocks]
    assert rates == pytest.approx([0.01 * i for i in range(23)])


def test_mlp_adds_the_convolution_to_its_input():
    mlp, x = scrambled(DepthwiseMlp(6, 2.0)).double(), images(2, 5, 4, 6, dtype=torch.float64)
    t = mlp.fc1(x)
    want = mlp.fc2(F.gelu(t + DepthwiseConv.forward(mlp.depthwise, t)))
    torch.testing.assert_close(mlp(x), want, rtol=1e-12, atol=1e-14)


def test_initial_weights_are_the_published_ones():
    for name, module in shrunken("sgformer_medium", num_classes=1000).named_modules():
        if isinstance(module, nn.Linear):
            if module.weight.numel() > 1000:
                assert module.weight.std().item() == pytest.approx(0.02, rel=0.06), name
            assert module.weight.abs().max() < 0.12, name
        elif isinstance(module, nn.Conv2d):
            k, _ = module.kernel_size
            std = math.sqrt(2 / (k * k * module.out_channels / module.groups))
            assert module.weight.std().item() == pytest.approx(std, rel=0.12), name
        elif isinstance(module, nn.LayerNorm | nn.GroupNorm):
            assert (module.weight == 1).all(), name
        if getattr(module, "bias", None) is not None:
            assert not module.bias.any(), name


@pytest.mark.parametrize(("size", "grid"), [(64, (16, 16)), ((50, 90), (13, 23))], ids=str)
def test_position_embedding_starts_as_sines_and_cosines(size, grid):
    stem = shrunken("sgformer_small", img_size=size).stem
    embed = stem.pos_embed.detach().view(*grid, 64)
    assert stem.grid == grid
    for i, j, k in [(0, 0, 0), (3, 5, 0), (7, 2, 4), (12, 15, 15)]:
        frequency = 10000 ** -(k / 16)
        want = [math.sin(j * frequency), math.cos(j * frequency), math.sin(i * frequency), math.cos(i * frequency)]
        assert embed[i, j, k::16].tolist() == pytest.approx(want, abs=1e-6)


def test_position_embedding_follows_the_image():
    model = scrambled(shrunken("sgformer_small")).eval()
    ramp = torch.linspace(0, 1, 16)
    with torch.no_grad():
        model.stem.pos_embed.copy_((ramp[:, None] + 2 * ramp).view(1, 256, 1).expand(1, 256, 64))
        embed = model.stem(images(1, 3, 96, 130)) - model_without_positions(model)(images(1, 3, 96, 130))
    assert embed.shape == (1, 24, 33, 64)
    inner = embed[0, 4:-4, 4:-4, 0]  # a bicubic resize keeps a ramp but for its ends
    torch.testing.assert_close(inner[1:] - inner[:-1], torch.full((15, 25), 16 / 24 / 15), atol=2e-3, rtol=0)
    torch.testing.assert_close(inner[:, 1:] - inner[:, :-1], torch.full((16, 24), 2 * 16 / 33 / 15), atol=2e-3, rtol=0)


def model_without_positions(model):
    def stem(x):
        kept = model.stem.pos_embed.clone()
        model.stem.pos_embed.zero_()
        y = model.stem(x)
        model.stem.pos_embed.copy_(kept)
        return y

    return stem


@pytest.mark.parametrize("naming", ["ours", "theirs"])
def test_checkpoint_of_another_size_is_resized_as_at_run_time(naming, tmp_path):
    source = scrambled(shrunken("sgformer_small")).eval()
    tensors = source.state_dict() if naming == "ours" else to_published(source, source.state_dict())
    torch.save(tensors, tmp_path / "small.pth")
    larger = shrunken("sgformer_small", img_size=(96, 130), checkpoint_path=str(tmp_path / "small.pth")).eval()
    assert larger.stem.pos_embed.shape == (1, 24 * 33, 64)
    other = shrunken("sgformer_small", img_size=(96, 130)).eval()
    other.load_state_dict(tensors)
    x = images(1, 3, 96, 130)
    with torch.no_grad():
        assert torch.equal(larger(x), source(x))
        assert torch.equal(other(x), source(x))


def test_checkpoint_of_an_unknown_grid_is_refused():
    source = shrunken("sgformer_small", img_size=(64, 96))
    target = shrunken("sgformer_small", img_size=(64, 128))
    for tensors in (source.state_dict(), to_published(source, source.state_dict())):
        with pytest.raises(ValueError, match="384 positions, which make no square"):
            target.load_state_dict(tensors)
    shrunken("sgformer_small", img_size=(64, 96)).load_state_dict(source.state_dict())


def test_model_of_another_size_compiles_and_exports():
    model, x = scrambled(shrunken("sgformer_small", depths=(2, 2, 2, 1))).eval(), images(2, 3, 50, 130)
    torch._dynamo.reset()
    with torch.no_grad():
        want = model(x)
        torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(x), want)
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), want)


def test_training_under_autocast_runs_on_padded_windows():
    model = scrambled(shrunken("sgformer_small")).train()
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(images(2, 3, 75, 130))
    logits.float().square().mean().backward()
    assert logits.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
