"""Products with packed weights: against exact sums, on every kind of instructions, in `torch.compile` and autocast."""

from __future__ import annotations

import copy
import ctypes
import io
import os
import platform
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F

from sparsight import SparseLinear, kernels
from sparsight.errors import SparsightError
from sparsight.kernels import build
from sparsight.packing.linear import DenseLinear, use_own_products
from sparsight.packing.tensor import Packed, row_offsets

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
UNIT = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}
SHAPES = [(1, 1), (3, 7), (8, 64), (13, 100), (64, 250), (129, 513)]
TOKENS = [1, 2, 3, 5, 8, 11, 40]


def layer(rows, columns, dtype, sparsity=0.6, bias=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(columns, rows, bias=bias)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(rows, columns, generator=generator))
        linear.weight[torch.rand(rows, columns, generator=generator) < sparsity] = 0
        if bias:
            linear.bias.copy_(torch.randn(rows, generator=generator))
    return linear.to(dtype)


def close(y, x, W, bias, dtype):
    """Within rounding of sums in float32, and one rounding at the end."""
    exact = x.double() @ W.double().T + (0 if bias is None else bias.double())
    error = 4e-6 * (x.abs().double() @ W.abs().double().T) + 1.01 * UNIT[dtype] * exact.abs() + 1e-6
    return bool(((y.double() - exact).abs() <= error).all())


