"""runtime.serve.web.answers: what routes share."""

from types import SimpleNamespace

import anyio

from runtime.serve.refusals import Refusal
from runtime.serve.web.answers import WAITING, apart


def test_of_requests_that_come_at_once_so_many_wait_and_the_others_are_refused():
    """They all come before the first is started: what counts them must not wait for that."""
    done, refused = [], []

    async def one(request):
        try:
            done.append(await apart(request, lambda: "made"))
        except Refusal as refusal:
            refused.append(refusal.status)

    async def all_at_once():
        request = SimpleNamespace(
            app=SimpleNamespace(state=SimpleNamespace(conditions=anyio.CapacityLimiter(1), apart=0))
        )
        async with anyio.create_task_group() as group:
            for _ in range(20):
                group.start_soon(one, request)
        assert request.app.state.apart == 0

    anyio.run(all_at_once)
    assert done == ["made"] * (1 + WAITING) and refused == [429] * (20 - 1 - WAITING)
