"""The server on Ray Serve: nodes go and clients do not see it, nor wait for what has no room."""

import base64
import io
import json
import re
import select
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from ray.serve.schema import ApplicationStatus, ServeDeploySchema

from runtime import Region
from runtime.errors import InputError
from runtime.serve.cluster import application
from tests.support.browser import embedded
from tests.support.cluster import PLACED, command, nodes
from tests.support.server import Client, events, png, wait_until

SMALL = {"steps": 2, "height": 64, "width": 64, "guidance": 3.0, "deterministic": True}
KINDS = 10  # of requests, each with its picture
LONG = {"prompt": "long", "steps": 100, "height": 128, "width": 128}


@pytest.fixture(scope="module")
def cluster():
    with nodes() as made:
        yield made


@pytest.fixture(scope="module")
def client(cluster, tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with (folder / "log.txt").open("w+") as log:
        options = "--ray", cluster.cluster.address, "--port", port, "--data", folder, *PLACED
        server = command("runtime.serve", *options, stderr=log)
        try:
            yield ready(Client(port, None), server, folder / "log.txt")
        finally:
            server.terminate()
            assert server.wait(60) == 0


def ready(client, server, log):
    while True:
        assert server.poll() is None, log.read_text()
        try:
            if client.get("/readyz")[0] == 200:
                return client
        except OSError:
            pass
        time.sleep(0.2)


def mask(number):
    return Image.linear_gradient("L").rotate(90 * number).resize((64, 64))


def body(number):
    region = {"prompt": "blue", "mask": base64.b64encode(png(mask(number))).decode()}
    return {**SMALL, "prompt": f"a star, number {number}", "seed": number, "regions": [region]}


def solo(number):
    """The picture that this process draws alone, on as many threads as a replica has."""
    given, threads = body(number), torch.get_num_threads()
    del given["deterministic"]
    torch.set_num_threads(1)
    try:
        return embedded()(**given | {"regions": [Region(mask=mask(number), prompt="blue")]}).images[0]
    finally:
        torch.set_num_threads(threads)


def pixels(data):
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_node_goes_and_no_client_sees_it(cluster, client):
    answers, gone = {}, threading.Event()

    def ask(i):
        if i == 60:
            threading.Thread(target=lambda: (cluster.remove(), gone.set())).start()
        answers[i] = client.post("/v1/generate", body(i % KINDS))

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(200)))
    assert gone.wait(30)
    assert [answer[0] for answer in answers.values()] == [200] * 200
    for number in range(KINDS):
        alone = np.asarray(solo(number))
        assert all(np.array_equal(pixels(answers[i][2]), alone) for i in range(number, 200, KINDS))


@pytest.mark.ray
def test_jobs_and_the_page_are_as_ever(client):
    _, _, data = client.post("/v1/jobs", {**body(3), "previews": True})
    id = json.loads(data)["id"]
    kinds = [kind for kind, _ in events(client.get(f"/v1/jobs/{id}/events")[2])]
    assert kinds[0] == "queued" and kinds[-1] == "done" and {"started", "step"} <= set(kinds)
    assert np.array_equal(pixels(client.get(f"/v1/jobs/{id}/images/0")[2]), np.asarray(solo(3)))
    wrong = client.error(422, "/v1/generate", {**SMALL, "prompt": "a", "steps": 0})
    assert wrong["param"] == "steps"
    assert b"<canvas" in client.get("/")[2] and json.loads(client.get("/v1/capabilities")[2])["rows"] == 16


@pytest.mark.ray
def test_what_has_no_room_is_told_so_and_who_leaves_makes_room(client):
    """Far more than all replicas hold: 429 at once for some, and the rows of those that leave are free again."""
    opened = [client.open("/v1/generate", LONG) for _ in range(140)]
    refused, end = [], time.monotonic() + 20
    while len(refused) < 30 and time.monotonic() < end:
        for ready in select.select([each for each in opened if each not in refused], [], [], 1)[0]:
            answer = ready.recv(4000)
            assert answer.startswith(b"HTTP/1.1 429 ") and b"retry-after: 2" in answer.lower(), answer
            refused.append(ready)
    assert len(refused) >= 30
    for each in opened:
        each.close()
    start = time.monotonic()
    wait_until(lambda: client.post("/v1/generate", body(0))[0] == 200)
    assert time.monotonic() - start < 10  # all those steps would take minutes
    wait_until(lambda: left(client) >= 60)


