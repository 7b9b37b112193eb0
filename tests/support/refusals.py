"""What a user reads where something is refused."""

import pytest

from runtime.errors import InputError


def refusal(call, *arguments, **options) -> str:
    """Return the one line of the InputError that the call must raise."""
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)
