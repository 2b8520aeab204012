"""The Triton kernels of deformable attention against `grid_sample` in fp64.

On a machine with a CUDA device every case runs there. Triton's interpreter runs them on the CPU; it must be chosen
before Triton is imported, so one test here starts this file in a process of its own.
"""

import functools
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modeling_gkc.deformable_attention import multi_scale_deformable_attention

triton = pytest.importorskip("triton", reason="Triton is not published for this platform")

from modeling_gkc import deformable_attention_triton as module  # noqa: E402
from modeling_gkc.deformable_attention_triton import is_available, triton_deformable_attention  # noqa: E402

ROOT = Path(__file__).parent.parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if CUDA else "cpu"
runs = pytest.mark.usefixtures("device_or_interpreter")
needs_cuda = pytest.mark.usefixtures("cuda_device")
compiled_only = pytest.mark.usefixtures("no_interpreter")

MAPS = {
    1: [(5, 7)],
    2: [(4, 3), (1, 1)],
    3: [(6, 5), (3, 2), (1, 4)],
    4: [(3, 3), (1, 1), (2, 5), (4, 1)],
    5: [(2, 2), (1, 1), (3, 1), (1, 3), (5, 4)],
}
R50_512 = [(64, 64), (32, 32), (16, 16)]
R50_1024 = [(128, 128), (64, 64), (32, 32)]


@pytest.fixture
def device_or_interpreter():
    if not (CUDA or INTERPRETED):
        pytest.skip("no CUDA device; test_in_the_interpreter runs this in Triton's interpreter")


@pytest.fixture
def cuda_device():
    if not CUDA:
        pytest.skip("needs a CUDA device")


@pytest.fixture
def no_interpreter():
    if INTERPRETED:
        pytest.skip("not for Triton's interpreter")


def in_fp64(value: Tensor, shapes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    """Compute the definition in fp64, with one `grid_sample` per level and head."""
    batch_size, _, num_heads, head_dim = value.shape
    levels = value.double().split([height * width for height, width in shapes], dim=1)
    output = 0
    for index, (level, shape) in enumerate(zip(levels, shapes, strict=True)):
        maps = level.permute(0, 2, 3, 1).reshape(batch_size * num_heads, head_dim, *shape)
        grid = (2 * locations[:, :, :, index].double() - 1).transpose(1, 2).flatten(0, 1)
        sampled = F.grid_sample(maps, grid, align_corners=False)  # (B*M, E, N, R)
        sampled = sampled.unflatten(0, (batch_size, num_heads))
        output = output + torch.einsum("bmenr,bnmr->bnme", sampled, weights[:, :, :, index].double())
    return output.flatten(2)


def make_inputs(shapes, batch_size=2, num_queries=5, num_heads=2, head_dim=20, num_points=1, dtype=torch.float32):
    """Random values; locations in and around the maps, away from the lines where their gradient jumps."""
    value = torch.randn(batch_size, sum(h * w for h, w in shapes), num_heads, head_dim)
    samples = (batch_size, num_queries, num_heads, len(shapes), num_points)
    sizes = torch.tensor([(width, height) for height, width in shapes])[:, None]  # (L, 1, 2)
    cells = torch.floor(torch.rand(*samples, 2) * (sizes + 4)) - 2 + torch.rand(*samples, 2) * 0.9 + 0.05
    weights = torch.randn(*samples).flatten(3).softmax(-1).view(samples)
    return to_leaves(value.to(dtype), (cells + 0.5) / sizes, weights)


def to_leaves(*tensors: Tensor) -> list[Tensor]:
    return [tensor.to(DEVICE).requires_grad_() for tensor in tensors]


def outputs_and_grads(function, inputs, shapes) -> list[Tensor]:
    """Output and gradients of value, locations and weights; the gradient of the output is the same for all dtypes."""
    value, locations, weights = inputs
    output = function(value, shapes, locations, weights)
    grad = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output).bfloat16().to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad)]


def exact_outputs_and_grads(inputs, shapes) -> list[Tensor]:
    """Return output and gradients in fp64; gradients of half-precision inputs would be rounded."""
    return outputs_and_grads(in_fp64, [tensor.detach().double().requires_grad_() for tensor in inputs], shapes)


