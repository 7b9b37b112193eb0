"""runtime.serve.web.app: the routes, asked over HTTP."""

import base64
import errno
import io
import json
import select
import sqlite3
import threading
import time
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import anyio
import pytest
from PIL import Image

from runtime.serve import service as service_module
from runtime.serve.events import Events
from runtime.serve.limits import Limits
from runtime.serve.web import app as app_module
from runtime.serve.web.guard import Access
from tests.support.server import SMALL, events, pipe, png, running, wait_until

MASK = png(Image.new("L", (64, 64), 255))
LINES = png(Image.effect_noise((64, 64), 80))


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with running(tmp_path_factory.mktemp("serve")) as client:
        yield client


def ids(data):
    """The ids of server-sent events."""
    return [line.removeprefix("id: ") for line in data.decode().splitlines() if line.startswith("id: ")]


def expected(**settings):
    options = {**SMALL, **settings}
    return pipe()(options.pop("prompt"), **options).images[0]


def test_a_picture(client):
    status, headers, data = client.post("/v1/generate", SMALL)
    assert status == 200 and headers["content-type"] == "image/png"
    assert headers["x-seed"] == "7" and headers["x-model-hash"] == "0" * 32
    image = Image.open(io.BytesIO(data))
    assert image.tobytes() == expected().tobytes()
    assert image.text["prompt"] == "a red star" and image.text["seed"] == "7" and image.text["steps"] == "3"
    assert headers["content-security-policy"].startswith("default-src 'self'") and headers["x-request-id"]


def test_several_pictures_come_in_json(client):
    status, _, data = client.post("/v1/generate", {**SMALL, "images": 2})
    answer = json.loads(data)
    assert status == 200 and answer["images"] == 2 and answer["seed"] == 7 and answer["hash"] == "0" * 32
    seeds = [Image.open(io.BytesIO(base64.b64decode(text))).text["seed"] for text in answer["pictures"]]
    assert seeds == ["7", "8"]
    assert answer["timings"]["denoise"] > 0 and answer["warnings"] == []
    _, _, data = client.post("/v1/generate", SMALL, Accept="application/json")
    assert len(json.loads(data)["pictures"]) == 1


def test_events_on_the_way(client):
    body = {**SMALL, "stream": True, "previews": True}
    status, headers, data = client.post("/v1/generate", body)
    assert status == 200 and headers["content-type"].startswith("text/event-stream")
    found = events(data)
    assert [kind for kind, _ in found if kind != "preview"] == ["queued", "started", *["step"] * 3, "done"]
    assert [said for kind, said in found if kind == "step"][-1] == {"step": 3, "steps": 3}
    previews = [said for kind, said in found if kind == "preview"]
    assert Image.open(io.BytesIO(base64.b64decode(previews[0]["images"][0]))).size == (8, 8)
    done = found[-1][1]
    assert Image.open(io.BytesIO(base64.b64decode(done["pictures"][0]))).tobytes() == expected().tobytes()


def test_a_region_with_a_file_and_one_in_base64(client):
    status, _, data = client.post("/v1/files", MASK, Content_Type="image/png")
    kept = json.loads(data)
    assert status == 201 and kept["width"] == 64 and kept["bytes"] == len(MASK)
    assert json.loads(client.post("/v1/files", MASK)[2])["id"] == kept["id"]
    inline = "data:image/png;base64," + base64.b64encode(LINES).decode()
    region = {"condition": inline, "mask": kept["id"], "scale": {"0": 1, "0.5": 0.5}, "end": 0.9}
    image = client.picture({**SMALL, "regions": [region]})
    shown = json.loads(image.text["regions"])
    assert (
        shown[0]["mask"] == kept["id"] and shown[0]["adapter"] == "canny" and len(shown[0]["condition"]) == 64
    )
    assert image.tobytes() != expected().tobytes()


