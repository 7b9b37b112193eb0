"""kernels.ops: one signature an op, and the choice of the backend."""

import importlib
import inspect
import threading

import pytest
import torch
from torch.autograd import forward_ad

from kernels import ops, reference

OPS = [
    "inject",
    "sobel_z0_loss",
    "noise_and_z0_loss",
    "group_norm_silu",
    "geglu",
    "guidance_step",
    "add_layer_norm",
    "float8_rows",
]


@pytest.fixture
def _no_interpreter(monkeypatch):
    """As in a process without TRITON_INTERPRET=1."""
    monkeypatch.setattr(ops, "INTERPRETED", False)


@pytest.fixture
def reloaded(monkeypatch):
    """kernels.ops as a process with LOCALCONTROL_KERNELS set would import it; as it was, afterwards."""

    def reload(value):
        monkeypatch.setenv("LOCALCONTROL_KERNELS", value)
        return importlib.reload(ops)

    yield reload
    monkeypatch.undo()
    importlib.reload(ops)


def inject():
    return ops.inject(torch.zeros(1, 2, 3, 3), [torch.ones(1, 2, 3, 3)], None, torch.ones(1))


@pytest.mark.parametrize("name", OPS)
def test_signatures_are_the_references(name):
    assert inspect.signature(getattr(ops, name)) == inspect.signature(getattr(reference, name))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_backends_give_the_reference(backend):
    torch.manual_seed(0)
    hidden, feature, mask = torch.randn(4, 3, 5, 5), torch.randn(2, 3, 5, 5), torch.rand(1, 1, 5, 5)
    alpha = torch.tensor([0.9, 0.5, 0.3, 0.1])
    loss = hidden, hidden + 1, hidden * 2, mask, alpha, (1 - alpha**2).sqrt(), "v_prediction"
    with ops.use_backend(backend):
        summed = ops.inject(hidden, [feature], [mask], torch.ones(1))
        losses = ops.sobel_z0_loss(*loss)
    assert torch.equal(summed, reference.inject(hidden, [feature], [mask], torch.ones(1)))
    assert torch.equal(losses, reference.sobel_z0_loss(*loss))


def test_inject_in_place_through_the_door():
    hidden = torch.zeros(2, 1, 2, 2)
    out = ops.inject(hidden, [torch.ones(1, 1, 2, 2)], None, torch.tensor([2.0]), inplace=True)
    assert out is hidden and (hidden == 2).all()


def test_unknown_backend_is_named():
    with (
        pytest.raises(ValueError, match="backend must be one of auto, triton, torch, got 'cuda'"),
        ops.use_backend("cuda"),
    ):
        pass


@pytest.mark.parametrize("name", OPS)
def test_every_op_has_a_kernel_of_the_same_signature(name):
    from kernels import triton_ops

    assert inspect.signature(getattr(triton_ops, name)) == inspect.signature(getattr(reference, name))


@pytest.mark.usefixtures("_no_interpreter")
@pytest.mark.skipif(torch.cuda.is_available(), reason="triton runs here")
def test_triton_is_refused_before_the_block_runs():
    with (
        pytest.raises(RuntimeError, match="backend 'triton' needs .* a CUDA device"),
        ops.use_backend("triton"),
    ):
        pytest.fail("the block ran")