def errors(inputs, shapes, relative: bool = False) -> list[float]:
    """Largest error of output and of each gradient against fp64, relative to what is largest where asked for."""
    results = []
    for ours, exact in zip(
        outputs_and_grads(triton_deformable_attention, inputs, shapes),
        exact_outputs_and_grads(inputs, shapes),
        strict=True,
    ):
        assert ours.shape == exact.shape
        difference = (ours.double() - exact.double()).abs().max().item()
        results.append(difference / max(1.0, exact.abs().max().item()) if relative else difference)
    return results


def check_fp32(within, inputs, shapes, relative: bool = False) -> None:
    error, *grad_errors = errors(inputs, shapes, relative)
    within("Triton deformable attention, forward, fp32", error, 1e-5)
    for name, grad_error in zip(("values", "locations", "weights"), grad_errors, strict=True):
        within(f"Triton deformable attention, gradient of {name}, fp32", grad_error, 1e-4)


@runs
@pytest.mark.parametrize(
    ("num_levels", "head_dim", "num_points", "batch_size", "num_queries", "num_heads"),
    [
        (1, 32, 3, 2, 19, 1),  # more queries than one program takes
        (2, 3, 1, 1, 5, 3),
        (3, 20, 4, 1, 5, 1),
        (4, 8, 1, 1, 2, 2),
        (5, 1, 1, 2, 5, 1),
    ],
)
def test_equals_grid_sample(within, num_levels, head_dim, num_points, batch_size, num_queries, num_heads):
    shapes = MAPS[num_levels]
    inputs = make_inputs(shapes, batch_size, num_queries, num_heads, head_dim, num_points)
    check_fp32(within, inputs, shapes)


@runs
def test_equals_the_plain_kernel(within):
    assert is_available()
    inputs = make_inputs(MAPS[2])
    ours, plain = (
        outputs_and_grads(function, inputs, MAPS[2])
        for function in (
            triton_deformable_attention,
            functools.partial(multi_scale_deformable_attention, kernel="grid_sample"),
        )
    )
    for index, (one, other) in enumerate(zip(ours, plain, strict=True)):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        name = "gradients" if index else "forward"
        within(f"Triton against grid_sample, {name}, fp32", (one - other).abs().max(), 1e-4 if index else 1e-5)


@runs
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 0.0005), (torch.bfloat16, 0.004)], ids=["fp16", "bf16"])
def test_half_precision(within, dtype, bound):
    """Of the rounding of the result only: nothing is summed in half precision."""
    inputs = make_inputs(MAPS[2], batch_size=1, head_dim=8, num_points=2, dtype=dtype)
    ours, exact = (
        outputs_and_grads(triton_deformable_attention, inputs, MAPS[2]),
        exact_outputs_and_grads(inputs, MAPS[2]),
    )
    assert [tensor.dtype for tensor in ours] == [dtype, dtype, torch.float32, torch.float32]
    for name, one, other in zip(("forward", "gradient of values"), ours[:2], exact[:2], strict=True):
        error = ((one.double() - other.double()).abs() / other.double().abs().clamp(min=1)).max()
        within(f"Triton deformable attention, {name}, {str(dtype)[6:]}, relative", error, bound)
    for one, other in zip(ours[2:], exact[2:], strict=True):
        within("Triton deformable attention, other gradients, half values", (one - other).abs().max(), 1e-4)


@runs
def test_all_inputs_in_half_precision():
    """Under autocast of everything: gradients come in each input's dtype, sums are right to its rounding."""
    value, locations, weights = make_inputs(MAPS[1], 1, 3, 1, 8, 1)
    inputs = [tensor.detach().bfloat16().requires_grad_() for tensor in (value, locations, weights)]
    ours, exact = (
        outputs_and_grads(triton_deformable_attention, inputs, MAPS[1]),
        exact_outputs_and_grads(inputs, MAPS[1]),
    )
    for one, other in zip(ours, exact, strict=True):
        assert one.dtype == torch.bfloat16
        assert torch.allclose(one.double(), other, rtol=2**-7, atol=2**-8)


@runs
def test_on_borders(within):
    """Centres, edges and corners of cells, of a map whose arithmetic is exact in fp32."""
    ticks = torch.tensor([-0.25, -0.125, 0, 0.125, 0.25, 0.5, 0.75, 0.875, 1, 1.125, 1.25])
    locations = torch.cartesian_prod(ticks, ticks).view(1, -1, 1, 1, 1, 2)
    inputs = to_leaves(torch.randn(1, 16, 1, 32), locations, torch.rand(locations.shape[:-1]))
    check_fp32(within, inputs, [(4, 4)])


