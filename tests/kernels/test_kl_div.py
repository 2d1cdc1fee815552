import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compresskit.kernels.kl_div import kl_div, why_not_triton
from compresskit.kernels.kl_div.chunked import rows_per_chunk

HERE = ("reference", "chunked")  # Triton has its own test, in a process of its own


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def logits(tokens, vocabulary, *, dtype=torch.float32, seed=0, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    student = torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64) * spread
    teacher = student + torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64)
    weight = torch.rand(tokens, generator=generator, dtype=torch.float64)
    return student.to(dtype).requires_grad_(), teacher.to(dtype), (weight / weight.sum()).to(dtype)


def value_and_grad(student, teacher, weight, **options):
    leaf = student.detach().clone().requires_grad_()
    loss = kl_div(leaf, teacher, token_weight=weight, **options)
    loss.backward()
    return loss.detach(), leaf.grad


@pytest.mark.parametrize("impl", HERE)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_gradient_is_the_derivative_of_the_value(impl, temperature):
    student, teacher, weight = logits(4, 7, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda z: kl_div(z, teacher, token_weight=weight, temperature=temperature, impl=impl), student
    )


def test_the_reference_is_torchs_own_divergence():
    student, teacher, weight = logits(6, 11, dtype=torch.float64)
    torch_kl = torch.nn.functional.kl_div(
        (student / 2).log_softmax(-1), (teacher / 2).log_softmax(-1), log_target=True, reduction="none"
    )
    expected = 4 * (weight * torch_kl.sum(-1)).sum()
    torch.testing.assert_close(kl_div(student, teacher, token_weight=weight, temperature=2, impl="reference"), expected)


