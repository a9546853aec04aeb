"""Sources in memory: what they refuse, and that caching changes nothing but how often the source is asked."""

import pickle

import numpy as np
import pytest

from diffrl.data.digits import digits
from diffrl.data.source import Source, cached, from_arrays, matched
from diffrl.errors import UserError

PIXELS = np.arange(5 * 4, dtype=np.uint8).reshape(5, 2, 2, 1)


def test_fetch_is_a_gather_and_pickles():
    source = pickle.loads(pickle.dumps(from_arrays(PIXELS, np.array([[0], [2], [1], [0], [2]]))))
    batch = source.fetch(np.array([4, 0, 4]))
    np.testing.assert_array_equal(batch["x"], PIXELS[[4, 0, 4]])
    np.testing.assert_array_equal(batch["label"], [2, 0, 2])
    assert batch["label"].dtype == np.int32
    assert (source.length, source.shape, source.num_classes) == (5, (2, 2, 1), 3)


def test_without_labels_there_are_no_classes():
    source = from_arrays(PIXELS, num_classes=3)
    assert source.num_classes is None
    assert set(source.fetch(np.arange(2))) == {"x"}


@pytest.mark.parametrize(
    ("x", "label", "classes", "message"),
    [
        (PIXELS[:0], None, None, "set holds no examples"),
        (PIXELS.astype(np.int64), None, None, "set has images of type int64"),
        (PIXELS, np.arange(4), None, r"5 images but labels of shape \(4,\)"),
        (PIXELS, np.zeros(5), None, "labels of type float64"),
        (PIXELS, np.array([0, 1, 2, 3, 7]), 5, r"a label 7 outside 0\.\.4"),
        (PIXELS, np.array([0, -1, 2, 3, 4]), 5, r"a label -1 outside 0\.\.4"),
        (PIXELS, np.array([0, 1, 1, 2, 2**32]), 5, r"a label 4294967296 outside 0\.\.4"),
        (PIXELS, np.array([0, 1, 1, 2, 10**6]), None, "a label 1000000 among 5 examples: number the classes from 0"),
        (np.array(3.0), None, None, "set holds no examples"),
    ],
)
def test_arrays_that_are_refused(x, label, classes, message):
    with pytest.raises(UserError, match=message) as error:
        from_arrays(x, label, num_classes=classes, name="set")
    assert "\n" not in str(error.value)


CATS, DOG = ("cat", "dog", "eel"), np.zeros(5, int)


@pytest.mark.parametrize(
    ("names", "label", "reference_names", "expected"),
    [
        (("dog",), DOG, CATS, [1] * 5),  # a part that lacks classes
        (("eel", "cat"), np.array([0, 1, 1, 0, 0]), CATS, [2, 0, 0, 2, 2]),  # or has them in another order
        ((), np.array([0, 1, 1, 0, 2]), (), [0, 1, 1, 0, 2]),
        ((), DOG, CATS, [0] * 5),
    ],
)
def test_labels_are_those_of_the_reference(names, label, reference_names, expected):
    reference = from_arrays(PIXELS, np.array([0, 1, 2, 0, 1]), class_names=reference_names)
    source = pickle.loads(pickle.dumps(matched(from_arrays(PIXELS, label, class_names=names), reference)))
    np.testing.assert_array_equal(source.fetch(np.arange(5))["label"], expected)
    assert (source.num_classes, source.class_names) == (3, reference_names)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (from_arrays(PIXELS[:, :1], DOG, name="part"), r"part has examples of shape \(1, 2, 1\), set of \(2, 2, 1\)"),
        (from_arrays(PIXELS, DOG, class_names=("dgo",), name="part"), "part has a class 'dgo' that set lacks"),
        (from_arrays(PIXELS, DOG + 3, name="part"), r"part has a class 3, set only 0\.\.2"),
        (from_arrays(PIXELS, name="part"), "part has no labels, but set has"),
    ],
)
def test_a_part_that_does_not_belong_to_the_reference(source, words):
    with pytest.raises(UserError, match=words):
        matched(source, from_arrays(PIXELS, np.array([0, 1, 2, 0, 1]), class_names=CATS, name="set"))


def test_digits_are_the_original_pixels_split_without_overlap():
    from sklearn.datasets import load_digits

    original = load_digits()
    everything = digits("all").fetch(np.arange(1797))
    np.testing.assert_array_equal(np.round(everything["x"][..., 0] * (16 / 255)), original.images)
    np.testing.assert_array_equal(everything["label"], original.target)
    assert everything["x"].max() == 255

    parts = [digits(split) for split in ("train", "test")]
    rows = [part.fetch(np.arange(part.length)) for part in parts]
    assert sorted(x.tobytes() for row in rows for x in row["x"]) == sorted(x.tobytes() for x in everything["x"])
    share = np.bincount(rows[1]["label"]) / np.bincount(everything["label"])
    np.testing.assert_allclose(share, 0.2, atol=0.005)
    with pytest.raises(UserError, match="no split 'valid': choose one of train, test, all"):
        digits("valid")


class Counting:
    """A `fetch` that remembers what it was asked for."""

    def __init__(self, source: Source):
        self.source, self.asked = source, []

    def __call__(self, indices):
        self.asked += indices.tolist()
        return self.source.fetch(indices)


@pytest.mark.parametrize("label", [None, np.array([0, 2, 1, 0, 2])])
def test_cached_asks_for_each_example_once(label):
    plain = from_arrays(PIXELS, label)
    counting = Counting(plain)
    source = cached(plain._replace(fetch=counting, in_memory=False))
    for indices in ([3, 1, 3], [1, 0], [4, 2, 3, 0]):
        expected, found = plain.fetch(np.array(indices)), source.fetch(np.array(indices))
        assert set(expected) == set(found)
        for key, value in expected.items():
            np.testing.assert_array_equal(found[key], value)
    assert sorted(counting.asked) == [0, 1, 2, 3, 4]


def test_a_set_that_is_too_large_is_not_cached():
    source = from_arrays(PIXELS)._replace(in_memory=False)
    assert cached(source, limit=PIXELS.nbytes - 1) is source
    assert cached(source, limit=PIXELS.nbytes) is not source