@pytest.mark.parametrize("compiled", ["1", "0"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_multiplies(dtype, compiled, monkeypatch):
    monkeypatch.setenv("SPARSIGHT_KERNELS", compiled)
    for (rows, columns), sparsity in [*((shape, 0.6) for shape in SHAPES), ((9, 40), 0.0), ((9, 40), 1.0)]:
        for tokens in TOKENS:
            linear = layer(rows, columns, dtype, sparsity, bias=tokens % 2 == 1)
            x = torch.randn(tokens, columns).to(dtype)
            y = SparseLinear.of(linear)(x)
            assert y.dtype == dtype
            bias = linear.bias
            tight = partial(close, y, x, linear.weight, bias, dtype)
            assert tight() or torch.equal(y, F.linear(x, linear.weight, bias)), (rows, columns, tokens)


def test_shapes_and_devices():
    linear = layer(24, 40, torch.float32)
    sparse = SparseLinear.of(linear)
    x = torch.randn(2, 3, 40)
    torch.testing.assert_close(sparse(x), linear(x))
    assert sparse(x[:0]).shape == (0, 3, 24)
    torch.testing.assert_close(sparse(x.transpose(0, 1)), linear(x.transpose(0, 1)))
    assert torch.equal(sparse.dense(), linear.weight)
    with pytest.raises(SparsightError, match=r"inputs of 39 features.*takes 40"):
        sparse(torch.randn(2, 39))
    assert "sparsity=0.6" in repr(sparse)
    assert not any(parameter.requires_grad for name, parameter in sparse.named_parameters() if name != "bias")


def test_another_dtype_and_state():
    linear = layer(32, 64, torch.float32)
    sparse = SparseLinear.of(linear)
    x = torch.randn(3, 64)
    assert torch.equal(sparse.to(torch.bfloat16).dense(), linear.weight.bfloat16())
    assert sparse(x.bfloat16()).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert sparse(x.bfloat16()).dtype == torch.bfloat16
    other = SparseLinear.of(layer(32, 64, torch.float32, seed=1))
    again = SparseLinear.empty(linear, sparse.weight.numel())
    again.load_state_dict(SparseLinear.of(linear).state_dict())
    torch.testing.assert_close(again(x), linear(x))
    again.weight_bits = nn.Parameter(other.weight_bits.data, requires_grad=False)  # not the bits of these values
    assert other.weight.numel() != again.weight.numel()
    with pytest.raises(SparsightError, match="do not belong to"):
        again(x)


def test_int8_scales_stay_float32():
    sparse = SparseLinear.of(layer(32, 64, torch.float32), int8=True)
    before = sparse.weight_scale.clone()
    sparse.to(torch.bfloat16)
    assert torch.equal(sparse.weight_scale, before)
    assert sparse.weight.dtype == torch.int8
    assert sparse.bias.dtype == torch.bfloat16


@pytest.mark.parametrize("compiled", ["1", "0"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_values(dtype, compiled, monkeypatch):
    torch.manual_seed(0)  # the bound is no strict one
    monkeypatch.setenv("SPARSIGHT_KERNELS", compiled)
    for rows, columns in SHAPES[2:]:
        linear = layer(rows, columns, dtype)
        sparse = SparseLinear.of(linear, int8=True)
        for tokens in (1, 4, 8, 30, 70):
            x = torch.randn(tokens, columns).to(dtype)
            y, exact = sparse(x).float(), linear(x).detach().float()
            assert float((y - exact).norm() / exact.norm()) < 0.02


def test_what_is_not_finite_stays_so():
    linear = layer(16, 600, torch.float32)
    x = torch.randn(3, 600)
    x[0, 5], x[1, 300] = float("inf"), float("nan")
    for int8 in (False, True):
        y = SparseLinear.of(linear, int8)(x)
        assert not y[:2].isfinite().all(1).any()
        assert bool(y[2].isfinite().all())


def test_compile_and_the_checks_of_torch():
    linear = layer(24, 40, torch.float32)
    sparse, x = SparseLinear.of(linear), torch.randn(3, 40)
    args = (x, sparse.weight, sparse.weight_bits, None, sparse.bias, row_offsets(sparse.weight_bits))
    torch.library.opcheck(torch.ops.sparsight.sparse_linear, args, test_utils=("test_schema", "test_faketensor"))
    whole = torch.compile(nn.Sequential(sparse, nn.ReLU()), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        sparse(x)
        torch.testing.assert_close(whole(x), linear(x).relu())


# the same sources for other instructions


def sums(library, dtype, int8):
    """Products of a few shapes through a library of ours, one behind the other."""
    results = []
    for rows, columns in SHAPES:
        for tokens in (1, 2, 3, 8, 11):
            linear = layer(rows, columns, dtype)
            x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).to(dtype)
            packed = Packed.int8(linear.weight) if int8 else Packed.of(linear.weight)
            offset, out = row_offsets(packed.bits), torch.empty(tokens, rows, dtype=dtype)
            places = (packed.bits.data_ptr(), offset.data_ptr(), rows, columns, x.data_ptr(), tokens, linear.bias.data_ptr())
            if int8:
                library.sparsight_product_int8(
                    packed.values.data_ptr(), packed.scale.data_ptr(), build.DTYPES[dtype], *places, out.data_ptr(), 1
                )
            else:
                library.sparsight_product(packed.values.data_ptr(), build.DTYPES[dtype], *places, out.data_ptr(), 1)
            dense = torch.empty(rows, columns, dtype=packed.values.dtype)
            where = (
                packed.values.data_ptr(),
                dense.element_size(),
                packed.bits.data_ptr(),
                offset.data_ptr(),
                rows,
                columns,
            )
            library.sparsight_expand_rows(*where, 0, rows, dense.data_ptr(), 1)
            results += [out.float().view(-1), dense.float().view(-1)]
    return torch.cat(results)


NAMES = ("packed.cpp", "sparse.cpp", "sparse_int8.cpp", "threads.cpp", "tiles.cpp")
SOURCES = [Path(build.__file__).parent / name for name in NAMES]
NO_TILES = ("-mno-amx-tile", "-mno-amx-bf16", "-mno-amx-int8")
COMPILER = shutil.which("g++")


@pytest.fixture(scope="module")
def library_of(tmp_path_factory):
    made = {}

    def get(flags):
        if flags not in made:
            path = tmp_path_factory.mktemp("kernels") / "library.so"
            command = [COMPILER, "-O1", "-std=c++17", "-shared", "-fPIC", "-pthread", *flags.split(), "-o", path, *SOURCES]
            subprocess.run(command, check=True, capture_output=True)
            made[flags] = library = ctypes.CDLL(str(path))
            kinds = {"p": ctypes.c_void_p, "q": ctypes.c_int64, "i": ctypes.c_int}
            for name, letters in build.SIGNATURES.items():
                if hasattr(library, name):
                    getattr(library, name).argtypes = [kinds[letter] for letter in letters]
        return made[flags]

    return get


@pytest.mark.skipif(COMPILER is None or platform.machine() != "x86_64", reason="needs g++ on x86-64")
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_kind_of_instructions_gives_the_same_sums(dtype, int8, library_of):
    flags = Path("/proc/cpuinfo").read_text()
    if not {"avx2", "fma", "f16c"} <= set(flags.split()):
        pytest.skip("the CPU has no AVX2")
    plain = sums(library_of("-march=native -DSPARSIGHT_PLAIN"), dtype, int8)
    assert torch.equal(sums(library_of("-march=x86-64-v3"), dtype, int8), plain)
    native = sums(build.load(), dtype, int8)
    bare = library_of(f"-march=native {' '.join(NO_TILES)}") if "amx_tile" in flags.split() else None
    others = [native] if bare is None else [native, sums(bare, dtype, int8)]
    for other in others:
        if dtype == torch.bfloat16 and not int8:  # AVX-512 adds in pairs, or even and odd columns apart
            torch.testing.assert_close(other, plain, rtol=1e-2, atol=1e-2)
        else:
            assert torch.equal(other, plain)
    assert bare is None or not bare.sparsight_has_tiles()


@pytest.mark.skipif(COMPILER is None or platform.machine() != "x86_64", reason="needs g++ on x86-64")
def test_the_kernels_compile_for_other_cpus():
    """For a CPU with AVX-512, whatever this one has, and for one with none of it."""
    sources = sorted(Path(build.__file__).parent.glob("*.cpp"))
    for cpu in ("sapphirerapids", "x86-64-v3", "x86-64"):
        done = subprocess.run(
            [COMPILER, "-std=c++17", "-fsyntax-only", f"-march={cpu}", *sources], capture_output=True, text=True
        )
        if "bad value" not in done.stderr:  # an old compiler
            assert done.returncode == 0, done.stderr[:2000]


@pytest.fixture(scope="module")
def tiles():
    """Skip where the CPU has no matrix tiles; asked here, since the answer takes a compilation."""
    if not kernels.has_tiles(torch.zeros(1, dtype=torch.bfloat16)):
        pytest.skip("the CPU has no matrix tiles")


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("form", ["packed", "int8", "dense"])
@pytest.mark.parametrize(("rows", "columns"), [*SHAPES, (70, 2200)])
def test_matrix_tiles_multiply(rows, columns, form):
    for tokens in (9, 16, 17, 32, 40, 64, 65, 260):
        linear = layer(rows, columns, torch.bfloat16, bias=tokens % 2 == 1)
        x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens)).bfloat16()
        sparse = SparseLinear.of(linear, int8=form == "int8")
        W = sparse.dense(torch.float32) if form == "int8" else linear.weight
        y = kernels.product(x, linear.weight, None, None, linear.bias) if form == "dense" else sparse(x)
        assert close(y, x, W, linear.bias, torch.bfloat16), tokens


@pytest.mark.usefixtures("tiles")
def test_matrix_tiles_and_those_of_torch_do_not_disturb_each_other():
    linear = layer(300, 700, torch.bfloat16)
    sparse, x = SparseLinear.of(linear), torch.randn(40, 700).bfloat16()
    alone, ours = F.linear(x, linear.weight, linear.bias), sparse(x)
    for tokens in (1, 3, 20, 40, 70, 40):
        sparse(torch.randn(tokens, 700).bfloat16())
        assert torch.equal(F.linear(x, linear.weight, linear.bias), alone)
        assert torch.equal(sparse(x), ours)


PROGRAM = Path(__file__).with_name("program.cpp")


@pytest.mark.skipif(
    COMPILER is None or not shutil.which("aarch64-linux-gnu-g++") or not shutil.which("qemu-aarch64-static"),
    reason="needs g++ for ARM and qemu",
)
def test_neon_under_emulation_gives_the_same_bits(tmp_path):
    here = [COMPILER, "-O2", "-march=native", "-DSPARSIGHT_PLAIN"]
    there = ["aarch64-linux-gnu-g++", "-O2", "-static"]
    results = []
    for command, runner in ((here, []), (there, ["qemu-aarch64-static"])):
        program = tmp_path / command[0].rpartition("/")[2]
        subprocess.run(
            [*command, "-std=c++17", "-pthread", "-o", program, PROGRAM, *SOURCES], check=True, capture_output=True
        )
        results.append(subprocess.run([*runner, program], check=True, capture_output=True, text=True).stdout)
    assert results[0].count("\n") == 60
    assert results[0] == results[1]


@pytest.mark.skipif(COMPILER is None, reason="needs g++")
def test_nothing_is_read_or_written_outside(tmp_path):
    """The same program under the address sanitizer, with this CPU's own instructions."""
    program = tmp_path / "program"
    flags = ["-O1", "-march=native", "-fsanitize=address", "-static-libasan"]
    command = [COMPILER, *flags, "-std=c++17", "-pthread", "-o", program, PROGRAM, *SOURCES]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("the compiler has no address sanitizer")
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr[:2000])


def test_the_dense_product_of_one_bfloat16_matrix():
    W, x = torch.randn(37, 130).bfloat16(), torch.randn(3, 130).bfloat16()
    y = kernels.product(x, W, None, None)
    assert (y is None) == (build.load() is None)
    assert y is None or close(y, x, W, None, torch.bfloat16)


def test_a_forward_adds_nothing_to_what_is_saved():
    sparse = SparseLinear.of(layer(16, 32, torch.float32))
    names = list(sparse.state_dict())
    sparse(torch.randn(2, 32))
    assert list(sparse.state_dict()) == names == ["weight", "weight_bits", "bias"]


def test_compile_before_the_first_product_and_after_pickling():
    linear, x = layer(24, 40, torch.float32), torch.randn(3, 40)
    sparse = SparseLinear.of(linear)
    with torch.no_grad():
        whole = torch.compile(nn.Sequential(sparse, nn.ReLU()), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(whole(x), linear(x).relu())
        sparse.count()
        buffer = io.BytesIO()
        torch.save(sparse, buffer)
        buffer.seek(0)
        again = torch.load(buffer, weights_only=False)
        assert torch.equal(again(x), sparse(x))
        assert torch.equal(again.to(torch.float64).dense(), sparse.dense().double())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_a_trace_has_the_product_and_not_its_result():
    linear, x, y = layer(32, 64, torch.float32), torch.randn(2, 64), torch.randn(2, 64)
    ours = nn.Linear(1024, 1024, bias=False).bfloat16()
    use_own_products(nn.Sequential(ours))
    for module, given, other in (
        (SparseLinear.of(linear), x, y),
        (ours, torch.randn(2, 1024).bfloat16(), torch.randn(2, 1024).bfloat16()),
    ):
        with torch.no_grad():
            exact = module(other)
            assert torch.equal(torch.jit.trace(module, (given,), check_trace=False)(other), exact)
            assert torch.equal(make_fx(module)(given)(other), exact)
            with FakeTensorMode(allow_non_fake_inputs=True):
                assert module(torch.empty(given.shape, dtype=given.dtype)).shape == exact.shape


def test_other_bits_are_counted_anew():
    one, other = layer(16, 32, torch.float32, 0), layer(16, 32, torch.float32, 0)
    with torch.no_grad():
        one.weight[:8] = 0
        other.weight[8:] = 0
    x = torch.randn(2, 32)
    sparse, expected = SparseLinear.of(one), SparseLinear.of(other)
    sparse(x)
    sparse.load_state_dict(expected.state_dict())
    torch.testing.assert_close(sparse(x), F.linear(x, other.weight, other.bias))


def test_a_copy_of_a_loaded_layer_has_its_bits_once():
    linear = nn.Linear(64, 32)
    layer = SparseLinear.empty(linear, int(linear.weight.count_nonzero()))
    packed = Packed.of(linear.weight)
    layer.count(packed)
    layer.weight, layer.weight_bits = (nn.Parameter(t, requires_grad=False) for t in (packed.values, packed.bits))
    layer.count()
    other = copy.deepcopy(layer)
    assert other._known[0] is other.weight_bits
    assert torch.equal(other._known[1], packed.offset())


def test_bits_of_other_memory_are_counted_anew_and_of_the_same_are_not():
    """A parameter that goes to a GPU or comes back stays the same object; only its memory is another."""
    one, other = layer(16, 32, torch.float32, 0), layer(16, 32, torch.float32, 0)
    with torch.no_grad():
        one.weight[:8] = 0
        other.weight[8:] = 0
    x = torch.randn(2, 32)
    sparse, expected = SparseLinear.of(one), SparseLinear.of(other)
    sparse(x)
    bits, where = sparse.weight_bits, sparse._known[1]
    sparse.float()
    assert sparse._known[1] is where
    there = {id(p): q.detach() for p, q in zip(sparse.parameters(), expected.parameters(), strict=True)}
    sparse._apply(lambda p: there[id(p)])
    assert sparse.weight_bits is bits
    torch.testing.assert_close(sparse(x), F.linear(x, other.weight, other.bias))
    sparse.to_empty(device="cpu")  # whatever there is in this memory


def test_strided_parts():
    linear, x = layer(13, 100, torch.float32), torch.randn(3, 100)
    packed = Packed.of(linear.weight)
    values, bits = (torch.stack([part, part], -1)[..., 0] for part in (packed.values, packed.bits))
    sparse = SparseLinear(100, 13, values, bits, bias=linear.bias)
    assert torch.equal(sparse(x), SparseLinear.of(linear)(x))


def test_autocast_of_an_int8_layer_with_a_bias_of_another_dtype():
    linear, x = layer(16, 300, torch.float32), torch.randn(3, 300).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        y, expected = SparseLinear.of(linear, int8=True)(x), linear(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))


def test_layers_take_inputs_without_data():
    linear, x = layer(96, 300, torch.bfloat16), torch.empty(2, 300, dtype=torch.bfloat16, device="meta")
    with torch.no_grad():
        assert SparseLinear.of(linear).to("meta")(x).shape == (2, 96)
        linear.__class__ = DenseLinear
        assert linear.to("meta")(x).shape == (2, 96)


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 40])
def test_autocast_gives_the_dtype_that_an_ordinary_layer_gives(tokens, dtype, given):
    linear, x = layer(96, 300, torch.bfloat16), torch.randn(tokens, 300).to(given)
    ours = nn.Sequential(copy.deepcopy(linear))
    ours[0].__class__ = DenseLinear
    with torch.no_grad(), torch.autocast("cpu", dtype=dtype):
        if given == torch.float64:  # no autocast takes it
            with pytest.raises(RuntimeError, match="dtype"):
                linear(x)
            return
        expected = linear(x)
        for y in (SparseLinear.of(linear)(x), ours(x)):
            assert y.dtype == expected.dtype == dtype
            torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


