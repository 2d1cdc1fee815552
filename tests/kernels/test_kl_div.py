import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compresskit.kernels.kl_div import fused, jsd, kl_div, why_not_triton

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
        slack = 32 * torch.finfo(torch.float32).eps * exact.abs().max()
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


def test_chunked_makes_the_gradient_and_nothing_else_above_its_share_of_the_budget():
    made_bytes = []

    class Fresh(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            made_bytes.extend(leaf.untyped_storage().nbytes() for leaf in tree_leaves(result) if torch.is_tensor(leaf))
            return result

    student, teacher, weight = logits(200, 10_000)
    numbers = [0.5, 1.0]
    with Fresh():
        fused._divergence_loss._init_fn(
            student.detach(), teacher, weight, "forward_kl", "none", numbers, "chunked", 1, [True]
        )
    whole = student.untyped_storage().nbytes()
    assert len(made_bytes) > 1000
    assert {size for size in made_bytes if size > 2**20 / 4} == {whole}  # both sets of logits are of that size too


@pytest.mark.parametrize("impl", HERE)
def test_jsd_is_its_definition(impl):
    student, teacher, weight = logits(6, 11, dtype=torch.float64)
    p, q = (teacher / 2).softmax(-1), (student / 2).softmax(-1)
    m = 0.3 * p + 0.7 * q
    expected = 4 * (weight * (0.3 * p * (p / m).log() + 0.7 * q * (q / m).log()).sum(-1)).sum()
    torch.testing.assert_close(jsd(student, teacher, token_weight=weight, beta=0.3, temperature=2, impl=impl), expected)


def test_another_backward_pass_gives_the_same_gradient_whatever_was_done_to_the_first():
    student, teacher, weight = logits(3, 9)
    once = value_and_grad(student, teacher, weight)[1]
    loss = kl_div(student, teacher, token_weight=weight)
    for factor, retain in ((1.0, True), (3.0, True), (1.0, False)):
        (grad,) = torch.autograd.grad(factor * loss, student, retain_graph=retain)
        torch.testing.assert_close(grad, factor * once)
        grad.zero_()


def test_float16_keeps_small_gradients_for_a_scaled_loss():
    student, teacher, _ = logits(5, 16_384, dtype=torch.float16, spread=1.0)
    weight = torch.full((5,), 1 / 8192)
    truth = value_and_grad(student.double(), teacher.double(), weight.double(), impl="reference")[1]
    loss = kl_div(student, teacher, token_weight=weight, impl="chunked")
    (grad,) = torch.autograd.grad(2**23 * loss, student)
    assert grad.dtype == torch.float16
    assert (grad.double() - 2**23 * truth).norm() <= 1e-3 * 2**23 * truth.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_operator_keeps_what_torch_asks_of_one(dtype):
    student, teacher, weight = logits(3, 9, dtype=dtype)
    given = (student, teacher, weight, "jsd", "entropy", [0.5, 2.0], "chunked", 1, [True])
    torch.library.opcheck(fused._divergence_loss, given)


def test_a_second_derivative_is_refused():
    student, teacher, weight = logits(3, 9)
    loss = kl_div(student, teacher, token_weight=weight)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, student, create_graph=True)


def test_a_teacher_that_requires_grad_is_refused():
    student, teacher, weight = logits(2, 5)
    with pytest.raises(ValueError, match="no_grad"):
        kl_div(student, teacher.requires_grad_(), token_weight=weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "above 0"),
        ({"token_weight": torch.tensor([1.0, -1.0])}, "at least 0 everywhere, got -1"),
        ({"token_weight": torch.ones(2, dtype=torch.int64)}, "floating point, got torch.int64"),
        ({"token_weight": torch.ones(3)}, r"token_weight must be \(2,\)"),
        ({"impl": "cuda"}, "none of auto"),
        ({"token_weight": torch.tensor([1.0, float("inf")])}, "finite and at least 0 everywhere, got inf"),
        ({"impl": "chunked", "memory_mb": 0}, "memory_mb=0 does not hold the logits of one token; at least 1"),
        ({"impl": "chunked", "memory_mb": 1.5}, "whole number, got 1.5"),
    ],
)
def test_wrong_arguments_are_refused(change, message):
    student, teacher, weight = logits(2, 5)
    with pytest.raises(ValueError, match=message):
        kl_div(student, teacher, **{"token_weight": weight, **change})


def test_a_budget_that_does_not_hold_one_token_is_refused():
    student, teacher, weight = logits(1, 100_000)
    with pytest.raises(ValueError, match=r"memory_mb=1 does not hold .* at least 2 are needed"):
        kl_div(student, teacher, token_weight=weight, impl="chunked", memory_mb=1)


@pytest.mark.parametrize("impl", HERE)
def test_logits_over_nothing_are_refused(impl):
    with pytest.raises(ValueError, match="vocabulary must have at least 1 entry"):
        kl_div(torch.ones(2, 0), torch.ones(2, 0), token_weight=torch.ones(2), impl=impl)


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