def left(client):
    text = client.get("/metrics")[2].decode()
    return float(re.search(r'localcontrol_ended_total{state="cancelled"} (\S+)', text)[1])


def files():
    """The configurations that the guide shows."""
    folder = Path(application.__file__).parent
    serve = yaml.safe_load((folder / "serve.yaml").read_text())
    kuberay = yaml.safe_load((folder / "kuberay.yaml").read_text())
    return [serve, yaml.safe_load(kuberay["spec"]["serveConfigV2"])]


@pytest.mark.parametrize("given", files(), ids=["serve", "kuberay"])
def test_the_guides_configurations_are_applications(given, monkeypatch):
    monkeypatch.setattr(application, "share", lambda options: ({"num_gpus": 1}, 0))
    monkeypatch.setenv("LOCALCONTROL_API_KEYS", "a key")
    found = ServeDeploySchema.model_validate(given).applications[0]
    assert found.import_path == "runtime.serve.cluster.application:build"
    made = application.build(found.args)
    scale = {each.name: each for each in bound(made)}["engine"]
    assert (scale.max_ongoing_requests, scale.max_queued_requests) == (32, 64)
    assert scale.ray_actor_options["num_gpus"] == 1


def bound(made):
    """An application's deployments."""
    from ray.serve._private.build_app import build_app

    with suppress(AttributeError):
        return build_app(made, name="x").deployments
    raise AssertionError("ray.serve has changed")


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"options": ""}, "--device"),
        ({"model": "x"}, "model"),
        ({"options": "--device cpu --replicas 3:1"}, "--replicas"),
        ({"options": "--device cpu --host 0.0.0.0"}, "--host"),
        ({"options": "--device cpu"}, "LOCALCONTROL_API_KEYS"),
        ({"options": "--device cpu --steps"}, "--help"),
    ],
)
def test_a_configuration_that_says_too_little_is_refused(given, named, monkeypatch):
    monkeypatch.setattr(application, "share", lambda options: ({"num_cpus": 1}, 0))
    monkeypatch.delenv("LOCALCONTROL_API_KEYS", raising=False)
    with pytest.raises(InputError, match=named):
        application.build(given)


def told(status, message=""):
    """What Ray tells of the application while it starts."""
    engine = SimpleNamespace(message=message)
    found = SimpleNamespace(status=ApplicationStatus(status), message="", deployments={"engine": engine})
    return lambda: SimpleNamespace(applications={application.NAME: found})


def test_it_runs_once_ray_says_so(monkeypatch):
    monkeypatch.setattr(application.serve, "status", told("DEPLOYING", "Retrying. Error: its node died"))
    assert not application.is_running()
    monkeypatch.setattr(application.serve, "status", told("RUNNING"))
    assert application.is_running()


@pytest.mark.parametrize(
    ("status", "message", "line"),
    [
        (
            "DEPLOYING",
            "Retrying 2 more time(s). Error:\nx\nerrors.InputError: --model x: missing\n",
            "--model x",
        ),
        ("DEPLOY_FAILED", "failed 3 times\nOutOfMemoryError: 80 GB", "--ray: OutOfMemoryError: 80 GB"),
    ],
)
def test_what_will_never_run_is_refused_at_once(status, message, line, monkeypatch):
    monkeypatch.setattr(application.serve, "status", told(status, message))
    with pytest.raises(InputError, match=f"^{re.escape(line)}"):
        application.is_running()


def test_an_application_that_another_deletes_is_one_line(monkeypatch):
    monkeypatch.setattr(application.serve, "status", lambda: SimpleNamespace(applications={}))
    with pytest.raises(InputError, match=r"^--ray: localcontrol was deleted"):
        application.is_running()
