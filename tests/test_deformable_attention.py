"""Deformable attention: every kernel against sampling written out, its gradients, and which kernel is taken when."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from modeling_gkc import GKCConfig
from modeling_gkc.deformable_attention import KERNELS, fastest_kernel, multi_scale_deformable_attention
from modeling_gkc.deformable_attention_embedding_bag import locate

from .common_models import tiny_config

SHAPES = [(3, 5), (6, 4), (1, 1), (9, 2)]
PORTABLE = ("grid_sample", "embedding_bag")


def random_inputs(
    shapes: list[tuple[int, int]] = SHAPES,
    batch_size: int = 2,
    queries: int = 7,
    heads: int = 3,
    channels: int = 5,
    points: int = 4,
    dtype: torch.dtype = torch.float64,
    reach: float = 0.5,
) -> tuple[Tensor, list[tuple[int, int]], Tensor, Tensor]:
    """Values, shapes, locations up to `reach` outside of the maps, and weights."""
    generator = torch.Generator().manual_seed(0)
    positions = sum(height * width for height, width in shapes)
    value = torch.randn(batch_size, positions, heads, channels, generator=generator, dtype=torch.float64)
    locations = torch.rand(
        batch_size, queries, heads, len(shapes), points, 2, generator=generator, dtype=torch.float64
    )
    weights = torch.rand(batch_size, queries, heads, len(shapes), points, generator=generator, dtype=torch.float64)
    locations = locations * (1 + 2 * reach) - reach
    return value.to(dtype), shapes, locations.to(dtype), weights.to(dtype)


def written_out(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """Compute the definition, sample by sample and corner by corner."""
    batch_size, queries, heads, levels, points, _ = locations.shape
    output = torch.zeros(batch_size, queries, heads, value.shape[-1], dtype=value.dtype)
    starts = [0, *itertools.accumulate(height * width for height, width in shapes)]
    for image, query, head, level, point in itertools.product(
        *map(range, (batch_size, queries, heads, levels, points))
    ):
        height, width = shapes[level]
        x, y = (locations[image, query, head, level, point] * torch.tensor([width, height]) - 0.5).tolist()
        for row, column in itertools.product((math.floor(y), math.floor(y) + 1), (math.floor(x), math.floor(x) + 1)):
            if 0 <= row < height and 0 <= column < width:
                share = (1 - abs(x - column)) * (1 - abs(y - row)) * weights[image, query, head, level, point]
                output[image, query, head] += share * value[image, starts[level] + row * width + column, head]
    return output.flatten(2)


def with_gradients(kernel: str, inputs: tuple) -> list[Tensor]:
    """Return the kernel's output and the gradients of values, locations and weights."""
    value, shapes, locations, weights = inputs
    leaves = [each.clone().requires_grad_() for each in (value, locations, weights)]
    output = multi_scale_deformable_attention(leaves[0], shapes, *leaves[1:], kernel=kernel)
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return [output.detach(), *torch.autograd.grad(output, leaves, upstream.to(output.dtype))]


@pytest.mark.parametrize("kernel", PORTABLE)
def test_kernels_match_the_definition(kernel, within):
    inputs = random_inputs()
    difference = multi_scale_deformable_attention(*inputs, kernel=kernel) - written_out(*inputs)
    within(f"deformable attention by {kernel} against the definition, float64", difference.abs().max(), 1e-12)