@runs
def test_one_cell(within):
    """A 1 x 1 map fades out to nothing over its own width on every side."""
    locations = torch.tensor([0.5, 0.0, -0.4375, -0.5, 1.0, 1.4375, 1.5, 2.0])
    locations = torch.stack((locations, torch.full((8,), 0.5)), dim=-1).view(1, 8, 1, 1, 1, 2)
    value, locations, weights = to_leaves(torch.full((1, 1, 1, 3), 2.0), locations, torch.ones(1, 8, 1, 1, 1))
    output = triton_deformable_attention(value, [(1, 1)], locations, weights)
    assert output[0, :, 0].tolist() == [2.0, 1.0, 0.125, 0.0, 1.0, 0.125, 0.0, 0.0]
    check_fp32(within, [value, locations, weights], [(1, 1)])


@runs
@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # numpy's, in the interpreter
def test_far_outside():
    """No number, however large, reads outside of the maps or makes a NaN: it adds nothing and gets no gradient."""
    far = torch.tensor([-1.0, 3.0, 1e4, -1e10, 3e38, torch.inf, -torch.inf, torch.nan])
    locations = torch.stack((far, torch.full((8,), 0.5)), dim=-1)
    locations = torch.cat((locations, locations.flip(-1))).view(1, 16, 1, 1, 1, 2)
    inputs = to_leaves(torch.randn(1, 6, 1, 4), locations, torch.ones(1, 16, 1, 1, 1))
    for result in outputs_and_grads(triton_deformable_attention, inputs, [(2, 3)]):
        assert (result == 0).all()


@runs
def test_views(within):
    """Non-contiguous values, locations and weights; a gradient of the output that is one number."""
    value, locations, weights = (tensor.detach() for tensor in make_inputs(MAPS[1], num_heads=2))
    views = [
        value.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        locations.transpose(1, 2).contiguous().transpose(1, 2),
        weights.repeat_interleave(2, dim=1)[:, ::2],
    ]
    assert not any(view.is_contiguous() for view in views)
    views = [view.requires_grad_() for view in views]
    outputs = [function(views[0], MAPS[1], *views[1:]) for function in (triton_deformable_attention, in_fp64)]
    within("Triton deformable attention, forward of views, fp32", (outputs[0] - outputs[1]).abs().max().detach(), 1e-5)
    ours, exact = (torch.autograd.grad(output.sum(), views) for output in outputs)
    for one, other in zip(ours, exact, strict=True):
        within("Triton deformable attention, gradients of views, fp32", (one - other).abs().max(), 1e-4)


@runs
def test_images_are_independent():
    """A batch equals its images alone, to the bit."""
    value, locations, weights = make_inputs(MAPS[1], batch_size=2, num_heads=1)
    together = triton_deformable_attention(value, MAPS[1], locations, weights)
    for index in range(2):
        alone = triton_deformable_attention(
            *(value[index, None], MAPS[1], locations[index, None]), weights[index, None]
        )
        assert torch.equal(together[index], alone[0])


@runs
@pytest.mark.parametrize("empty", ["queries", "images"])
def test_empty_inputs(empty):
    inputs = make_inputs(MAPS[2], **{"queries": {"num_queries": 0}, "images": {"batch_size": 0}}[empty])
    output, *grads = outputs_and_grads(triton_deformable_attention, inputs, MAPS[2])
    assert output.shape == (0 if empty == "images" else 2, 5 if empty == "images" else 0, 40)
    assert [grad.shape for grad in grads] == [tensor.shape for tensor in inputs]
    assert not any(grad.any() for grad in grads)


@runs
def test_gradcheck():
    """Analytic against numeric derivatives, in fp64, which a double input asks for."""
    inputs = [tensor.detach().double().requires_grad_() for tensor in make_inputs(MAPS[1], 1, 2, 1, 3, 1)]
    function = lambda value, *rest: triton_deformable_attention(value, MAPS[1], *rest)  # noqa: E731
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True, nondet_tol=1e-12)


@runs
def test_operator_registrations_pass_opcheck():
    """Schema, fake tensors, autograd and tracing with unknown sizes, as torch checks custom operators."""
    value, locations, weights = make_inputs([(2, 3)], 1, 2, 1, 3, 1)
    tolerance = {"atol": 1e-5, "rtol": 1e-5}
    torch.library.opcheck(module._forward, (value, [2, 3], locations, weights), **tolerance)
    detached = [tensor.detach() for tensor in (value, locations, weights)]
    grad = torch.ones(1, 2, 3, device=DEVICE)
    arguments = (grad, detached[0], [2, 3], *detached[1:])
    torch.library.opcheck(
        module._backward, arguments, test_utils=("test_schema", "test_faketensor", "test_autograd_registration")
    )