def test_an_int8_layer_of_the_meta_device_is_made_anew():
    sparse = SparseLinear.of(layer(16, 32, torch.bfloat16), int8=True).to("meta").to_empty(device="cpu")
    assert (sparse.weight_scale.device.type, sparse.weight_scale.dtype) == ("cpu", torch.float32)


@pytest.mark.parametrize("tokens", [1, 40])
def test_our_dense_layer_is_an_ordinary_one(tokens):
    linear = nn.Linear(700, 900).bfloat16()
    network, x = nn.Sequential(linear), torch.randn(2, tokens, 700).bfloat16()
    exact = linear(x)
    use_own_products(network)
    assert type(linear) is DenseLinear
    with torch.no_grad():
        torch.testing.assert_close(linear(x), exact.detach(), rtol=2e-2, atol=2e-2)
    linear(x.requires_grad_()).sum().backward()  # and still trains
    assert x.grad is not None
    assert linear.weight.grad is not None


@pytest.mark.parametrize("tokens", [1, 40, 600])
def test_our_dense_layer_compiles_in_one_graph(tokens):
    linear, x = nn.Linear(700, 900).bfloat16(), torch.randn(tokens, 700).bfloat16()
    network = nn.Sequential(linear, nn.ReLU())
    use_own_products(network)
    torch.compiler.reset()
    with torch.no_grad():
        assert torch.equal(torch.compile(network, fullgraph=True, backend="aot_eager")(x), network(x))


