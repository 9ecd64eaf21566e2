"""STViT against plain loops, and the properties of its variants."""

import math

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn

from models.kernels.neighborhood import overlap_add, unfold_neighbors
from models.published import to_published
from models.stvit import (
    Attention,
    Block,
    SuperTokenAttention,
    average,
    from_cells,
    lowered,
    neighbor_affinity,
    to_cells,
)
from tests.helpers.small_models import images, scrambled, shrunken

PARAMETERS = {"small": 25_495_624, "base": 51_691_288, "large": 94_971_096}  # published: 25M, 52M, 95M
AROUND = [(di, dj) for di in (-1, 0, 1) for dj in (-1, 0, 1)]


def doubles(*shape, seed=1):
    return images(*shape, seed=seed, dtype=torch.float64)


def reference_attention(attn, x):
    """Plain attention of one (N, C) list of tokens, one head and query at a time."""
    N, C = x.shape
    K = attn.num_heads
    D = C // K
    qkv = (x @ attn.qkv.weight[:, :, 0, 0].T + attn.qkv.bias).view(N, K, 3, D)
    rows = []
    for n in range(N):
        heads = []
        for h in range(K):
            weight = torch.stack([qkv[n, h, 0] @ qkv[m, h, 1] * D**-0.5 for m in range(N)]).softmax(0)
            heads.append(sum(weight[m] * qkv[m, h, 2] for m in range(N)))
        rows.append(torch.cat(heads))
    return torch.stack(rows) @ attn.proj.weight[:, :, 0, 0].T + attn.proj.bias