@runs
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_into_one_graph(within, backend):
    """`torch.compile` without a break, forward and backward, and again for maps of other sizes."""
    function = functools.partial(multi_scale_deformable_attention, kernel="triton")
    compiled = torch.compile(function, backend=backend, fullgraph=True)
    for shapes in ([(2, 3)], [(4, 1)]):
        inputs = make_inputs(shapes, 1, 2, 1, 3, 1)
        eager, traced = (outputs_and_grads(f, inputs, shapes) for f in (triton_deformable_attention, compiled))
        for one, other in zip(eager, traced, strict=True):
            within("Triton deformable attention, compiled against eager", (one - other).abs().max(), 1e-6)


@runs
def test_indices_above_32_bits(monkeypatch):
    """Reads the end of a map of more than 2**31 values; only the pages that are touched take memory."""
    height, width = 2**15 + 2, 2**16
    value = torch.empty(1, height * width, 1, 1, dtype=torch.float16, device=DEVICE)
    value.view(height, width)[-2:, -2:] = 0.75
    if INTERPRETED:  # It copies arguments back onto themselves, which would touch all pages.
        monkeypatch.setattr("triton.runtime.interpreter.GridExecutor._restore_args_dev", lambda *_: None)
    locations = torch.tensor([(width - 1) / width, (height - 1) / height], device=DEVICE).view(1, 1, 1, 1, 1, 2)
    weights = torch.ones(1, 1, 1, 1, 1, device=DEVICE)
    assert triton_deformable_attention(value, [(height, width)], locations, weights).item() == 0.75


@runs
def test_second_derivative_raises():
    value, locations, weights = make_inputs([(2, 2)], 1, 1, 1, 2, 1)
    output = triton_deformable_attention(value, [(2, 2)], locations, weights)
    (grad,) = torch.autograd.grad(output.sum(), locations, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable only once"):
        grad.sum().backward()


@runs
@pytest.mark.parametrize("wrong", ["positions", "levels", "heads", "points", "integers"])
def test_mismatched_shapes_raise(wrong):
    value, locations, weights = make_inputs([(2, 3)], 1, 2, 2, 3, 2)
    shapes = [(2, 3)]
    if wrong == "positions":
        shapes, message = [(2, 2)], r"`spatial_shapes` \[\(2, 2\)\] have 4 positions, but `value` has 6"
    elif wrong == "levels":
        shapes, message = [(1, 3), (1, 3)], "do not fit `value`"
    elif wrong == "heads":
        locations, message = locations[:, :, :1], "do not fit `value`"
    elif wrong == "points":
        weights, message = weights[..., :1], "do not fit `value`"
    else:
        value, message = value.detach().int(), "must be of floating point"
    with pytest.raises(ValueError, match=message):
        triton_deformable_attention(value, shapes, locations, weights)


@runs
def test_imported_twice():
    """Code beside a checkpoint is a second module of the same operators, which must leave the first whole."""
    spec = importlib.util.spec_from_file_location("beside_a_checkpoint.attention", module.__file__)
    second = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(second)
    assert second._forward._qualname != module._forward._qualname
    inputs = make_inputs([(2, 2)], 1, 1, 1, 2, 1)
    results = [outputs_and_grads(m.triton_deformable_attention, inputs, [(2, 2)]) for m in (module, second)]
    assert all(map(torch.equal, *results))


@compiled_only
def test_cpu_tensors_raise():
    inputs = [tensor.detach().cpu() for tensor in make_inputs(MAPS[1])]
    with pytest.raises(ValueError, match="needs CUDA tensors, not cpu: choose the kernel 'grid_sample'"):
        triton_deformable_attention(inputs[0], MAPS[1], *inputs[1:])
    assert is_available() == torch.cuda.is_available()


class CompiledOnly:
    """Stands for a kernel where it is launched: compiles what would run, with Triton's own compiler."""

    def __init__(self, kernel):
        self.kernel, self.compiled = kernel, []

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.compiled.append(self.kernel.warmup(*args, grid=grid, **kwargs))


@pytest.fixture
def hopper_driver(monkeypatch, tmp_path):
    """Triton believes in an H100, under a number that no real device has."""
    from triton.backends.compiler import GPUTarget

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    properties = {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32}
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_current_device=lambda: 99,
        get_current_stream=lambda device: 0,
        utils=SimpleNamespace(get_device_properties=lambda device: properties),
    )
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)


