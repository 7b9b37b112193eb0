"""training.data.held_out: what is held out stays held out, copies too."""

import pytest

from runtime.errors import InputError
from training.data.held_out import split
from training.data.stores import Entry


def test_samples_held_out_do_not_depend_on_their_order():
    entries = [Entry(f"{i}", f"key{i * 7919 % 100:02d}", "a", (128, 128)) for i in range(20)]
    held_out, training = split(entries, 4)
    again, _ = split(entries[::-1], 4)
    assert {e.key for e in held_out} == {e.key for e in again} and len(held_out) == 4
    assert len(training) == 16 and not {e.key for e in held_out} & {e.key for e in training}


def test_copies_of_a_held_out_sample_are_not_trained_on(capsys):
    entries = [Entry(f"{i}", "same" if i % 2 else f"z{i}", "a", (128, 128)) for i in range(10)]
    held_out, training = split(entries, 1)
    assert [e.key for e in held_out] == ["same"] and "same" not in {e.key for e in training}
    assert "samples are copies of those held out for validation" in capsys.readouterr().out


def test_too_few_samples_are_refused():
    with pytest.raises(InputError, match="validation_samples 1: there are only 1 samples"):
        split([Entry("a", "k", "a", (128, 128))], 1)


def test_pictures_that_are_all_equal_are_refused():
    entries = [Entry(f"{i}", "same", "a", (128, 128)) for i in range(9)]
    with pytest.raises(
        InputError, match="only 9 samples to train on, of which 1 differ; .*--validation-samples 0"
    ):
        split(entries, 2)
    assert split(entries, 0) == ([], entries)