@pytest.mark.parametrize("tokens", [1, 5])
def test_a_bias_of_another_dtype_is_not_read_as_bfloat16(tokens):
    linear, x = nn.Linear(700, 900).bfloat16(), torch.randn(tokens, 700).bfloat16()
    linear.bias = nn.Parameter(linear.bias.float())
    use_own_products(nn.Sequential(linear))
    with torch.no_grad(), pytest.raises(RuntimeError, match="dtype"):
        linear(x)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = F.linear(x, linear.weight, linear.bias)
        assert torch.equal(linear(x), expected)


def test_inputs_that_want_a_gradient_do_not_lose_it_unsaid():
    sparse, x = SparseLinear.of(layer(16, 32, torch.float32)), torch.randn(2, 32, requires_grad=True)
    with pytest.raises(RuntimeError, match="grad"):
        sparse(x).sum().backward()


def several(sparse, x):
    with torch.no_grad():
        return sparse(x)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_several_threads_at_once_and_a_forked_process_give_the_same():
    sparse, x = SparseLinear.of(layer(2048, 2048, torch.float32)), torch.randn(2, 2048)
    one = several(sparse, x)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        assert torch.equal(several(sparse, x), one)
        with ThreadPoolExecutor(4) as pool:
            assert all(torch.equal(y, one) for y in pool.map(lambda _: several(sparse, x), range(40)))
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(several(sparse, x), one) else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(before)
