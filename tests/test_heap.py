import pytest

from dpo_lightning.memory.heap import MARGIN, Heap, Story, between

MB = 2**20


def coming_and_going(layers):
    """Of every layer one tensor stays and one does not."""
    events = []
    for layer in range(layers):
        events += [(2 * layer, MB), (2 * layer + 1, MB), (2 * layer, None)]
    return events


def test_a_hole_serves_the_next_of_its_size_where_nothing_has_settled():
    heap = Heap(settled=0)
    heap.play([*coming_and_going(10)])
    assert heap.used == 10 * MB
    assert heap.most == 11 * MB
    assert heap.size < heap.most + 12 * MARGIN


def test_where_small_objects_settle_every_hole_is_too_small():
    heap = Heap(settled=1)
    heap.play(coming_and_going(10))
    assert heap.size > 19 * MB


def test_a_hole_that_is_too_small_serves_smaller_ones():
    heap = Heap(settled=1)
    heap.play([(0, MB), (1, MB), (0, None), (2, MB)])
    large = heap.size
    heap.play([(2, None), (3, MB), (4, MB - 2 * MARGIN)])
    assert large > 3 * MB
    assert heap.size < large + MARGIN


def test_holes_side_by_side_are_one():
    heap = Heap(settled=0)
    heap.play([(0, MB), (1, MB), (2, MB)])
    size = heap.size
    heap.play([(0, None), (1, None), (3, 2 * MB)])
    assert heap.size == size


def test_an_empty_heap_is_used_again_from_its_beginning():
    heap = Heap(settled=0)
    heap.play([(0, MB), (0, None), (1, 4 * MB), (1, None), (2, 2 * MB)])
    assert heap.size == 4 * MB + MARGIN


def test_what_is_expected_grows_with_what_settles_and_is_always_the_same():
    story = Story([(-1, MB)], coming_and_going(20))
    never, seldom, always = (between(story, settled) for settled in (0, 0.3, 1))
    assert never < 0.1 * MB
    assert never < seldom < always
    assert between(story, 0.3) == seldom


@pytest.mark.parametrize("size", [1000, 2**15 - 1])
def test_small_tensors_do_not_count(size):
    assert between(Story([], [(0, size), (1, size), (0, None), (2, size)]), 1) == 0