@pytest.mark.usefixtures("_no_interpreter")
def test_triton_is_refused_on_a_device_that_it_cannot_use(monkeypatch):
    """A CPU beside a GPU, and an old GPU: known before anything is loaded."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(ops, "HAS_TRITON", True)
    ops.check_backend("triton")
    with pytest.raises(RuntimeError, match="backend 'triton' needs .* and the device is cpu; use"):
        ops.check_backend("triton", torch.device("cpu"))
    with pytest.raises(RuntimeError, match="backend 'triton' needs a GPU of compute capability 8.0"):
        ops.check_backend("triton", torch.device("cuda"))
    ops.check_backend("auto", torch.device("cpu"))


def test_triton_is_refused_where_it_is_missing(monkeypatch):
    monkeypatch.setattr(ops, "HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="needs the package triton"), ops.use_backend("triton"):
        pytest.fail("the block ran")
    assert (inject() == 1).all()  # "auto" takes the torch path without a word


@pytest.mark.parametrize(
    ("dtype", "scales", "obstacle"),
    [
        (torch.float64, torch.ones(1), "takes float32, float16 and bfloat16, got float64"),
        (
            torch.float32,
            torch.ones(1, requires_grad=True),
            "has no gradient for an argument that requires one",
        ),
        (torch.float32, torch.ones(1, device="meta"), "needs all tensors on one device, got cpu, meta"),
    ],
    ids=["float64", "gradient", "device"],
)
def test_triton_says_what_it_cannot_take(monkeypatch, dtype, scales, obstacle):
    monkeypatch.setattr(ops, "INTERPRETED", True)
    monkeypatch.setattr(ops, "_of_auto", "triton")
    x = torch.zeros(1, 2, 3, 3, dtype=dtype)
    with pytest.raises(RuntimeError, match=f"inject: the triton backend {obstacle}; use 'auto' or 'torch'"):
        ops.inject(x, [x], None, scales)


def test_a_tangent_is_not_lost(monkeypatch):
    """A kernel does not see the tangent that a tensor carries: plain torch is taken, or the kernels say so."""
    x, tangent = torch.randn(3, 14), torch.randn(3, 14)

    def derivative(backend):
        with ops.use_backend(backend), forward_ad.dual_level():
            return forward_ad.unpack_dual(ops.geglu(forward_ad.make_dual(x, tangent))).tangent

    monkeypatch.setattr(ops, "INTERPRETED", True)
    with pytest.raises(RuntimeError, match="geglu: the triton backend has no forward-mode derivatives"):
        derivative("triton")
    wanted = derivative("torch")
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)  # "auto" would take the kernels here
    assert torch.equal(derivative("auto"), wanted)


@pytest.mark.parametrize("transform", [torch.func.vmap, lambda f: torch.func.grad(lambda x: f(x).sum())])
def test_transformed_functions_are_refused_by_name(monkeypatch, transform):
    monkeypatch.setattr(ops, "INTERPRETED", True)
    with ops.use_backend("triton"), pytest.raises(RuntimeError, match=r"no transforms of torch\.func; use"):
        transform(ops.geglu)(torch.randn(2, 3, 14))


@pytest.mark.usefixtures("_no_interpreter")
def test_backend_is_restored(monkeypatch):
    monkeypatch.setattr(ops, "_of_auto", "triton")  # as set by the environment: refused where an op is called
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with ops.use_backend("torch"):
        inject()
        with (
            pytest.raises(RuntimeError, match="LOCALCONTROL_KERNELS 'triton' needs"),
            ops.use_backend("auto"),
        ):
            pass
        inject()
    with pytest.raises(RuntimeError, match="triton"):
        inject()
    with pytest.raises(KeyError), ops.use_backend("torch"):
        raise KeyError
    with pytest.raises(RuntimeError, match="triton"):
        inject()


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("triton", RuntimeError, "triton backend"),
        ("fast", ValueError, "LOCALCONTROL_KERNELS must be one of auto, triton, torch, got 'fast'"),
    ],
)
def test_environment_sets_the_backend(reloaded, monkeypatch, value, error, message):
    module = reloaded(value)
    monkeypatch.setattr(module, "INTERPRETED", False)
    with pytest.raises(error, match=message):
        inject()
    with module.use_backend("torch"):  # an explicit choice goes before the environment's
        inject()


def test_environment_may_name_torch(reloaded):
    reloaded("torch")
    assert (inject() == 1).all()


def test_auto_stands_for_the_environments_choice(reloaded):
    module = reloaded("torch")
    assert module.resolve("auto") == "torch" and module.resolve("triton") == "triton"
    with module.use_backend("auto"):
        assert module.current_backend() == "torch"


def test_a_thread_has_its_own_backend():
    seen, inside, done = [], threading.Event(), threading.Event()

    def other():
        inside.wait()
        seen.append(ops.current_backend())
        with ops.use_backend("auto"):
            done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with ops.use_backend("torch"):
        inside.set()
        done.wait()
        seen.append(ops.current_backend())
    thread.join()
    assert seen == ["auto", "torch"] and ops.current_backend() == "auto"
