from typing import get_args

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from compresskit.kernels.divergence import Divergence, Kind
from compresskit.kernels.linear_kl import Head, TiledWeight, TopK, linear_kl, op
from compresskit.kernels.linear_kl.chunked import Wants, chunked_linear_kl, tokens_per_chunk
from compresskit.kernels.linear_kl.problem import Projected, checked_problem
from compresskit.kernels.linear_kl.products import WeightGradient
from compresskit.kernels.slab import TILE_ELEMENTS, slab_loss_

KINDS = get_args(Kind)
FUSED = "chunked"  # Triton has its own test, in a process of its own
T, HS, HT, V = 7, 5, 6, 23


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def draw(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def arguments(dtype=torch.float64, tokens=T, student_width=HS, vocabulary=V, **changes):
    """Keyword arguments of `linear_kl`; hidden states and the student's weight require grad."""
    weight = torch.rand(tokens, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)
    return {
        "student_hidden": draw(tokens, student_width, seed=1, dtype=dtype).requires_grad_(),
        "student_head": Head(draw(vocabulary, student_width, seed=2, dtype=dtype).requires_grad_()),
        "teacher_hidden": draw(tokens, HT, seed=3, dtype=dtype),
        "teacher_head": draw(vocabulary, HT, seed=4, dtype=dtype),
        "token_weight": weight,
        "memory_mb": 1,
        **changes,
    }


def leaves(given):
    head = given["student_head"]
    return [
        one
        for one in (given["student_hidden"], head.weight, head.bias, head.reduce)
        if isinstance(one, torch.Tensor) and one.requires_grad
    ]


def value_and_grads(given, impl):
    wanted = leaves(given)
    loss = linear_kl(**given, impl=impl)
    return loss.detach(), torch.autograd.grad(loss, wanted)


def rich(dtype=torch.float64, **changes):
    """Everything at once: bias, scale and cap on both sides, labels, a masked token."""
    given = arguments(dtype, **changes)
    bias = draw(V, seed=6, dtype=dtype).requires_grad_()
    labels = torch.randint(V, (T,), generator=torch.Generator().manual_seed(7))
    label_weight = torch.linspace(0, 1, T).to(dtype)
    given["token_weight"][3] = 0
    return given | {
        "student_head": Head(given["student_head"].weight, bias, scale=0.7, softcap=4.0),
        "teacher_head": Head(given["teacher_head"], draw(V, seed=8, dtype=dtype), scale=1.3, softcap=5.0),
        "labels": labels,
        "label_weight": label_weight,
    }


def teachers(given, divergence):
    """The three ways to give the teacher of `given`, the same one each time."""
    head = given["teacher_head"]
    head = head if isinstance(head, Head) else Head(head)
    logits = head.logits_of_reduced(given["teacher_hidden"])
    rest = {name: one for name, one in given.items() if not name.startswith("teacher")}
    return {
        "hidden": given,
        "logits": rest | {"teacher_logits": logits},
        "topk": rest | {"teacher_topk": TopK.of(logits, 4, temperature=divergence.temperature)},
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("teacher", ["hidden", "logits", "topk"])
@pytest.mark.parametrize("rule", ["none", "confidence", "entropy"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_chunked_is_the_reference_with_its_autograd(kind, teacher, rule, temperature):
    divergence = Divergence(kind, 0.3, temperature, rule)
    given = teachers(rich(divergence=divergence), divergence)[teacher]
    torch.testing.assert_close(
        value_and_grads(given, FUSED), value_and_grads(given, "reference"), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("impl", [FUSED, "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_the_derivative_of_the_value(impl, kind):
    given = rich(divergence=Divergence(kind, 0.3, 2.0))
    head = given["student_head"]

    def loss(hidden, weight, bias):
        changed = Head(weight, bias, scale=head.scale, softcap=head.softcap)
        return linear_kl(**given | {"student_hidden": hidden, "student_head": changed}, impl=impl)

    assert torch.autograd.gradcheck(loss, (given["student_hidden"], head.weight, head.bias))


def test_low_rank_and_tiled_heads_give_what_their_whole_weights_give():
    given = arguments()
    thin, wide = draw(3, HS, seed=9).requires_grad_(), draw(V, 3, seed=10).requires_grad_()
    given["student_head"] = Head(wide, reduce=thin)
    weight = given["teacher_head"]
    tiled = given | {"teacher_head": Head(TiledWeight((V, HT), lambda start, stop: weight[start:stop], weight.dtype))}
    torch.testing.assert_close(value_and_grads(tiled, FUSED), value_and_grads(given, "reference"))


def test_a_shared_head_needs_one_product_and_a_frozen_one_no_gradient(monkeypatch):
    given = arguments()
    head = given["student_head"].weight
    given |= {"teacher_hidden": draw(T, HS, seed=11), "teacher_head": head.detach()}
    calls = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **options: calls.append(args[0].shape) or real(*args, **options))
    shared = value_and_grads(given, FUSED)
    with_gradient = len(calls)
    frozen = given | {"student_head": Head(head.detach())}
    hidden_grad = value_and_grads(frozen, FUSED)[1][0]
    monkeypatch.undo()
    assert (with_gradient, len(calls) - with_gradient) == (3, 2)
    torch.testing.assert_close(shared, value_and_grads(given, "reference"))
    torch.testing.assert_close(hidden_grad, shared[1][0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_chunks_change_nothing_but_rounding(dtype):
    """3 MiB hold few tokens of this vocabulary, 64 MiB all of them."""
    given = arguments(dtype, tokens=40, vocabulary=20_000)
    given["token_weight"] = given["token_weight"].float()
    whole = value_and_grads(given | {"memory_mb": 64}, FUSED)
    parts = value_and_grads(given | {"memory_mb": 3}, FUSED)
    for one, other in zip((whole[0], *whole[1]), (parts[0], *parts[1]), strict=True):
        assert (one - other).abs().max() <= 2 * torch.finfo(one.dtype).eps ** (1 if dtype != torch.float32 else 0.8) * (
            one.abs().max()
        )


@pytest.mark.parametrize("kind", KINDS)
def test_equal_teacher_and_student_give_zero_with_no_gradient(kind):
    given = arguments()
    head = given["student_head"].weight
    given |= {"teacher_hidden": given["student_hidden"].detach(), "teacher_head": head.detach()}
    value, grads = value_and_grads(given | {"divergence": Divergence(kind)}, FUSED)
    assert value.abs() < 1e-15
    assert max(grad.abs().max() for grad in grads) < 1e-15


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", [FUSED, "reference"])
def test_a_token_that_counts_for_nothing_is_not_read(kind, impl):
    given = rich(divergence=Divergence(kind))
    given["label_weight"][3] = 0
    clean = value_and_grads(given, impl)
    with torch.no_grad():
        given["student_hidden"][3], given["teacher_hidden"][3] = float("nan"), float("inf")
    given["labels"][3] = -100
    spoilt = value_and_grads(given, impl)
    assert torch.equal(clean[0], spoilt[0])
    assert all(torch.equal(one, other) for one, other in zip(clean[1], spoilt[1], strict=True))
    assert torch.count_nonzero(spoilt[1][0][3]) == 0


@pytest.mark.parametrize("impl", [FUSED, "reference"])
def test_a_token_that_counts_for_nothing_is_not_read_by_a_low_rank_head(impl):
    given = arguments()
    given["student_head"] = Head(draw(V, 3, seed=10).requires_grad_(), reduce=draw(3, HS, seed=9).requires_grad_())
    given["token_weight"][3] = 0
    clean = value_and_grads(given, impl)
    with torch.no_grad():
        given["student_hidden"][3] = float("nan")
    torch.testing.assert_close(value_and_grads(given, impl), clean, rtol=0, atol=0)


def test_picked_rows_of_a_teachers_logits_make_no_second_slab():
    given = arguments(tokens=40, vocabulary=5000)
    given["token_weight"][::2] = 0
    logits, head = draw(40, 5000, seed=12), Head(given["student_head"].weight.detach())
    hidden = given["student_hidden"].detach()
    problem = checked_problem(hidden, head, logits, given["token_weight"], None, None, Divergence())
    with Fresh() as made:
        loss, _ = chunked_linear_kl(problem, Wants(hidden=True, weight=True, bias=False), 64, slab_loss_)
    assert len(made.sizes) > 10
    assert max(made.sizes) <= TILE_ELEMENTS < 20 * 5000
    reference = linear_kl(hidden, head, teacher_logits=logits, token_weight=given["token_weight"], impl="reference")
    torch.testing.assert_close(loss, reference)


@pytest.mark.parametrize("impl", [FUSED, "reference"])
def test_all_weights_zero_give_zero_with_zero_gradients(impl):
    value, grads = value_and_grads(rich() | {"token_weight": torch.zeros(T), "label_weight": torch.zeros(T)}, impl)
    assert value == 0
    assert len(grads) == 3
    assert all(torch.count_nonzero(grad) == 0 for grad in grads)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", [FUSED, "reference"])
def test_peaked_rows_and_absent_columns_stay_finite(kind, impl):
    given = arguments(torch.float32, divergence=Divergence(kind))
    bias = torch.zeros(V)
    bias[5:8] = float("-inf")
    with torch.no_grad():
        given["student_hidden"].mul_(60)
        given["teacher_hidden"].mul_(60)
    given["student_head"] = Head(given["student_head"].weight, bias)
    given["teacher_head"] = Head(given["teacher_head"], bias)
    value, grads = value_and_grads(given, impl)
    assert torch.isfinite(value)
    assert all(torch.isfinite(grad).all() for grad in grads)
    assert torch.count_nonzero(grads[1][5:8]) == 0


def test_a_column_that_the_student_alone_lacks_makes_forward_kl_infinite():
    given = arguments()
    bias = torch.zeros(V, dtype=torch.float64)
    bias[2] = float("-inf")
    given["student_head"] = Head(given["student_head"].weight, bias)
    assert value_and_grads(given, FUSED)[0] == value_and_grads(given, "reference")[0] == float("inf")


@pytest.mark.parametrize(("ours", "theirs"), [(V - 3, V), (V, V - 3)])
@pytest.mark.parametrize("impl", [FUSED, "reference"])
def test_padded_vocabularies_are_cut_to_the_shorter(ours, theirs, impl):
    given = arguments()
    weight = given["student_head"].weight
    cut = given | {"student_head": Head(weight[: V - 3].detach().requires_grad_())}
    cut["teacher_head"] = given["teacher_head"][: V - 3]
    padded = given | {"student_head": Head(weight[:ours].detach().requires_grad_())}
    padded["teacher_head"] = given["teacher_head"][:theirs]
    value, (hidden_grad, weight_grad) = value_and_grads(padded, impl)
    expected, (hidden_expected, weight_expected) = value_and_grads(cut, impl)
    torch.testing.assert_close((value, hidden_grad), (expected, hidden_expected))
    torch.testing.assert_close(weight_grad[: V - 3], weight_expected)
    assert torch.count_nonzero(weight_grad[V - 3 :]) == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 4, V])
def test_a_cache_gives_a_lower_bound_and_the_whole_of_it_the_divergence(kind, k):
    divergence = Divergence(kind, 0.3, 2.0)
    given = arguments(divergence=divergence)
    logits = given["teacher_hidden"] @ given["teacher_head"].T
    rest = {name: one for name, one in given.items() if not name.startswith("teacher")}
    whole = linear_kl(**rest, teacher_logits=logits)
    cached = linear_kl(**rest, teacher_topk=TopK.of(logits, k, temperature=2.0))
    assert -1e-12 <= cached <= whole + 1e-9
    if k == V:
        torch.testing.assert_close(cached, whole, rtol=1e-6, atol=0)


def test_autocast_runs_the_products_in_its_dtype():
    given = arguments(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        value, grads = value_and_grads(given, FUSED)
    exact, exact_grads = value_and_grads(given, "reference")
    assert value.dtype == torch.float32
    assert [grad.dtype for grad in grads] == [torch.float32, torch.float32]
    assert 0 < (value - exact).abs() <= 2e-2 * exact
    for grad, truth in zip(grads, exact_grads, strict=True):
        assert (grad - truth).norm() <= 2e-2 * truth.norm()


def test_a_shared_head_needs_one_cast_and_one_product_under_autocast(monkeypatch):
    given = arguments(torch.float32)
    given |= {"teacher_hidden": draw(T, HS, seed=11, dtype=torch.float32)}
    given["teacher_head"] = given["student_head"].weight.detach()
    calls = []
    real = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *args, **options: calls.append(args[0].shape) or real(*args, **options))
    with torch.autocast("cpu", torch.bfloat16):
        shared = value_and_grads(given, FUSED)
        assert len(calls) == 3
        apart = value_and_grads(given | {"teacher_head": given["teacher_head"].clone()}, FUSED)
    torch.testing.assert_close(shared, apart)


def test_a_tiled_student_gives_hidden_states_the_gradient_of_its_whole_weight():
    """In float64 to its precision, over more rows than are made at once."""
    given = arguments(vocabulary=10_000)
    weight = given["student_head"].weight.detach()
    expected = value_and_grads(given, "reference")[1][0]
    rows = lambda start, stop: weight[start:stop]  # noqa: E731
    tiled = given | {"student_head": Head(TiledWeight((10_000, HS), rows, weight.dtype))}
    torch.testing.assert_close(value_and_grads(tiled, FUSED)[1][0], expected, rtol=1e-10, atol=1e-12)


def test_the_operator_is_one_node_of_a_compiled_graph():
    given = rich(torch.float32)

    def loss(hidden, weight):
        head = Head(weight, given["student_head"].bias, scale=0.7, softcap=4.0)
        return 2 * linear_kl(**given | {"student_hidden": hidden, "student_head": head})

    leaves = given["student_hidden"], given["student_head"].weight
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    results = [(function(*leaves), leaves) for function in (loss, compiled)]
    results = [(value, torch.autograd.grad(value, wanted)) for value, wanted in results]
    torch.testing.assert_close(results[0], results[1])


def test_another_backward_pass_gives_the_same_gradients_whatever_was_done_to_the_first():
    given = arguments()
    once = value_and_grads(given, FUSED)[1]
    loss = linear_kl(**given, impl=FUSED)
    for factor, retain in ((1.0, True), (3.0, True), (1.0, False)):
        grads = torch.autograd.grad(factor * loss, leaves(given), retain_graph=retain)
        torch.testing.assert_close(grads, tuple(factor * one for one in once))
        for grad in grads:
            grad.zero_()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, 0.3])
def test_one_backward_pass_makes_no_second_gradient_of_the_heads_size(dtype, factor):
    given = arguments(dtype, vocabulary=5000)
    loss = linear_kl(**given, impl=FUSED) * factor
    with Fresh() as made:
        torch.autograd.grad(loss, leaves(given))
    assert made.sizes
    assert max(made.sizes) < 5000 * HS


@pytest.mark.parametrize("retain", [False, True])
def test_the_losss_own_factor_is_rounded_with_the_gradient_only(retain):
    given = arguments(torch.bfloat16)
    once = value_and_grads(given, FUSED)[1]
    grads = torch.autograd.grad(0.3 * linear_kl(**given, impl=FUSED), leaves(given), retain_graph=retain)
    assert all(torch.equal(grad, (0.3 * one.float()).bfloat16()) for grad, one in zip(grads, once, strict=True))


@pytest.mark.parametrize("weight", [1.0, 1 / 8192])
@pytest.mark.parametrize("labels", [False, True])
def test_float16_keeps_small_gradients_for_a_scaled_loss(weight, labels):
    given = arguments(torch.float16, vocabulary=16_384)
    given["token_weight"] = torch.full((T,), weight)
    given["student_head"] = Head(given["student_head"].weight, torch.zeros(16_384).half().requires_grad_(), scale=0.25)
    if labels:
        given |= {"labels": torch.arange(T), "label_weight": torch.full((T,), weight)}
    head = given["student_head"]
    exact = {name: one.detach().double() if isinstance(one, torch.Tensor) else one for name, one in given.items()}
    exact["student_hidden"].requires_grad_()
    exact["student_head"] = Head(
        *(one.detach().double().requires_grad_() for one in (head.weight, head.bias)), scale=0.25
    )
    if labels:
        exact["labels"] = given["labels"]
    truth, true_grads = value_and_grads(exact, "reference")
    loss = linear_kl(**given, impl=FUSED)
    grads = torch.autograd.grad(1024 / weight * loss, leaves(given))
    torch.testing.assert_close(loss, truth.float(), rtol=2e-3, atol=0)
    for grad, expected in zip(grads, true_grads, strict=True):
        assert grad.dtype == torch.float16
        assert (grad.double() - 1024 / weight * expected).norm() <= 2e-2 * 1024 / weight * expected.norm()


@pytest.mark.parametrize("memory_mb", [1, 3, 64])
def test_a_chunks_slabs_fill_the_budget_and_no_more(memory_mb):
    given = arguments(tokens=5, vocabulary=4000)
    weights = given["student_head"].weight, given["teacher_head"]
    hidden = given["student_hidden"], given["teacher_hidden"]
    ours, theirs = (Head(one.detach()) for one in weights)
    problem = checked_problem(
        hidden[0].detach(), ours, Projected(hidden[1], theirs), given["token_weight"], None, None, Divergence()
    )
    tokens = tokens_per_chunk(problem, 100_000, memory_mb)
    used = tokens * 2 * 4000 * 8
    assert used <= memory_mb * 2**20
    assert used >= 0.7 * memory_mb * 2**20 or tokens > 1000


def test_16_bit_gradients_of_chunks_are_summed_in_float32():
    sums = WeightGradient(torch.zeros(2, 1, dtype=torch.bfloat16), 300)
    for _ in range(300):
        sums.add(torch.ones(2, 1, dtype=torch.bfloat16), torch.ones(1, 1, dtype=torch.bfloat16))
    assert sums.result().tolist() == [[300.0], [300.0]]  # a sum in bfloat16 stops at 256


def test_the_callers_autocast_ends_at_the_operator():
    given, seen = arguments(torch.float32), []
    weight = given["teacher_head"]

    def rows(start, stop):
        seen.append(torch.is_autocast_enabled("cpu"))
        return weight[start:stop]

    with torch.autocast("cpu", torch.bfloat16):
        linear_kl(**given | {"teacher_head": Head(TiledWeight((V, HT), rows))}, impl=FUSED)
    assert seen == [False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_operator_keeps_what_torch_asks_of_one(dtype, monkeypatch):
    given, calls = rich(dtype), []
    head = given["student_head"]
    columns_first = head.weight.detach().T.contiguous().T.requires_grad_()
    given["student_head"] = Head(columns_first, head.bias, scale=0.7, softcap=4.0)
    real = op._linear_kl
    monkeypatch.setattr(op, "_linear_kl", lambda *args: calls.append(args) or real(*args))
    linear_kl(**given, impl=FUSED)
    torch.library.opcheck(real, calls[0])


def test_a_second_derivative_is_refused():
    given = arguments()
    with pytest.raises(RuntimeError, match="use impl='reference'"):
        torch.autograd.grad(linear_kl(**given), given["student_hidden"], create_graph=True)


class Fresh(TorchDispatchMode):
    """Notes how many elements the memory behind each operator's results holds."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = {one.untyped_storage().data_ptr() for one in tree_leaves((args, kwargs)) if torch.is_tensor(one)}
        result = func(*args, **kwargs)
        made = [one for one in tree_leaves(result) if torch.is_tensor(one)]
        self.sizes += [one.numel() for one in made if one.untyped_storage().data_ptr() not in given]
        return result


def low_rank(wide=3, thin=(3, HS), dtype=torch.float64, device="cpu"):
    return Head(torch.ones(V, wide).double(), reduce=torch.ones(thin, dtype=dtype, device=device))


def bad(**changes):
    return changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (bad(student_hidden=torch.ones(T, HS + 1).double()), rf"student_hidden must be \({T}, {HS}\), got"),
        (bad(student_hidden=torch.ones(T, HS)), "hidden states are torch.float32 and its head torch.float64"),
        (bad(student_hidden=torch.ones(T, HS).long()), "student_hidden must be floating point, got torch.int64"),
        (bad(teacher_hidden=torch.ones(T + 1, HT).double()), rf"teacher_hidden must be \({T}, {HT}\)"),
        (bad(teacher_hidden=torch.ones(T, HT).double().requires_grad_()), "teacher_hidden requires grad"),
        (bad(teacher_head=None), "belong together"),
        (bad(teacher_logits=torch.ones(T, V)), "exactly one of .* got teacher_hidden, teacher_logits"),
        (bad(teacher_hidden=None, teacher_head=None), "got none"),
        (bad(teacher_head=torch.ones(V, HT, device="meta").double()), "on one device"),
        (bad(token_weight=torch.ones(T + 1)), rf"token_weight must be \({T},\)"),
        (bad(token_weight=-torch.ones(T)), "at least 0 everywhere, got -1"),
        (bad(labels=torch.zeros(T).long()), "label_weight is missing"),
        (bad(labels=torch.full((T,), V), label_weight=torch.ones(T)), rf"0…{V - 1} where they count, got {V}"),
        (bad(labels=torch.zeros(T), label_weight=torch.ones(T)), "labels must be int64"),
        (
            bad(student_head=Head(torch.ones(V, HS).double(), softcap=-1.0)),
            "softcap must be above 0 and finite, got -1",
        ),
        (bad(student_hidden=torch.tensor(1.0)), r"student_hidden must be \(any, any\), got \(\)"),
        (bad(student_head=torch.ones(V)), r"student's weight must be \(V, H\), got \(23,\)"),
        (bad(student_head=torch.ones(V, HS, 1)), r"student's weight must be \(V, H\), got \(23, 5, 1\)"),
        (bad(student_head=torch.ones(0, HS).double()), "vocabulary must have at least 1 entry"),
        (bad(student_head=low_rank(wide=4)), r"student's reduce must be \(4, any\), got \(3, 5\)"),
        (bad(student_head=low_rank(thin=(3, HS + 1))), rf"student_hidden must be \({T}, 6\), got \({T}, 5\)"),
        (bad(student_head=low_rank(thin=(3,))), r"student's reduce must be \(3, any\), got \(3,\)"),
        (bad(student_head=low_rank(dtype=torch.float32)), "float64 and its head's reduce torch.float32"),
        (bad(student_head=low_rank(dtype=torch.int64)), "student_reduce must be floating point"),
        (bad(student_head=low_rank(device="meta")), "one device, got .*student_reduce on meta"),
        (bad(student_head=Head(torch.ones(V, HS).double(), scale=float("nan"))), "scale must be finite, got nan"),
        (bad(student_head=Head(torch.ones(V, HS).double(), softcap=float("inf"))), "above 0 and finite, got inf"),
        (bad(teacher_hidden=None, teacher_head=None, teacher_logits=torch.tensor(1.0)), r"teacher_logits must be \(7,"),
        (bad(token_weight=torch.full((T,), float("inf"))), "token_weight must be finite .* got inf"),
        (bad(memory_mb=1.5), "memory_mb must be a whole number, got 1.5"),
        (bad(memory_mb=float("nan")), "memory_mb must be a whole number, got nan"),
        (bad(memory_mb=0), "memory_mb=0 does not hold the logits of one token; at least 1 are needed"),
        (bad(impl="cuda"), "none of auto"),
        (bad(impl="triton"), "cannot run here"),
    ],
)
def test_wrong_arguments_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        linear_kl(**arguments() | changes)


@pytest.mark.parametrize("name", ["student_hidden", "student_head", "teacher_hidden", "teacher_head"])
def test_integers_are_refused_under_autocast_too(name):
    given = arguments(torch.float32)
    whole = {"student_head": (V, HS), "teacher_head": (V, HT), "student_hidden": (T, HS), "teacher_hidden": (T, HT)}
    given[name] = torch.ones(whole[name]).long()
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError, match="must be floating point"):
        linear_kl(**given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda log_probs, indices: (log_probs.sub(float("nan")), indices), "at most 0, got nan"),
        (lambda log_probs, indices: (log_probs.neg(), indices), "at most 0, got"),
        (lambda log_probs, indices: (log_probs * 0, indices), "must sum to at most 1, got 4"),
        (lambda log_probs, indices: (log_probs, indices[:, [0, 1, 2, 0]]), "once in a token, got .* twice"),
        (lambda log_probs, indices: (log_probs, indices + V), rf"must lie in 0…{V - 1}"),
        (lambda log_probs, indices: (log_probs, indices - V), rf"must lie in 0…{V - 1}, got -"),
    ],
)
def test_a_cache_that_is_no_part_of_a_distribution_is_refused_where_it_is_read(change, message):
    given = teachers(arguments(), Divergence())["topk"]
    given["token_weight"][2:4] = 0
    cache, clean = given["teacher_topk"], value_and_grads(given, FUSED)
    log_probs, indices = change(cache.log_probs, cache.indices)
    with pytest.raises(ValueError, match=message):
        linear_kl(**given | {"teacher_topk": TopK(log_probs, indices)})
    if "lie in" in message:
        return
    for old, new in ((cache.log_probs, log_probs), (cache.indices, indices)):
        old[2:4] = new[2:4]
    torch.testing.assert_close(value_and_grads(given, FUSED), clean, rtol=0, atol=0)


def test_more_cached_entries_than_the_vocabulary_are_refused():
    with pytest.raises(ValueError, match=f"between 1 and the vocabulary's {V}, got {V + 1}"):
        TopK.of(torch.ones(T, V), V + 1)
    given = {name: one for name, one in arguments().items() if not name.startswith("teacher")}
    cache = TopK(torch.zeros(T, V + 1), torch.zeros(T, V + 1).long())
    with pytest.raises(ValueError, match=f"keeps {V + 1} entries; expected 1 to the vocabulary's {V}"):
        linear_kl(**given, teacher_topk=cache)


@pytest.mark.parametrize("options", [{"kind": "kl"}, {"kind": "jsd", "mix": 1.0}, {"temperature": 0.0}])
def test_divergences_that_are_none_are_refused(options):
    with pytest.raises(ValueError, match=r"none of forward_kl|between 0 and 1, got 1|above 0"):
        Divergence(**options)