def test_a_picture_says_how_its_masks_were_resized(client):
    """Else two pictures of the same settings would differ."""
    mask = png(Image.effect_noise((64, 64), 80))
    region = {name: base64.b64encode(data).decode() for name, data in (("condition", LINES), ("mask", mask))}
    found = [
        client.picture({**SMALL, "regions": [region], "mask_resize": how}) for how in ("area", "nearest")
    ]
    assert found[0].tobytes() != found[1].tobytes()
    assert [image.text["mask_resize"] for image in found] == ["area", "nearest"]


def test_a_job(client):
    status, headers, data = client.post("/v1/jobs", {**SMALL, "images": 2}, Idempotency_Key="once")
    job = json.loads(data)
    assert status == 202 and headers["location"] == f"/v1/jobs/{job['id']}" and job["state"] == "queued"
    again = json.loads(client.post("/v1/jobs", {**SMALL, "images": 2}, Idempotency_Key="once")[2])
    assert again["id"] == job["id"]
    error = client.error(422, "/v1/jobs", SMALL, Idempotency_Key="once")
    assert error["param"] == "Idempotency-Key"
    done = client.job(job["id"])
    assert done["state"] == "done" and done["result"]["seed"] == 7 and len(done["images"]) == 2
    status, headers, data = client.get(done["images"][0])
    # the same number of images: the last bits of one depend on it
    assert Image.open(io.BytesIO(data)).tobytes() == expected(images_per_prompt=2).tobytes()
    assert client.error(404, f"/v1/jobs/{job['id']}/images/2", method="GET")["param"] == "image"
    data = client.get(f"/v1/jobs/{job['id']}/events")[2]
    found, named = events(data), ids(data)
    assert found[0][0] == "queued" and found[-1][0] == "done" and len(set(named)) == len(found)
    later = events(client.get(f"/v1/jobs/{job['id']}/events", Last_Event_ID=named[3])[2])
    assert later == found[4:]
    status, _, data = client.get(f"/v1/jobs/{job['id']}/events", Last_Event_ID=named[-1])
    assert (status, data) == (204, b"")
    assert client.ask("DELETE", f"/v1/jobs/{job['id']}")[0] == 200
    assert client.error(404, f"/v1/jobs/{job['id']}", method="GET")["param"] == "id"


def test_a_key_names_its_job_also_once_a_file_of_it_has_gone(client):
    """Whoever has not heard of the job asks again, and may do so late."""
    name = json.loads(client.post("/v1/files", png(Image.effect_noise((64, 64), 60)))[2])["id"]
    body = {**SMALL, "regions": [{"prompt": "a star", "mask": name}]}
    id = json.loads(client.post("/v1/jobs", body, Idempotency_Key="late")[2])["id"]
    assert client.job(id)["state"] == "done"
    (client.service.files.folder / name[:2] / name).unlink()
    status, _, data = client.post("/v1/jobs", body, Idempotency_Key="late")
    assert status == 202 and json.loads(data)["id"] == id
    for others, key in ((body, "another"), ({**body, "seed": 8}, "late")):
        assert client.error(404, "/v1/jobs", others, Idempotency_Key=key)["param"] == "regions.0.mask"


def test_an_empty_idempotency_key_is_none(client):
    first, second = (client.post("/v1/jobs", SMALL, Idempotency_Key="") for _ in range(2))
    assert first[0] == second[0] == 202
    assert json.loads(first[2])["id"] != json.loads(second[2])["id"]


def test_a_job_is_cancelled_and_sent_again(client):
    job = json.loads(client.post("/v1/jobs", {**SMALL, "steps": 100})[2])
    client.job(job["id"], until=("running",))
    assert client.error(409, f"/v1/jobs/{job['id']}/images/0", method="GET")["param"] == "id"
    assert client.ask("DELETE", f"/v1/jobs/{job['id']}")[0] == 200
    ended = client.job(job["id"])
    assert ended["state"] == "cancelled" and ended["error"]["message"] == "cancelled"
    assert client.post(f"/v1/jobs/{job['id']}/retry")[0] == 202
    assert client.job(job["id"])["state"] == "done"
    client.error(409, f"/v1/jobs/{job['id']}/retry")