@pytest.mark.parametrize("kernel", PORTABLE)
def test_gradients_are_those_of_finite_differences(kernel):
    value, shapes, locations, weights = random_inputs(batch_size=1, queries=3, heads=2, channels=3, points=2)
    leaves = [each.requires_grad_() for each in (value, locations, weights)]
    torch.autograd.gradcheck(
        lambda value, locations, weights: multi_scale_deformable_attention(
            value, shapes, locations, weights, kernel=kernel
        ),
        leaves,
        eps=1e-7,
        atol=1e-5,
    )


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"shapes": [(16, 16), (8, 8), (4, 4)], "queries": 336, "heads": 8, "channels": 32},
        {"shapes": [(1, 1)], "queries": 1, "heads": 1, "channels": 1, "points": 1, "batch_size": 1},
        {"reach": 30.0},
        {"queries": 0},
    ],
    ids=["odd", "as in the model", "one of each", "far outside", "no queries"],
)
def test_kernels_agree(sizes, within):
    """Forward to 1e-5, gradients to 1e-4 of their largest, in fp32."""
    single = random_inputs(**sizes, dtype=torch.float32)
    expected = with_gradients(
        "grid_sample", tuple(each.double() if isinstance(each, Tensor) else each for each in single)
    )
    found = with_gradients("embedding_bag", single)
    bounds = {"sums": 1e-5, "gradients of values": 1e-4, "of locations": 1e-4, "of weights": 1e-4}
    for (what, bound), one, other in zip(bounds.items(), found, expected, strict=True):
        scale = other.abs().max().clamp(min=1) if other.numel() else 1.0
        error = ((one - other).abs() / scale).max() if other.numel() else 0.0
        within(f"embedding-bag kernel in fp32 against float64, {what}", error, bound)


def test_borders():
    """On the border, half a cell beyond, where values end, and further."""
    shapes = [(2, 3)]
    value = torch.arange(1.0, 7.0)[None, :, None, None]
    x = torch.tensor([-1.0, -0.5, 0.0, 0.5, 2.0, 2.5, 3.0, 4.0])  # in cells
    locations = torch.stack([(x + 0.5) / 3, torch.full_like(x, 0.25)], dim=-1)[None, :, None, None, None]
    weights = torch.ones(1, len(x), 1, 1, 1)
    sums = multi_scale_deformable_attention(value, shapes, locations, weights, kernel="embedding_bag")
    torch.testing.assert_close(sums.flatten(), torch.tensor([0.0, 0.5, 1.0, 1.5, 3.0, 1.5, 0.0, 0.0]))


@pytest.mark.parametrize("lost", [float("nan"), float("inf"), -float("inf"), 1e38])
def test_non_finite_inputs_do_not_crash(lost):
    """A step whose numbers broke is to be seen by the loss, not by an index out of range."""
    value, shapes, locations, weights = random_inputs(dtype=torch.float32)
    locations[0, 0, 0, 0, 0] = lost
    found = with_gradients("embedding_bag", (value, shapes, locations, weights))
    assert found[0][0, 0].isnan().any() == math.isnan(lost)
    assert found[0][:, 1:].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, within):
    """Values in half precision, locations in fp32: computed in fp32, rounded once."""
    value, shapes, locations, weights = random_inputs(dtype=torch.float32)
    found = with_gradients("embedding_bag", (value.to(dtype), shapes, locations, weights.to(dtype)))
    exact = with_gradients("embedding_bag", (value.to(dtype).float(), shapes, locations, weights.to(dtype).float()))
    assert [each.dtype for each in found] == [dtype, dtype, torch.float32, dtype]
    error = (found[0].float() - exact[0]).abs().max() / exact[0].abs().max()
    within(f"embedding-bag kernel, values in {dtype}, relative", error, torch.finfo(dtype).eps)