@pytest.mark.parametrize("shape", [(1, 2), (3, 33), (37, 1001), (130, 513)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunked_is_as_near_to_float64_as_plain_torch(shape, dtype):
    student, teacher, weight = logits(*shape, dtype=dtype)
    truth = value_and_grad(student.double(), teacher.double(), weight.double(), temperature=2, impl="reference")
    plain = value_and_grad(student, teacher, weight, temperature=2, impl="reference")
    ours = value_and_grad(student, teacher, weight, temperature=2, impl="chunked", memory_mb=1)
    for exact, torch_way, chunked in zip(truth, plain, ours, strict=True):
        slack = 4 * torch.finfo(torch.float32).eps * exact.abs().max()
        assert (exact - chunked).abs().max() <= (exact - torch_way).abs().max() + slack


def test_equal_logits_give_exactly_zero_and_no_gradient():
    student, _, weight = logits(5, 40)
    value, grad = value_and_grad(student, student.detach(), weight, impl="chunked")
    assert value == 0
    assert torch.count_nonzero(grad) == 0


@pytest.mark.parametrize("impl", HERE)
def test_a_constant_added_to_a_row_changes_nothing(impl):
    student, teacher, weight = logits(5, 40, dtype=torch.float64)
    torch.testing.assert_close(
        value_and_grad(student + 100, teacher - 50, weight, impl=impl),
        value_and_grad(student, teacher, weight, impl=impl),
    )


@pytest.mark.parametrize("impl", HERE)
def test_all_zero_weights_give_zero_with_a_zero_gradient(impl):
    student, teacher, weight = logits(5, 40)
    value, grad = value_and_grad(student, teacher, torch.zeros_like(weight), impl=impl)
    assert value == 0
    assert grad.shape == student.shape
    assert torch.count_nonzero(grad) == 0


@pytest.mark.parametrize("impl", HERE)
def test_a_token_of_weight_zero_is_not_read(impl):
    student, teacher, weight = logits(5, 40)
    weight[2] = 0
    clean = value_and_grad(student, teacher, weight, impl=impl)
    with torch.no_grad():
        student[2], teacher[2] = float("nan"), float("inf")
    spoilt = value_and_grad(student, teacher, weight, impl=impl)
    assert torch.equal(clean[0], spoilt[0])
    assert torch.equal(clean[1], spoilt[1])
    assert torch.count_nonzero(spoilt[1][2]) == 0


@pytest.mark.parametrize("impl", HERE)
def test_columns_of_minus_infinity_count_as_absent(impl):
    student, teacher, weight = logits(5, 40)
    with torch.no_grad():
        student[:, 30:], teacher[:, 30:] = float("-inf"), float("-inf")
    value, grad = value_and_grad(student, teacher, weight, impl=impl)
    cut = value_and_grad(student[:, :30], teacher[:, :30], weight, impl=impl)
    torch.testing.assert_close(value, cut[0])
    torch.testing.assert_close(grad[:, :30], cut[1])
    assert torch.count_nonzero(grad[:, 30:]) == 0


@pytest.mark.parametrize("impl", HERE)
@pytest.mark.parametrize(("student_width", "teacher_width"), [(48, 40), (40, 48)])
def test_padded_vocabularies_are_cut_to_the_shared_width(impl, student_width, teacher_width):
    student, teacher, weight = logits(5, 48)
    value, grad = value_and_grad(student[:, :student_width], teacher[:, :teacher_width], weight, impl=impl)
    cut = value_and_grad(student[:, :40], teacher[:, :40], weight, impl=impl)
    torch.testing.assert_close(value, cut[0])
    torch.testing.assert_close(grad[:, :40], cut[1])
    assert torch.count_nonzero(grad[:, 40:]) == 0


@pytest.mark.parametrize("impl", HERE)
def test_the_gradients_size_hardly_depends_on_the_temperature(impl):
    student, teacher, weight = logits(64, 100, spread=1.0)
    norms = [value_and_grad(student, teacher, weight, temperature=t, impl=impl)[1].norm() for t in (1.0, 2.0, 4.0, 8.0)]
    assert max(norms) < 2 * min(norms)


class _Fresh(TorchDispatchMode):
    """Records the bytes of every tensor made that is no view of `inputs`."""

    def __init__(self, *inputs):
        super().__init__()
        self.inputs = {tensor.untyped_storage().data_ptr() for tensor in inputs}
        self.made_bytes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in self.inputs:
                self.made_bytes.append(leaf.untyped_storage().nbytes())
        return result


def test_chunked_makes_no_tensor_above_its_share_of_the_budget():
    student, teacher, weight = logits(200, 10_000)
    with torch.no_grad(), _Fresh(student, teacher) as seen:
        kl_div(student, teacher, token_weight=weight, impl="chunked", memory_mb=1)
    assert len(seen.made_bytes) > 100
    assert max(seen.made_bytes) * 5 <= 2**20


def test_chunked_makes_the_gradient_and_nothing_else_of_its_size():
    student, teacher, weight = logits(200, 10_000)
    with _Fresh(student, teacher) as seen:
        loss = kl_div(student, teacher, token_weight=weight, impl="chunked", memory_mb=1)
    assert loss.requires_grad
    gradient_bytes = student.untyped_storage().nbytes()
    # `zeros_like`, then views of it while it is filled: all other tensors are small
    assert {size for size in seen.made_bytes if size * 5 > 2**20} == {gradient_bytes}


def test_a_chunk_has_at_least_one_row():
    assert rows_per_chunk(10**9, 4, 1) == 1
    assert rows_per_chunk(1000, 4, 1) == 52


def test_a_teacher_that_requires_grad_is_refused():
    student, teacher, weight = logits(2, 5)
    with pytest.raises(ValueError, match="no_grad"):
        kl_div(student, teacher.requires_grad_(), token_weight=weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "above 0"),
        ({"token_weight": torch.ones(3)}, r"token_weight must be \(2,\)"),
        ({"impl": "cuda"}, "none of auto"),
        ({"impl": "chunked", "memory_mb": 0}, "at least 1"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    student, teacher, weight = logits(2, 5)
    with pytest.raises(ValueError, match=message):
        kl_div(student, teacher, **{"token_weight": weight, **change})


def test_asking_for_triton_where_it_cannot_run_says_why():
    student, teacher, weight = logits(2, 5)
    reason = why_not_triton(student, teacher)
    assert reason is not None
    with pytest.raises(ValueError, match="cannot run here") as caught:
        kl_div(student, teacher, token_weight=weight, impl="triton")
    assert reason in str(caught.value)


def test_auto_runs_where_triton_cannot():
    student, teacher, weight = logits(3, 9)
    auto = value_and_grad(student, teacher, weight)
    torch.testing.assert_close(auto, value_and_grad(student, teacher, weight, impl="reference"))