def reference_affinity(pixels, tokens, side):
    """Return, by pixel and cell, the affinity of each pixel to the nine cells around it."""
    affinity = {}
    for (i, j), p in pixels.items():
        around = [(i // side + di, j // side + dj) for di, dj in AROUND]
        logits = [p @ tokens.get(cell, torch.zeros_like(p)) * len(p) ** -0.5 for cell in around]
        affinity.update({((i, j), cell): a for cell, a in zip(around, torch.stack(logits).softmax(0), strict=True)})
    return affinity


def reference_average(pixels, affinity, cell):
    """Average the pixels around a cell, weighted by their affinity to it."""
    given = [(p, affinity[at, cell]) for at, p in pixels.items() if (at, cell) in affinity]
    return sum(a * p for p, a in given) / (sum(a for _, a in given) + 1e-12)


def reference_image(attn, image, through_affinity, through_iterations):
    """Super-token attention of one (H, W, C) map."""
    H, W, C = image.shape
    side = attn.cell
    h, w = math.ceil(H / side), math.ceil(W / side)
    grid = [(i, j) for i in range(h * side) for j in range(w * side)]
    pixels = {(i, j): image[i, j] if i < H and j < W else image.new_zeros(C) for i, j in grid}
    tokens = {(a, b): 0 for a in range(h) for b in range(w)}
    for (i, j), p in pixels.items():
        tokens[i // side, j // side] = tokens[i // side, j // side] + p / side**2
    for _ in range(attn.num_iters):
        if not through_iterations:
            tokens = {cell: token.detach() for cell, token in tokens.items()}
        affinity = reference_affinity(pixels, tokens, side)
        if not through_affinity:
            affinity = {key: a.detach() for key, a in affinity.items()}
        tokens = {cell: reference_average(pixels, affinity, cell) for cell in tokens}
    refined = reference_attention(attn, torch.stack(list(tokens.values())))
    tokens = dict(zip(tokens, refined, strict=True))
    left = [(i, j) for i in range(H) for j in range(W)]
    y = [sum(affinity[at, cell] * token for cell, token in tokens.items() if (at, cell) in affinity) for at in left]
    return torch.stack(y).view(H, W, C)


def reference_super_tokens(attn, x, through_affinity=False, through_iterations=False):
    """Super-token attention of a (B, H, W, C) map, one pixel and neighbour at a time.

    The flags let gradients through where the model lets none, to show that a test would notice.
    """
    return torch.stack([reference_image(attn, image, through_affinity, through_iterations) for image in x])


def small_attention(cell, num_iters=1):
    return scrambled(SuperTokenAttention(8, 2, cell, num_iters).double())


def gradients(output, x, attn):
    return torch.autograd.grad(output, [x, *attn.parameters()], doubles(*output.shape, seed=3))


@pytest.mark.parametrize("num_iters", [1, 3])
@pytest.mark.parametrize(("cell", "size"), [(2, (6, 4)), (2, (5, 7)), (3, (4, 8)), (4, (3, 2)), (4, (1, 9))], ids=str)
def test_super_token_attention_equals_plain_loops(cell, size, num_iters):
    attn, x = small_attention(cell, num_iters), 2 * doubles(2, *size, 8).requires_grad_()
    y, want = attn(x), reference_super_tokens(attn, x)
    torch.testing.assert_close(y, want, rtol=1e-11, atol=1e-13)
    for got, wanted in zip(gradients(y, x, attn), gradients(want, x, attn), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("flags", [{"through_affinity": True}, {"through_affinity": True, "through_iterations": True}])
def test_no_gradient_passes_through_affinity_or_earlier_iterations(flags):
    attn, x = small_attention(cell=2, num_iters=2), 2 * doubles(1, 4, 4, 8).requires_grad_()
    y, other = attn(x), reference_super_tokens(attn, x, **flags)
    torch.testing.assert_close(y, other, rtol=1e-11, atol=1e-13)
    ours, theirs = gradients(y, x, attn)[0], gradients(other, x, attn)[0]
    assert (ours - theirs).abs().max() > 1e-3 * ours.abs().max()


def test_iterations_before_the_last_change_the_output():
    x = 2 * doubles(1, 4, 4, 8)
    once, twice = small_attention(cell=2), small_attention(cell=2, num_iters=2)
    assert (once(x) - twice(x)).abs().max() > 1e-4
    assert timm.create_model("stvit_small", num_iters=2).stages[1].blocks[0].attn.num_iters == 2


def test_autocast_takes_pixels_in_its_own_type_from_the_start():
    attn, x = small_attention(cell=2).float(), images(2, 5, 7, 8).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = attn(x)
        assert torch.equal(y, attn(x.bfloat16()))
    torch.testing.assert_close(y.float(), attn(x), rtol=0, atol=0.02)
    (grad,) = torch.autograd.grad(y.float().sum(), x)
    assert grad.dtype == torch.float32
    assert lowered(x) is x


def test_attention_equals_plain_loops():
    attn, x = scrambled(Attention(12, 3).double()), doubles(2, 3, 4, 12).requires_grad_()
    y = attn(x)
    want = torch.stack([reference_attention(attn, tokens) for tokens in x.flatten(1, 2)]).view(x.shape)
    torch.testing.assert_close(y, want, rtol=1e-11, atol=1e-13)
    for got, wanted in zip(gradients(y, x, attn), gradients(want, x, attn), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-12)


def test_neighbour_outside_the_grid_takes_part_in_the_softmax():
    cells, tokens = doubles(1, 1, 1, 4, 8), doubles(1, 1, 1, 8, seed=2)
    affinity = neighbor_affinity(cells, tokens)[0, 0, 0]  # (9, M)
    own = (cells[0, 0, 0] @ tokens[0, 0, 0] * 8**-0.5).exp()
    torch.testing.assert_close(affinity[4], own / (own + 8))
    torch.testing.assert_close(affinity[0], 1 / (own + 8))


def test_average_of_faint_affinity_survives_float16():
    cells = images(1, 2, 2, 16, 8).half()
    affinity = images(1, 2, 2, 9, 16, seed=2).exp()
    affinity[:, 0, 1, 3] = affinity[:, 1, 0, 1] = affinity[:, 1, 1, 0] = 1e-9  # all that cell (0, 0) gets from others
    affinity[:, 0, 0, 4] *= 1e-9
    got = average(cells, affinity)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.double(), average(cells.double(), affinity.double()), rtol=0, atol=4e-3)


def test_token_without_affinity_is_zero():
    affinity = images(1, 2, 2, 9, 16).exp()
    affinity[:, 0, 1, 3] = affinity[:, 1, 0, 1] = affinity[:, 1, 1, 0] = affinity[:, 0, 0, 4] = 0
    tokens = average(images(1, 2, 2, 16, 8), affinity)
    assert not tokens[0, 0, 0].any()
    assert tokens.isfinite().all()


def test_neighbours_are_those_of_the_padded_grid():
    x = doubles(2, 3, 4, 5)
    got = unfold_neighbors(x)
    for i in range(3):
        for j in range(4):
            for n, (di, dj) in enumerate(AROUND):
                inside = 0 <= i + di < 3 and 0 <= j + dj < 4
                assert torch.equal(got[:, i, j, n], x[:, i + di, j + dj] if inside else torch.zeros_like(x[:, 0, 0]))


def test_overlap_add_is_the_adjoint_of_neighbours():
    x, y = doubles(2, 3, 4, 5), doubles(2, 3, 4, 9, 5, seed=2)
    torch.testing.assert_close((unfold_neighbors(x) * y).sum(), (x * overlap_add(y)).sum(), rtol=1e-12, atol=0)
    x, y = doubles(1, 2, 3, 1).requires_grad_(), doubles(1, 2, 3, 9, 1).requires_grad_()
    assert torch.autograd.gradcheck(unfold_neighbors, (x,))
    assert torch.autograd.gradcheck(overlap_add, (y,))
    assert torch.autograd.gradgradcheck(lambda x: unfold_neighbors(x).square(), (x,))


def test_overlap_add_adds_in_float32():
    y = images(4, 5, 6, 9, 32).bfloat16()
    assert torch.equal(overlap_add(y), overlap_add(y.float()).bfloat16())


@pytest.mark.parametrize("size", [(8, 12), (7, 9), (1, 1)], ids=str)
def test_from_cells_inverts_to_cells(size):
    x = doubles(2, *size, 3)
    cells = to_cells(x, 4)
    assert cells.shape == (2, math.ceil(size[0] / 4), math.ceil(size[1] / 4), 16, 3)
    assert torch.equal(cells[:, 0, 0, 0], x[:, 0, 0])
    torch.testing.assert_close(cells.sum(), x.sum())  # the rest is zeros
    assert torch.equal(from_cells(cells, 4, *size), x)


def test_block_scales_and_adds_its_branches():
    block, x = scrambled(Block(16, 2, 2, scaled=True).double()).train(), doubles(2, 4, 4, 16)
    y = x + block.cpe(x)
    y = y + block.gamma1.view(16) * block.attn(nn.functional.layer_norm(y, (16,), *block.norm1.parameters(), 1e-6))
    mean, var = y.mean((0, 1, 2)), y.var((0, 1, 2), unbiased=False)
    normed = (y - mean) / (var + 1e-5).sqrt() * block.norm2.weight + block.norm2.bias
    torch.testing.assert_close(block(x), y + block.gamma2.view(16) * block.mlp(normed), rtol=1e-11, atol=1e-12)


def test_autocast_normalises_in_float32():
    block, x = scrambled(Block(16, 2, 4)), images(4, 40, 40, 16).bfloat16()
    cotangent = images(*x.shape, seed=3).add(0.05)
    grads = []
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = block(x if autocast else x.float())
        grads.append(torch.autograd.grad(y, block.norm1.bias, cotangent.to(y.dtype))[0])
    assert (grads[1] - grads[0]).norm() < 0.02 * grads[0].norm()


@pytest.mark.parametrize(("size", "stages"), [("small", []), ("base", [2, 3]), ("large", [2, 3])])
def test_layer_scale_is_where_published(size, stages):
    model = shrunken(f"stvit_{size}", depths=(1, 1, 2, 2))
    scales = {name: p for name, p in model.named_parameters() if "gamma" in name}
    assert scales.keys() == {f"stages.{i}.blocks.{j}.gamma{n}" for i in stages for j in (0, 1) for n in (1, 2)}
    for p in scales.values():
        assert p.ndim == 4  # so it decays, as published
        assert (p == 1e-6).all()


@pytest.mark.parametrize("size", PARAMETERS)
def test_variant_has_the_published_number_of_parameters(size):
    with torch.device("meta"):
        model = timm.create_model(f"stvit_{size}")
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[size]


@pytest.mark.parametrize(
    ("size", "dims", "depths", "heads"),
    [
        ("small", [64, 128, 320, 512], [3, 5, 9, 3], [1, 2, 5, 8]),
        ("base", [96, 192, 384, 512], [4, 6, 14, 6], [2, 3, 6, 8]),
        ("large", [96, 192, 448, 640], [4, 7, 19, 8], [2, 3, 7, 10]),
    ],
)
def test_variant_has_the_published_shape(size, dims, depths, heads):
    with torch.device("meta"):
        model = timm.create_model(f"stvit_{size}")
    assert [info["num_chs"] for info in model.feature_info] == dims
    assert [len(stage.blocks) for stage in model.stages] == depths
    assert [{block.attn.num_heads for block in stage.blocks} for stage in model.stages] == [{h} for h in heads]
    cells = [{getattr(block.attn, "cell", 1) for block in stage.blocks} for stage in model.stages]
    assert cells == [{8}, {4}, {1}, {1}]
    assert model.num_features == 1024


def test_impossible_shape_is_refused():
    with pytest.raises(ValueError, match="dim=42"):
        Attention(42, 8)
    with pytest.raises(ValueError, match="num_iters=0"):
        SuperTokenAttention(8, 2, 4, num_iters=0)


def test_identity_kernels_are_passed_over():
    model = shrunken("stvit_small")
    theirs = to_published(model, model.state_dict())
    assert len(theirs) == len(model.state_dict())
    attn = "layers.0.blocks.0.attn"
    theirs[f"{attn}.unfold.weights"] = theirs[f"{attn}.fold.weights"] = torch.eye(9).view(9, 1, 3, 3)
    model.load_state_dict(theirs)


def test_drop_path_rises_linearly_over_all_blocks():
    model = timm.create_model("stvit_small", drop_path_rate=0.19)
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.01 * i for i in range(20)])


def test_initial_weights_are_the_published_ones():
    model = timm.create_model("stvit_small")
    assert model.head.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not model.head.bias.any()
    for name, module in model.named_modules():
        assert module is model.head or not isinstance(module, nn.Linear), name
        if isinstance(module, nn.Conv2d):
            bound = 1 / math.sqrt(module.weight[0].numel())
            assert 0.8 * bound < module.weight.abs().max() <= bound, name
            assert module.bias.abs().max() <= bound, name
