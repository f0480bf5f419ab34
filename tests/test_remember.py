"""What is remembered of tensors: once, until one is written to or dies."""

import gc
import weakref

import torch

from tilecut_runtime.remember import Remembered


def counted(remembered, tensors, beside=0):
    made = []
    remembered(tensors, beside, lambda: made.append(1))
    return len(made)


def test_once_for_the_same_tensors_and_what_is_beside_them():
    remembered = Remembered()
    a, b = torch.zeros(3), torch.zeros(3)
    assert [counted(remembered, (a, b)) for _ in range(3)] == [1, 0, 0]
    assert counted(remembered, (a, b), 1) == 1 and counted(remembered, (a, a)) == 1
    assert counted(remembered, (a, b)) == counted(remembered, (a, b), 1) == counted(remembered, (a, a)) == 0
    assert counted(remembered, (b, a)) == 1 and counted(remembered, (a.clone(), b)) == 1


def test_again_after_a_write_to_any_of_them():
    remembered = Remembered()
    a, b = torch.zeros(3), torch.zeros(3)
    counted(remembered, (a, b))
    b.add_(1)
    assert [counted(remembered, (a, b)) for _ in range(2)] == [1, 0]
    a[0] = 2
    assert [counted(remembered, (a, b)) for _ in range(2)] == [1, 0]


def test_the_second_may_be_another_at_the_same_address():
    remembered = Remembered()
    a = torch.zeros(3)
    for _ in range(5):
        assert counted(remembered, (a, torch.zeros(3))) == 1


def test_what_was_made_dies_with_the_first():
    remembered, a = Remembered(), torch.zeros(3)
    made = torch.ones(2)
    watched = weakref.ref(made)
    remembered((a,), 0, lambda made=made: made)
    del made
    gc.collect()
    assert watched() is not None
    del a
    gc.collect()
    assert watched() is None


def test_what_was_made_dies_with_another_of_them():
    """A decoder keeps the bounds of its queries, and has new ones of its keys at every step."""
    remembered, a, watched = Remembered(), torch.zeros(3), []
    for _ in range(3):
        made = torch.ones(2)
        watched.append(weakref.ref(made))
        remembered((a, torch.zeros(3)), 0, lambda made=made: made)
        del made
    gc.collect()
    assert [ref() is None for ref in watched] == [True, True, False]


def test_inference_tensors_are_made_of_every_time():
    remembered = Remembered()
    with torch.inference_mode():
        a = torch.zeros(3)
        assert [counted(remembered, (a,)) for _ in range(2)] == [1, 1]