def test_memory_layout_does_not_matter():
    value, shapes, locations, weights = random_inputs()
    strided = (
        value.transpose(1, 2).contiguous().transpose(1, 2),
        shapes,
        locations.transpose(1, 4).contiguous().transpose(1, 4),
        weights.transpose(0, 3).contiguous().transpose(0, 3),
    )
    for one, other in zip(
        with_gradients("embedding_bag", strided),
        with_gradients("embedding_bag", (value, shapes, locations, weights)),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_images_of_a_batch_are_independent():
    value, shapes, locations, weights = random_inputs(batch_size=3)
    together = with_gradients("embedding_bag", (value, shapes, locations, weights))[0]
    for image in range(3):
        alone = multi_scale_deformable_attention(
            value[image, None], shapes, locations[image, None], weights[image, None], kernel="embedding_bag"
        )
        assert torch.equal(together[image, None], alone)


@pytest.mark.parametrize("wanted", range(3), ids=["values", "locations", "weights"])
def test_gradient_of_a_single_input(wanted):
    value, shapes, locations, weights = random_inputs()
    leaves = [value, locations, weights]
    leaves[wanted].requires_grad_()
    multi_scale_deformable_attention(leaves[0], shapes, *leaves[1:], kernel="embedding_bag").sum().backward()
    leaves[wanted].requires_grad_(False)
    expected = [each.clone().requires_grad_() for each in leaves]
    multi_scale_deformable_attention(expected[0], shapes, *expected[1:], kernel="grid_sample").sum().backward()
    torch.testing.assert_close(leaves[wanted].grad, expected[wanted].grad)
    assert [each.grad is None for each in leaves] == [index != wanted for index in range(3)]


def test_large_batches_count_rows_in_64_bits():
    """Rows beyond 2**31 have no place in 32 bits; shapes alone are looked at, nothing is allocated."""
    with torch.device("meta"):
        small = locate(torch.empty(1, 1, 8, 1, 1, 2), [(64, 64)])
        large = locate(torch.empty(80000, 1, 8, 1, 1, 2), [(64, 64)])
    assert (small.rows.dtype, large.rows.dtype) == (torch.int32, torch.int64)


def test_the_environment_and_the_configuration_force_a_kernel(monkeypatch):
    taken = []
    for name in PORTABLE:
        kernel = KERNELS[name]
        monkeypatch.setitem(
            KERNELS, name, lambda *inputs, name=name, kernel=kernel: taken.append(name) or kernel(*inputs)
        )
    inputs = random_inputs()
    multi_scale_deformable_attention(*inputs)
    monkeypatch.setenv("GKC_DEFORMABLE_ATTENTION", "grid_sample")
    multi_scale_deformable_attention(*inputs)
    multi_scale_deformable_attention(*inputs, kernel="embedding_bag")
    assert taken == ["embedding_bag", "grid_sample", "embedding_bag"]
    monkeypatch.setenv("GKC_DEFORMABLE_ATTENTION", "fast")
    with pytest.raises(ValueError, match="one of grid_sample, embedding_bag, triton, got 'fast'"):
        multi_scale_deformable_attention(*inputs)
    assert tiny_config(deformable_attention="grid_sample").deformable_attention == "grid_sample"
    with pytest.raises(ValueError, match="`deformable_attention` must be None or one of grid_sample"):
        GKCConfig(deformable_attention="fast")


def test_the_kernel_of_a_device(monkeypatch):
    tensor, leaf = torch.zeros(1), torch.zeros(1, requires_grad=True)
    assert fastest_kernel(tensor) == fastest_kernel(leaf) == "embedding_bag"
    assert fastest_kernel(tensor.to("meta")) == "grid_sample"
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert fastest_kernel(tensor) == "embedding_bag" and fastest_kernel(leaf) == "grid_sample"
    with torch.no_grad():
        assert fastest_kernel(leaf) == "embedding_bag"
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    assert fastest_kernel(tensor) == "grid_sample"


@pytest.mark.parametrize("gradients", [False, True])
def test_compiles_into_one_graph(gradients):
    value, shapes, locations, weights = random_inputs()
    value.requires_grad_(gradients)
    compiled = torch.compile(multi_scale_deformable_attention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(value, shapes, locations, weights),
        multi_scale_deformable_attention(value, shapes, locations, weights),
    )


def test_mismatched_shapes_raise():
    value, _, locations, weights = random_inputs()
    with pytest.raises(ValueError, match="have 12 positions, but `value` has 58"):
        multi_scale_deformable_attention(value, [(3, 4)], locations, weights)