def test_the_events_of_a_job_that_is_sent_again_are_others(client, monkeypatch):
    """After the last event of the first time all of the second time come, its end too."""

    def full(*_):
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(client.service.store, "finish", full)
        path = f"/v1/jobs/{json.loads(client.post('/v1/jobs', SMALL)[2])['id']}"
        first = client.get(f"{path}/events")[2]
    assert events(first)[-1][0] == "failed" and client.post(f"{path}/retry")[0] == 202
    status, _, data = client.get(f"{path}/events", Last_Event_ID=ids(first)[-1])
    assert status == 200 and [kind for kind, _ in events(data)][::5] == ["queued", "done"]


def test_the_end_of_a_job_of_another_process_comes_once(client, monkeypatch):
    """A browser's EventSource, which connects again after each answer, would ask for it for ever."""
    path = f"/v1/jobs/{json.loads(client.post('/v1/jobs', SMALL)[2])['id']}"
    last = ids(client.get(f"{path}/events")[2])[-1]
    monkeypatch.setattr(client.service, "_events", OrderedDict())
    data = client.get(f"{path}/events", Last_Event_ID=last)[2]
    assert [kind for kind, _ in events(data)] == ["done"]
    assert client.get(f"{path}/events", Last_Event_ID=ids(data)[0])[0] == 204


def test_a_client_that_goes_cancels_its_work(client):
    for stream in (False, True):
        opened = client.open("/v1/generate", {**SMALL, "steps": 100, "stream": stream})
        wait_until(lambda: client.service.engine.busy)
        time.sleep(0.05)
        opened.close()
        start = time.monotonic()
        wait_until(lambda: not client.service.engine.busy)
        assert time.monotonic() - start < 5.0


def test_a_newer_request_of_a_session_takes_the_older_ones_place(client):
    live = {**SMALL, "session": "mine"}
    long = {**live, "steps": 100, "height": 128, "width": 128}
    first = json.loads(client.post("/v1/jobs", long)[2])
    client.job(first["id"], until=("running",))
    client.picture(live)
    assert client.job(first["id"])["error"]["message"] == "replaced by a newer one of its session"


def test_a_condition_is_what_a_run_would_compute(client):
    photo = Image.effect_noise((80, 48), 60).convert("RGB")
    body = {"image": base64.b64encode(png(photo)).decode(), "preprocess": "sobel"}
    status, _, data = client.post("/v1/conditions", body)
    from runtime.control.conditions import preprocess

    assert status == 200
    assert Image.open(io.BytesIO(data)).tobytes() == preprocess("sobel", photo).tobytes()
    sized = Image.open(io.BytesIO(client.post("/v1/conditions", {**body, "height": 64, "width": 64})[2]))
    assert sized.size == (64, 64)
    assert client.error(422, "/v1/conditions", {**body, "preprocess": "x"})["param"] == "preprocess"


def test_what_can_be_asked_for(client):
    found = json.loads(client.get("/v1/capabilities")[2])
    assert (
        found["adapters"] == ["canny"] and found["sizes"]["default"] == 64 and "euler" in found["schedulers"]
    )
    assert found["limits"]["regions"] == 16 and "lcm4" in found["presets"]