@compiled_only
def test_machine_code_for_a_gpu(hopper_driver, monkeypatch):
    """Real code for a GPU, made without one: the compiler takes both kernels, once for maps of all sizes."""
    kernels = {name: CompiledOnly(getattr(module, name)) for name in ("_forward_kernel", "_backward_kernel")}
    for name, kernel in kernels.items():
        monkeypatch.setattr(module, name, kernel)
    for shapes in ([(4, 3), (1, 1)], [(16, 16), (8, 8)]):
        value, locations, weights = (
            tensor.detach().cpu() for tensor in make_inputs(shapes, 1, 16, 1, 32, 2, dtype=torch.bfloat16)
        )
        sizes = [length for shape in shapes for length in shape]
        output = module._forward(value, sizes, locations, weights)
        module._backward(output, value, sizes, locations, weights)
    for kernel in kernels.values():
        first, second = kernel.compiled
        assert first.asm["cubin"]
        assert first is second


@needs_cuda
@pytest.mark.parametrize("shapes", [R50_512, R50_1024], ids=["512", "1024"])
def test_inputs_of_model_size(within, shapes):
    num_queries = sum(height * width for height, width in shapes)
    inputs = make_inputs(shapes, 2, num_queries, num_heads=8, head_dim=32, num_points=4)
    check_fp32(within, inputs, shapes, relative=True)
    half = [inputs[0].detach().bfloat16().requires_grad_(), *inputs[1:]]
    within("Triton deformable attention, R50, bf16, relative", max(errors(half, shapes, relative=True)), 0.004)


@needs_cuda
def test_no_synchronization_or_copy():
    inputs = make_inputs(MAPS[3])
    outputs_and_grads(triton_deformable_attention, inputs, MAPS[3])  # compiles
    value, locations, weights = inputs
    grad = torch.ones(2, 5, 40, device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    try:
        triton_deformable_attention(value, MAPS[3], locations, weights).backward(grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_cuda
def test_cuda_graph():
    """A recorded forward and backward pass computes anew from what its inputs then hold."""
    inputs = make_inputs(MAPS[3])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        outputs_and_grads(triton_deformable_attention, inputs, MAPS[3])
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = outputs_and_grads(triton_deformable_attention, inputs, MAPS[3])
    with torch.no_grad():
        for tensor, other in zip(inputs, make_inputs(MAPS[3]), strict=True):
            tensor.copy_(other)
    graph.replay()
    for one, other in zip(recorded, outputs_and_grads(triton_deformable_attention, inputs, MAPS[3]), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


@needs_cuda
def test_reduce_overhead():
    inputs = [tensor.detach() for tensor in make_inputs(MAPS[3])]
    compiled = torch.compile(triton_deformable_attention, mode="reduce-overhead", fullgraph=True)
    eager = triton_deformable_attention(inputs[0], MAPS[3], *inputs[1:])
    for _ in range(3):
        assert torch.equal(compiled(inputs[0], MAPS[3], *inputs[1:]), eager)


@needs_cuda
def test_deterministic_algorithms():
    """The gradient adds atomically, and says so where the user wants none of that."""
    value, locations, weights = make_inputs(MAPS[1])
    output = triton_deformable_attention(value, MAPS[1], locations, weights)
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="not deterministic"):
            output.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)


@compiled_only
def test_in_the_interpreter(within):
    """All cases of this file that run on a GPU or in the interpreter, in the interpreter."""
    environment = {name: text for name, text in os.environ.items() if not name.startswith("PYTEST_")}
    finished = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist", __file__],
        cwd=ROOT,
        env=environment | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert int(re.search(r"(\d+) passed", finished.stdout)[1]) >= 25
    skipped = re.findall(r"^SKIPPED .*: (.+)$", finished.stdout, re.MULTILINE)
    assert set(skipped) <= {"needs a CUDA device", "not for Triton's interpreter"}
    for name, error, bound in re.findall(r"^(.+?) +(\S+) +\(bound (\S+)\)$", finished.stdout, re.MULTILINE):
        within(f"{name} (interpreter)", float(error), float(bound))
