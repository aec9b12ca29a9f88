"""Test groups and their word problems against sympy's permutations."""

import pytest
import torch
from chi_square import assert_distributed
from sympy.combinatorics import Permutation
from sympy.combinatorics.named_groups import AlternatingGroup, CyclicGroup, SymmetricGroup

from lrnn.errors import UserError
from lrnn.track.tasks.group_words import GroupWord, generate_group, named_generators, running_products

SEED = 4
GROUPS = {
    "S3": (6, SymmetricGroup(3)),
    "S4": (24, SymmetricGroup(4)),
    "A5": (60, AlternatingGroup(5)),
    "S5": (120, SymmetricGroup(5)),
    "Z60": (60, CyclicGroup(60)),
}


@pytest.fixture(scope="module")
def s5():
    return generate_group(named_generators("S5"))


@pytest.mark.parametrize("name", GROUPS)
def test_elements_and_products_equal_sympys(name):
    order, reference = GROUPS[name]
    group = generate_group(named_generators(name))
    permutations = [Permutation(images) for images in group.elements.tolist()]
    assert len(group) == order == reference.order()
    assert set(permutations) == set(reference.elements)
    assert permutations[0].is_Identity
    number = {permutation: i for i, permutation in enumerate(permutations)}
    for a in range(0, order, max(1, order // 12)):
        for b in range(order):
            assert group.table[a, b].item() == number[permutations[a] * permutations[b]]


def test_the_order_of_multiplication(s5):
    # (0 1) first, then (1 2): the point 0 goes to 1 and on to 2.
    number = {tuple(images): i for i, images in enumerate(s5.elements.tolist())}
    a, b = number[(1, 0, 2, 3, 4)], number[(0, 2, 1, 3, 4)]
    assert s5.elements[s5.table[a, b]].tolist() == [2, 0, 1, 3, 4]


def test_elements_of_z60_add():
    table = generate_group(named_generators("Z60")).table
    numbers = torch.arange(60)
    assert torch.equal(table, (numbers[:, None] + numbers) % 60)


def test_any_list_of_permutations():
    dihedral = generate_group([[1, 2, 3, 0], [0, 3, 2, 1]])
    assert len(dihedral) == 8
    assert len(generate_group([[1, 2, 0, 4, 5, 6, 3, 7, 8], [0, 1, 2, 3, 4, 5, 6, 8, 7]])) == 3 * 4 * 2


@pytest.mark.parametrize("length", [1, 2, 3, 31, 32, 33, 100])
def test_running_products_step_by_step(s5, length):
    elements = torch.randint(120, (4, length), generator=torch.Generator().manual_seed(0))
    permutations = [Permutation(images) for images in s5.elements.tolist()]
    products = running_products(s5.table, elements)
    for row, expected in zip(elements.tolist(), products.tolist(), strict=True):
        so_far = Permutation(4)
        for element, product in zip(row, expected, strict=True):
            so_far = so_far * permutations[element]
            assert permutations[product] == so_far


@pytest.mark.parametrize(("variant", "count"), [("all", 120), ("only_swaps", 11), ("three_permutations", 31)])
def test_variants_of_s5(variant, count):
    task = GroupWord("S5", variant)
    batch = task.batch(SEED, torch.arange(1000), 5, 40)
    permutations = [Permutation(images) for images in task.group.elements.tolist()]
    for ids, labels, length in zip(*(tensor[:50].tolist() for tensor in batch), strict=True):
        assert set(ids[length:]) <= {task.pad_id} and set(labels[length:]) <= {-100}
        so_far = Permutation(4)
        for element, label in zip(ids[:length], labels[:length], strict=True):
            so_far = so_far * permutations[element]
            assert permutations[label] == so_far
    drawn = batch.input_ids[batch.input_ids != task.pad_id].tolist()
    most = {"all": 5, "only_swaps": 2, "three_permutations": 3}[variant]
    allowed = [i for i, p in enumerate(permutations) if len(p.support()) <= most]
    assert len(allowed) == count
    assert_distributed(drawn, {i: 1 / count for i in allowed})
    assert task.vocab_size == 121 and task.pad_id == 120 and task.num_classes == 120


def test_four_tokens():
    task = GroupWord("S5", "four_tokens")
    one_token = GroupWord("S5").batch(SEED, torch.arange(300), 16, 16)
    batch = task.batch(SEED, torch.arange(300), 64, 64)
    assert task.vocab_size == 122 and batch.input_ids.shape == (300, 64)
    for place in range(4):
        ids, labels = batch.input_ids[:, place::4], batch.labels[:, place::4]
        assert torch.equal(ids, one_token.input_ids) if place == 0 else (ids == 120).all()
        assert torch.equal(labels, one_token.labels) if place == 3 else (labels == -100).all()
    ranged = task.batch(SEED, torch.arange(3000), 5, 30)
    assert_distributed(ranged.lengths.tolist(), {n: 1 / 6 for n in (8, 12, 16, 20, 24, 28)})
    for ids, labels, length in zip(*(tensor.tolist() for tensor in ranged), strict=True):
        assert set(ids[length:]) <= {121} and 121 not in ids[:length]
        assert sum(label >= 0 for label in labels) == length // 4 and labels[length - 1] >= 0


def test_others_among_swaps():
    """An element is one of all 24 with the share's probability, otherwise one of the 7 that move at most two points."""
    task = GroupWord("S4", "only_swaps", others=0.3)
    assert len(task.inputs) == 7 and task.vocab_size == GroupWord("S4").vocab_size
    ids, labels, _ = task.batch(SEED, torch.arange(4000), 6, 6)
    few = set(task.inputs.tolist())
    expected = {element: 0.3 / 24 + 0.7 / 7 * (element in few) for element in range(24)}
    for place in range(6):
        assert_distributed(ids[:, place].tolist(), expected)
    assert torch.equal(labels, running_products(task.group.table, ids))
    # Whether a position draws from the whole group is independent of the other position.
    pairs = GroupWord("S3", "only_swaps", others=0.5).batch(SEED, torch.arange(20000), 2, 2).input_ids
    few = set(GroupWord("S3", "only_swaps").inputs.tolist())
    share = {element: 0.5 / 6 + 0.5 / 4 * (element in few) for element in range(6)}
    assert_distributed(
        (6 * pairs[:, 0] + pairs[:, 1]).tolist(), {6 * a + b: share[a] * share[b] for a in share for b in share}
    )


FIVE_CYCLES = [[1, 2, 3, 4, 0], [1, 2, 4, 0, 3]]


def test_words_of_a_few_elements():
    """Inputs are two cycles of five and a tenth of all 60 elements; products equal sympy's."""
    task = GroupWord("A5", others=0.1, inputs=FIVE_CYCLES)
    elements = task.group.elements.tolist()
    few = {elements.index(cycle) for cycle in FIVE_CYCLES}
    assert task.vocab_size == GroupWord("A5").vocab_size and set(task.inputs.tolist()) == few
    ids, labels, _ = task.batch(SEED, torch.arange(4000), 3, 3)
    for place in range(3):
        assert_distributed(ids[:, place].tolist(), {e: 0.1 / 60 + 0.45 * (e in few) for e in range(60)})
    for row, answers in zip(ids[:50].tolist(), labels[:50].tolist(), strict=True):
        product = Permutation(4)
        for element, answer in zip(row, answers, strict=True):
            product = product * Permutation(elements[element])
            assert product.array_form == elements[answer]
    alone = GroupWord("A5", inputs=FIVE_CYCLES).batch(SEED, torch.arange(500), 3, 3)
    assert set(alone.input_ids.flatten().tolist()) == few


@pytest.mark.parametrize(
    ("variant", "others"),
    [("all", 0), ("only_swaps", 0), ("three_permutations", 0), ("four_tokens", 0), ("only_swaps", 0.25)],
)
def test_answer_distribution_by_sampling(variant, others):
    task = GroupWord("S4", variant, others)
    low, high = (4, 16) if variant == "four_tokens" else (1, 4)
    distribution = task.answer_distribution(low, high)
    assert distribution.sum().item() == pytest.approx(1)
    # Each size and place takes one label from its own batch, so that all draws are independent.
    drawn, batches = [], 0
    for size in task.sizes(low, high):
        for place in range(size // task.tokens_per_element):
            labels = task.batch(SEED, torch.arange(8000) + 8000 * batches, size, size).labels
            drawn += labels[labels != -100].view(8000, -1)[:, place].tolist()
            batches += 1
    assert_distributed(drawn, {i: p for i, p in enumerate(distribution.tolist()) if p > 0})
    assert task.majority_floor(low, high) == distribution.max().item()


def test_majority_floor_of_uniform_elements_is_chance():
    for name, (order, _) in GROUPS.items():
        assert GroupWord(name).majority_floor(32, 500) == pytest.approx(1 / order)
    # With swaps only, even and odd products differ at first only: one in 11 sequences starts with the identity.
    assert GroupWord("S5", "only_swaps").majority_floor(1, 1) == pytest.approx(1 / 11)


def test_bad_groups_and_variants():
    for bad in ([[0, 0, 1]], [[1, 2]], [[]], [3], [[0.0, 1.0]], ["ab"], [[0, "1"]]):
        with pytest.raises(UserError, match="not a permutation"):
            GroupWord(bad)
    with pytest.raises(UserError, match="at least one generator"):
        GroupWord([])
    with pytest.raises(UserError, match="different numbers of points"):
        GroupWord([[1, 0], [1, 0, 2]])
    for bad in ("S1", "A2", "D5", "S", "Z1001", "S 5", ""):
        with pytest.raises(UserError, match="unknown group"):
            GroupWord(bad)
    with pytest.raises(UserError, match="more than 1000 elements"):
        GroupWord("S7")
    assert len(generate_group(named_generators("S4"), limit=24)) == 24
    with pytest.raises(UserError, match="more than 23 elements"):
        generate_group(named_generators("S4"), limit=23)
    with pytest.raises(UserError, match="only_swaps, three_permutations, four_tokens"):
        GroupWord("S5", "swaps")
    with pytest.raises(UserError, match="only the identity"):
        GroupWord("A5", "only_swaps")
    with pytest.raises(UserError, match="multiple of 4"):
        GroupWord("S5", "four_tokens").batch(SEED, torch.arange(2), 5, 7)
    with pytest.raises(UserError, match="smallest size is 1"):
        GroupWord("S3").batch(SEED, torch.arange(2), 0, 7)
    for bad in (-0.1, 1.5, "some"):
        with pytest.raises(UserError, match="others must be a share of the elements, from 0 to 1, not"):
            GroupWord("S5", "only_swaps", bad)
    with pytest.raises(UserError, match=r"others needs inputs or one of the variants only_swaps, .* not 'all'"):
        GroupWord("S5", others=0.5)
    with pytest.raises(UserError, match=r"inputs \[\[1, 0, 2, 3, 4\]\] are not in group 'A5'"):
        GroupWord("A5", inputs=[*FIVE_CYCLES, [1, 0, 2, 3, 4]])
    for few in ([], FIVE_CYCLES[:1]):
        with pytest.raises(UserError, match="inputs leaves fewer than two elements of group 'A5'"):
            GroupWord("A5", inputs=few)
    with pytest.raises(UserError, match="not a permutation"):
        GroupWord("A5", inputs=[[0, 0, 1, 2, 3]])
    with pytest.raises(UserError, match="inputs and variant 'only_swaps' both set which elements are drawn"):
        GroupWord("S5", "only_swaps", inputs=FIVE_CYCLES)