def test_warnings_come_with_the_picture(tmp_path):
    black = base64.b64encode(png(Image.new("L", (64, 64)))).decode()
    regions = [{"prompt": "a heart", "mask": black}]
    with running(tmp_path) as client:  # of its own: pytest sets every test's warnings anew
        _, _, data = client.post("/v1/generate", {**SMALL, "regions": regions}, Accept="application/json")
        wide = {**SMALL, "image": base64.b64encode(png(Image.new("L", (67, 64)))).decode()}
        _, headers, _ = client.post("/v1/generate", wide)
        photo = {"image": wide["image"], "preprocess": "canny", "height": 64, "width": 64}
        _, of_condition, _ = client.post("/v1/conditions", photo)
        long = {**SMALL, "prompt": f"({'猫' * 60}{'!' * 2000}:1.2)"}
        _, cut, _ = client.post("/v1/generate", long)
        _, _, whole = client.post("/v1/generate", long, Accept="application/json")
    assert json.loads(data)["warnings"] == ["regions.0 mask: all zero (black), so the region has no words"]
    # which is warned of where it is drawn, on the engine's thread
    stretched = "image: 67 x 64 px is stretched to 64 x 64, another aspect ratio"
    assert json.loads(headers["x-warnings"]) == json.loads(of_condition["x-warnings"]) == [stretched]
    (line,), (begun,) = json.loads(whole)["warnings"], json.loads(cut["x-warnings"])
    assert len(line) > 2000 and begun == f"{line[:300]}..." and len(cut["x-warnings"]) < 2000


BAD = {
    "prompt": ({"prompt": 3}, 422, "prompt"),
    "unknown": ({"promt": "a"}, 422, "promt"),
    "steps": ({"steps": 0}, 422, "steps"),
    "many steps": ({"steps": 101}, 422, "steps"),
    "text for steps": ({"steps": "3"}, 422, "steps"),
    "half a step": ({"steps": 2.5}, 422, "steps"),
    "size": ({"height": 65}, 422, "height"),
    "large": ({"height": 4112}, 422, "height"),
    "too many pixels": ({"height": 4096, "width": 4096}, 422, "width"),
    "more than a step takes": ({"height": 512, "width": 512}, 422, "width"),
    "endless keyframes": ({"regions": [{"prompt": "a", "end": "0:1," * 1000}]}, 422, "regions.0.end"),
    "images": ({"images": 5}, 422, "images"),
    "no images": ({"images": 0}, 422, "images"),
    "seed": ({"seed": -1}, 422, "seed"),
    "scheduler": ({"scheduler": "PNDMScheduler"}, 422, "scheduler"),
    "preset": ({"preset": "x"}, 422, "preset"),
    "guidance": ({"guidance": True}, 422, "guidance"),
    "long": ({"prompt": "a " * 2001}, 422, "prompt"),
    "surrogate": ({"prompt": "\udc80"}, 400, None),
    "a path": ({"image": "/etc/passwd"}, 422, "image"),
    "an address": ({"image": "http://169.254.169.254/"}, 422, "image"),
    "no file": ({"image": "a" * 64}, 404, "image"),
    "no picture": ({"image": base64.b64encode(b"<svg/>").decode()}, 422, "image"),
    "a region's scale": ({"regions": [{"prompt": "a", "scale": "x"}]}, 422, "regions.0.scale"),
    "a region's adapter": (
        {"regions": [{"condition": base64.b64encode(LINES).decode(), "adapter": "x"}]}, 422, "regions.0.adapter"
    ),
    "a region of nothing": ({"regions": [{}]}, 422, "regions.0.condition"),
    "a region's field": ({"regions": [{"prompt": "a", "label": "x"}]}, 422, "regions.0.label"),
    "regions": ({"regions": [{"prompt": "a"}] * 17}, 422, "regions"),
    "strength": ({"strength": 0.5}, 422, "strength"),
    "held": ({"outside": "x"}, 422, "outside"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_that_names_the_field(client, name):
    change, status, field = BAD[name]
    for path in ("/v1/generate", "/v1/jobs"):
        error = client.error(status, path, {**SMALL, **change})
        assert error["param"] == field, error
        assert field is None or error["message"].startswith(field.partition(".")[0]), error


@pytest.mark.parametrize("body", ["", "{", "[]", "null", '{"prompt": NaN}', "\xff", '{"prompt": "a"} {}'])
def test_what_is_no_request(client, body):
    error = client.error(
        400 if body not in ("[]", "null", '{"prompt": NaN}') else 422,
        "/v1/generate",
        body.encode("latin-1"),
        Content_Type="application/json",
    )
    assert error["message"]


def test_a_type_that_is_not_json(client):
    assert client.error(415, "/v1/generate", b"prompt=a")["param"] == "Content-Type"
    assert client.error(415, "/v1/files", b"GIF8", Content_Type="image/gif")["param"] == "body"


def test_no_such_route_or_method(client):
    assert client.error(404, "/v2/x")["message"] == "/v2/x: no such route"
    assert client.error(405, "/v1/generate", method="GET")["message"] == "GET: not for this route"


def test_the_document_has_every_body(client):
    document = json.loads(client.get("/openapi.json")[2])
    assert {"GenerateNow", "Generate", "RegionBody", "Condition"} <= document["components"]["schemas"].keys()
    references = json.dumps(document).count("#/components/schemas/")
    assert references > 5
    form = document["paths"]["/v1/images/edits"]["post"]["requestBody"]["content"]["multipart/form-data"]
    assert {"image", "mask", "prompt", "steps", "regions", "stream"} <= form["schema"]["properties"].keys()
    assert client.get("/docs")[0] == 200


def test_the_readme_has_every_route(client):
    text = (Path(service_module.__file__).parent / "README.md").read_text("utf-8")
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    for path, methods in json.loads(client.get("/openapi.json")[2])["paths"].items():
        shown = " ".join(cell for cell in cells if f"{path}`" in cell)
        assert all(f"`{method.upper()}" in shown for method in methods), path


def test_the_document_says_what_errors_and_answers_are(client):
    document = json.loads(client.get("/openapi.json")[2])
    said = document["components"]["schemas"]["Error"]["properties"]["error"]["properties"]
    assert said.keys() == client.error(404, "/v1/jobs/x", method="GET").keys()
    assert not {"HTTPValidationError", "ValidationError"} & document["components"]["schemas"].keys()
    for methods in document["paths"].values():
        for about in methods.values():
            assert about["responses"]["default"] and "422" not in about["responses"]
    for path, kind in (("/healthz", "text/plain"), ("/readyz", "text/plain")):
        assert list(document["paths"][path]["get"]["responses"]["200"]["content"]) == [kind]
        assert client.get(path)[1]["content-type"].startswith(kind)


def test_health_and_numbers(client):
    assert client.get("/healthz")[2] == b"ok\n" and client.get("/readyz")[2] == b"ready\n"
    text = client.get("/metrics")[2].decode()
    assert 'localcontrol_requests_total{code="200",route="/v1/generate"}' in text
    assert "localcontrol_tick_rows_count" in text and "localcontrol_queue_depth 0.0" in text
    assert "localcontrol_resident_bytes" in text


def test_what_watches_a_server_may_ask_by_head(client):
    for path in ("/healthz", "/readyz", "/metrics", "/docs", "/"):
        status, headers, body = client.ask("HEAD", path)
        assert (status, body) == (200, b"") and int(headers["content-length"]) > 0
    assert client.ask("HEAD", "/v1/generate")[0] == 405


def test_keys(tmp_path):
    with running(tmp_path, access=Access(keys=("one", "two"))) as client:
        assert client.error(401, "/v1/generate", SMALL)["param"] == "Authorization"
        assert client.post("/v1/generate", SMALL)[1]["www-authenticate"] == "Bearer"
        assert client.error(401, "/v1/generate", SMALL, Authorization="Bearer three")
        assert client.post("/v1/generate", SMALL, Authorization="Bearer two")[0] == 200
        job = json.loads(client.post("/v1/jobs", SMALL, Authorization="Bearer one")[2])
        client.error(404, f"/v1/jobs/{job['id']}", method="GET", Authorization="Bearer two")
        assert client.get(f"/v1/jobs/{job['id']}", Authorization="Bearer one")[0] == 200


def test_the_steps_are_bounded_wherever_they_come_from(tmp_path):
    with running(tmp_path, steps=10) as client:
        plain = {name: value for name, value in SMALL.items() if name != "steps"}
        assert client.error(422, "/v1/generate", plain)["message"] == "steps 30: expected at most 10"
        assert client.error(422, "/v1/generate", {**plain, "preset": "quality"})["param"] == "preset"
        assert client.post("/v1/generate", {**plain, "preset": "lcm4"})[0] == 200


def test_conditions_are_bounded_and_hold_nobody_up(client, monkeypatch):
    picture = base64.b64encode(png(Image.new("L", (8, 8)))).decode()
    large = {"image": picture, "preprocess": "canny", "width": 4000, "height": 2000}
    assert client.error(422, "/v1/conditions", large)["param"] == "width"
    assert (
        client.error(422, "/v1/conditions", {"image": picture, "preprocess": "depth"})["param"]
        == "preprocess"
    )
    gate = threading.Event()
    monkeypatch.setattr(
        client.service.orders, "condition", lambda body: gate.wait(20) and Image.new("L", (8, 8))
    )
    body = {"image": picture, "preprocess": "canny"}
    waiting = [client.open("/v1/conditions", body) for _ in range(12)]
    answered, _, _ = select.select(waiting, [], [], 10)  # one is made, eight wait
    assert answered and answered[0].recv(2000).startswith(b"HTTP/1.1 429 ")
    assert client.get("/v1/jobs/x")[0] == 404 and client.post("/v1/generate", SMALL)[0] == 200
    gate.set()
    for opened in waiting:
        opened.close()


def test_a_disk_that_takes_nothing_is_told(client, monkeypatch):
    """A job whose pictures cannot be kept has failed; one whose start could not be noted is done all the same."""
    store = client.service.store

    def full(*_):
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(store, "finish", full)
        job = json.loads(client.post("/v1/jobs", SMALL)[2])
        assert client.job(job["id"])["error"]["message"] == "server: the disk does not take the pictures"
        assert events(client.get(f"/v1/jobs/{job['id']}/events")[2])[-1][0] == "failed"
    with monkeypatch.context() as patch:
        patch.setattr(store, "start", full)
        job = json.loads(client.post("/v1/jobs", SMALL)[2])
        assert client.job(job["id"])["state"] == "done"
    wait_until(lambda: client.service.unfinished == 0)


def test_a_full_disk_is_named_without_a_path(client, monkeypatch):
    def no_table(*_):
        raise sqlite3.OperationalError("database or disk is full")

    def no_file(*_):
        raise OSError(errno.ENOSPC, "No space left on device", "/srv/localcontrol/files/ab")

    monkeypatch.setattr(client.service.store, "add", no_table)
    monkeypatch.setattr(client.service.files, "add", no_file)
    said = "server: its disk: {}; its log says more"
    assert client.error(500, "/v1/jobs", SMALL)["message"] == said.format("database or disk is full")
    assert client.error(500, "/v1/files", MASK)["message"] == said.format("No space left on device")


def test_events_of_a_job_that_runs_are_not_forgotten_for_newer_ones(client, monkeypatch):
    monkeypatch.setattr(service_module, "REMEMBERED", 2)
    monkeypatch.setattr(client.service, "_jobs", {"runs": None})
    monkeypatch.setattr(client.service, "_events", OrderedDict())
    for id in ("runs", "first", "second", "third"):
        client.service._remember(id, Events())
    assert list(client.service._events) == ["runs", "third"]


@pytest.mark.parametrize("then", ["retry", "delete", "the same key"])
def test_a_job_whose_end_could_not_be_kept_is_interrupted(client, monkeypatch, then):
    """Neither its pictures nor that it failed: nobody draws it, so it can be sent again or removed."""

    def full(*_):
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(client.service.store, "finish", full)
        patch.setattr(client.service.store, "end", full)
        id = json.loads(client.post("/v1/jobs", SMALL, Idempotency_Key=then)[2])["id"]
        wait_until(lambda: client.service.unfinished == 0)
        assert client.job(id)["state"] == "interrupted"  # also while the disk is full
        client.error(500, f"/v1/jobs/{id}/retry")
    if then == "delete":
        assert json.loads(client.ask("DELETE", f"/v1/jobs/{id}")[2])["removed"] is True
        client.error(404, f"/v1/jobs/{id}", method="GET")
        return
    if then == "retry":
        assert client.job(id)["state"] == "interrupted" and client.post(f"/v1/jobs/{id}/retry")[0] == 202
    else:
        assert json.loads(client.post("/v1/jobs", SMALL, Idempotency_Key=then)[2])["id"] == id
    assert client.job(id)["state"] == "done"


def test_a_job_is_kept_and_queued_or_neither(client, monkeypatch):
    """Cleaning that fails takes no job with it; one that could not be queued is not there."""

    def broken(*_):
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(client.service.store, "clean", broken)
        status, _, data = client.post("/v1/jobs", SMALL)
        assert status == 202 and client.job(json.loads(data)["id"])["state"] == "done"
    with monkeypatch.context() as patch:
        patch.setattr(client.service.engine, "submit", broken)
        client.error(500, "/v1/jobs", SMALL, Idempotency_Key="neither")
    wait_until(lambda: client.service.unfinished == 0)
    id = json.loads(client.post("/v1/jobs", SMALL, Idempotency_Key="neither")[2])["id"]
    assert client.job(id)["state"] == "done"


def test_what_is_deleted_says_what_became_of_it(client):
    job = json.loads(client.post("/v1/jobs", {**SMALL, "steps": 100})[2])
    client.job(job["id"], until=("running",))
    assert json.loads(client.ask("DELETE", f"/v1/jobs/{job['id']}")[2])["cancelling"] is True
    client.job(job["id"])
    assert json.loads(client.ask("DELETE", f"/v1/jobs/{job['id']}")[2])["removed"] is True


def test_the_page_and_its_files(client):
    status, headers, data = client.get("/")
    assert status == 200 and b"js/main.js" in data and headers["cache-control"] == "no-cache"
    for name in ("/style.css", "/icon.svg", "/js/main.js"):
        assert client.get(name)[0] == 200
    for name in ("/js/../../app.py", "/js/%2e%2e/%2e%2e/app.py", "/page/index.html", "/js/"):
        assert client.get(name)[0] == 404
    name = json.loads(client.post("/v1/files", MASK)[2])["id"]
    assert client.get(f"/v1/files/{name}")[2] == MASK
    client.error(422, "/v1/files/x", method="GET")


def test_cleaning_that_fails_is_logged_and_tried_again(monkeypatch, caplog):
    """The server's life goes on, and ends with the service closed, also where something else breaks it."""
    monkeypatch.setattr(app_module, "CLEAN", 0.001)
    cleaned, closed = [], []

    def clean():
        cleaned.append(len(cleaned))
        if len(cleaned) == 1:
            raise sqlite3.OperationalError("database is locked")

    service = SimpleNamespace(limits=Limits(), metrics=None, start=lambda: None, clean=clean)
    service.close = lambda: closed.append(True)
    app = app_module.make_app(service)

    async def live():
        async with app.router.lifespan_context(app):
            with anyio.fail_after(10):
                while len(cleaned) < 3:
                    await anyio.sleep(0.001)
            assert not closed
            raise RuntimeError("broken")

    with pytest.raises(BaseException, match="unhandled errors"):
        anyio.run(live)
    assert closed == [True] and "database is locked" in caplog.text
