"""Distillation jobs in the real server, by nodes, over HTTP and next to prompts; refusals."""

import http.client
import json
import subprocess
import sys
import time
import urllib.request
import uuid

import pytest
from lcm_lora.training.jobs import processes

SMALL = {
    "steps": 4, "batch": 2, "rank": 4, "guidance": 2.5, "lr": 1e-3, "seed": 3, "precision": "fp32",
    "checkpoint_every": 2, "sample_every": 2, "device": "", "overwrite": False,
    "sample_prompts": "a photo of a bag", "style_lora": "none", "style_strength": 1.0,
    "policy": "share",
}  # fmt: skip
PROMPTS = "a photo of a bag\na photo of a dress"


def graph(subject, name, wait=True, **changes) -> dict:
    """Distils, shows the status, and draws with the new LoRA."""
    source = {"source": "prompts", "source.prompts": PROMPTS, "source.count": 8}
    source |= {"source.draw_steps": 4, "resolution": 64}
    order = {"checkpoint": subject.checkpoint, "data": ["1", 0], "name": name} | SMALL | changes
    nodes = {
        "1": ("LCMDistillData", source),
        "2": ("LCMDistill", order),
        "3": ("LCMJobResult", {"job": ["2", 0], "wait": wait}),
        "4": ("LCMJobStatus", {"job": ["2", 0]}),
        "5": ("CheckpointLoaderSimple", {"ckpt_name": subject.checkpoint}),
        "6": ("LCMLoRAApply", {
            "model": ["5", 0], "vector": ["3", 0], "strength_model": 1.0, "strength_clip": 1.0,
        }),
        "7": ("CLIPTextEncode", {"clip": ["5", 1], "text": "a photo of a bag"}),
        "8": ("EmptyLatentImage", {"width": 64, "height": 64, "batch_size": 1}),
        "9": ("LCMKSampler", {
            "model": ["6", 0], "seed": 1, "steps": 4, "cfg": 1.0, "positive": ["7", 0],
            "negative": ["7", 0], "latent": ["8", 0], "denoise": 1.0,
        }),
        "10": ("VAEDecode", {"samples": ["9", 0], "vae": ["5", 2]}),
        "11": ("SaveImage", {"images": ["10", 0], "filename_prefix": name}),
        "12": ("PreviewImage", {"images": ["4", 2]}),
    }  # fmt: skip
    return {key: {"class_type": kind, "inputs": inputs} for key, (kind, inputs) in nodes.items()}


def order_only(subject, name, **changes) -> dict:
    return {key: node for key, node in graph(subject, name, **changes).items() if key in "12"}


@pytest.fixture
def store(server):
    from lcm_lora.training.jobs.store import Store

    jobs_store = Store(server.base / "user" / "__lcm_lora" / "jobs")
    yield jobs_store
    for job in jobs_store.jobs():
        if job.state in ("preparing", "running", "stopping", "queued"):
            jobs_store.ask(job.id, "stop")
            processes.end(job.id, kill=True)


def until(check, what, seconds=240):
    deadline = time.monotonic() + seconds
    while not (result := check()):
        assert time.monotonic() < deadline, f"waited too long until {what}"
        time.sleep(0.05)
    return result


def named(store, name):
    return next((job for job in store.jobs() if job.name == name), None)


def send(client, path, body="{}", method="POST", **headers):
    """Sends a request with these headers, as JSON unless they say otherwise.

    -> (status, parsed answer)
    """
    connection = http.client.HTTPConnection(client.url.removeprefix("http://"), timeout=60)
    all_headers = {"Content-Type": "application/json"} | {
        key.replace("_", "-"): value for key, value in headers.items()
    }
    connection.request(method, f"/lcm_lora/{path}", body, all_headers)
    answer = connection.getresponse()
    text = answer.read()
    try:
        return answer.status, json.loads(text)
    except ValueError:
        return answer.status, text.decode(errors="replace")


def test_distil_then_use_it_in_one_graph(client, subject, store, server):
    shown = client.run(graph(subject, "made/first"))
    assert client.pictures(shown)["11"][0].is_file()
    record = named(store, "made/first")
    assert (record.state, record.step, record.lora_name) == ("done", 4, "made/first.safetensors")
    # Queued again it is the same job, which is already done.
    shown = client.run(graph(subject, "made/first"))
    assert shown["4"]["text"][0].startswith("done, step 4 of 4")
    assert len([job for job in store.jobs() if job.name == "made/first"]) == 1
    assert (server.base / "models" / "loras" / "made" / "first.safetensors").is_file()
    offered = client.get("/object_info/LCMLoRALoader")["LCMLoRALoader"]["input"]["required"]
    assert "made/first.safetensors" in json.dumps(offered["lora_name"])

    status = client.get(f"/lcm_lora/jobs/{record.id}")
    assert [sample["step"] for sample in status["samples"]] == [2, 4]
    assert str(server.base) not in json.dumps(status)
    metrics = client.get(f"/lcm_lora/jobs/{record.id}/metrics")
    assert metrics["rows"][-1][0] == 4
    assert [row[0] for row in metrics["errors"]] == [2, 4]
    log = client.get(f"/lcm_lora/jobs/{record.id}/log?offset=0")
    assert "step 4 of 4" in log["text"]
    assert client.get(f"/lcm_lora/jobs/{record.id}/log?offset={log['offset']}")["text"] == ""
    with urllib.request.urlopen(
        f"{client.url}/lcm_lora/jobs/{record.id}/samples/{status['samples'][0]['name']}"
    ) as answer:
        assert answer.read(8) == b"\x89PNG\r\n\x1a\n"


def test_the_node_returns_at_once_and_twice_is_one_job(client, subject, store):
    for _ in range(2):
        begun = time.monotonic()
        client.run(order_only(subject, "slow", steps=5000, sample_every=0))
        assert time.monotonic() - begun < 5
    assert len([job for job in store.jobs() if job.name == "slow"]) == 1
    job = named(store, "slow")
    until(lambda: store.job(job.id).step >= 3, "it trains, and has saved a checkpoint")
    # Meanwhile the newest checkpoint's LoRA draws a picture.
    shown = client.run(graph(subject, "slow", wait=False, steps=5000, sample_every=0))
    assert client.pictures(shown)["11"][0].is_file()
    assert store.job(job.id).state == "running"
    assert send(client, f"jobs/{job.id}/delete")[0] == 400
    assert send(client, f"jobs/{job.id}/pause")[0] == 200
    until(lambda: store.job(job.id).state == "paused", "it is paused")
    assert not processes.of_job(job.id)
    assert send(client, f"jobs/{job.id}/finish")[0] == 400
    step = store.job(job.id).step
    assert send(client, f"jobs/{job.id}/resume")[0] == 200
    until(lambda: store.job(job.id).step > step, "it goes on")
    assert send(client, f"jobs/{job.id}/finish")[0] == 200
    until(lambda: store.job(job.id).state == "done", "it is finished early")
    assert send(client, f"jobs/{job.id}/delete") == (200, {"id": job.id, "state": "deleted"})
    assert send(client, f"jobs/{job.id}", None, "GET")[0] == 404


@pytest.mark.faults
def test_a_yielding_job_steps_aside_for_prompts_and_comes_back(client, subject, store):
    client.run(order_only(subject, "polite", steps=5000, policy="yield"))
    job = named(store, "polite")
    until(lambda: store.job(job.id).step >= 1, "it trains once the prompt is over")
    drawing = graph(subject, "polite", wait=False, steps=5000, policy="yield")
    del drawing["3"], drawing["4"], drawing["12"]
    drawing["9"]["inputs"] |= {"model": ["5", 0], "steps": 25}
    drawing["8"]["inputs"]["batch_size"] = 16
    client.run({key: node for key, node in drawing.items() if key not in ("1", "2", "6")})
    aside = store.job(job.id)
    assert aside.state in ("stopping", "paused")
    assert aside.aside
    step = aside.step
    until(lambda: store.job(job.id).step > step, "it comes back")
    assert send(client, f"jobs/{job.id}/stop")[0] == 200
    until(lambda: store.job(job.id).state == "paused", "it is stopped")
    time.sleep(4)
    assert store.job(job.id).state == "paused"


def test_order_over_http(client, subject, store):
    order = {key: SMALL[key] for key in ("steps", "batch", "rank", "guidance", "policy")}
    source = {"prompts": PROMPTS, "count": 4, "draw_steps": 2, "resolution": 64}
    order |= {"checkpoint": subject.checkpoint, "name": "by http", "sample_every": 0}
    body = order | {"data": source}
    status, answer = send(client, "jobs", json.dumps(body))
    assert status == 201 and answer["new"]
    assert send(client, "jobs", json.dumps(body)) == (200, {"id": answer["id"], "new": False})
    until(lambda: store.job(answer["id"]).state == "done", "it is done")


def test_an_estimate_says_how_it_knows(client, subject, store):
    source = {"prompts": PROMPTS, "count": 4, "draw_steps": 2, "resolution": 64}
    # No other job has this objective.
    order = SMALL | {"style_lora": "", "objective": "phased", "data": source}
    order |= {"checkpoint": subject.checkpoint, "name": "estimated", "sample_every": 0}
    before = len(store.jobs())
    status, made = send(client, "estimate", json.dumps(order))
    assert status == 200
    assert (made["time"], made["training_seconds"], made["drawing_seconds"]) == (
        "unknown", None, None,
    )  # fmt: skip
    assert (made["steps"], made["batch"], made["resolution"], made["drawn"]) == (4, 2, 64, 4)
    assert made["architecture"] == "SD1.5" and made["disk_bytes"] > 0
    assert len(store.jobs()) == before

    identifier = send(client, "jobs", json.dumps(order))[1]["id"]
    until(lambda: store.job(identifier).state == "done", "it is done")
    status, known = send(client, "estimate", json.dumps(order | {"steps": 400, "seed": 9}))
    assert status == 200 and (known["time"], known["memory"]) == ("measured", "measured")
    assert known["training_seconds"] > 0 and known["drawing_seconds"] > 0
    assert known["memory_bytes"] > 0
    longer = order | {"length": "try", "data": source | {"count": 1000, "auto_resolution": True}}
    status, tried = send(client, "estimate", json.dumps(longer))
    assert (tried["steps"], tried["drawn"], tried["resolution"]) == (200, 250, 512)
    assert (tried["time"], tried["memory"]) == ("estimated", "estimated")
    assert tried["training_seconds"] > known["training_seconds"]

    # It says what happens to the order, and that one would be refused.
    assert (made["queueing"], known["queueing"]) == ("new", "taken")
    replacing = order | {"steps": 400, "overwrite": True}
    assert send(client, "estimate", json.dumps(replacing))[1]["queueing"] == "replaces"
    assert send(client, "estimate", json.dumps(order))[1]["queueing"] == "same"
    status, answer = send(client, "estimate", json.dumps(order | {"checkpoint": "none such"}))
    assert status == 200 and "no 'none such' among its checkpoints" in answer["refused"]
    assert send(client, "estimate", json.dumps(order | {"length": "forever"}))[0] == 400


def test_a_finished_job_is_renamed_exported_and_trained_on(client, subject, store, server):
    order = {"steps": 2, "batch": 1, "rank": 2, "guidance": 2.5, "policy": "share"}
    order |= {"checkpoint_every": 1, "sample_every": 1, "checkpoint": subject.checkpoint}
    source = {"prompts": PROMPTS, "count": 2, "draw_steps": 1, "resolution": 64}
    own = {"name": "made/longer", "sample_prompts": "a red bag\n"}
    body = json.dumps(order | own | {"data": source})
    identifier = send(client, "jobs", body)[1]["id"]
    until(lambda: store.job(identifier).state == "done", "it is done")
    lora = server.base / "models" / "loras" / "made" / "longer.safetensors"
    first = lora.read_bytes()

    assert send(client, f"jobs/{identifier}/rename", '{"title": " My first "}')[0] == 200
    details = client.get(f"/lcm_lora/jobs/{identifier}")
    assert (details["title"], details["name"]) == ("My first", "made/longer")
    assert details["prompts"] == ["a red bag"]
    assert details["checkpoints"] == [1, 2]
    # What was ordered makes the same job again.
    again = send(client, "jobs", json.dumps(details["order"]))
    assert again == (200, {"id": identifier, "new": False})

    made = {"lora_name": "made/longer-step-1.safetensors"}
    for _ in range(2):  # a second time it is there already
        assert send(client, f"jobs/{identifier}/export", '{"step": 1}') == (200, made)
    loras = client.get("/object_info/LCMLoRALoader")["LCMLoRALoader"]["input"]["required"]
    assert made["lora_name"] in json.dumps(loras["lora_name"])
    from lcm_lora.lora.formats.files import read

    ended, earlier = read(lora), read(lora.with_name("longer-step-1.safetensors"))
    assert earlier.modules() == ended.modules()
    assert earlier.metadata["lcm_lora.family"] == "lcm"
    status, answer = send(client, f"jobs/{identifier}/export", '{"step": 7}')
    assert status == 400 and "no checkpoint of step 7. It has: 1, 2" in answer["error"]
    lora.with_name("longer-step-2.safetensors").write_bytes(first)
    status, answer = send(client, f"jobs/{identifier}/export", '{"step": 2}')
    assert status == 400 and "rename that file" in answer["error"]

    assert send(client, f"jobs/{identifier}/extend", '{"steps": 1}')[0] == 200
    until(lambda: store.job(identifier).state == "done", "it is done again")
    assert (store.job(identifier).step, store.job(identifier).steps) == (3, 3)
    assert lora.read_bytes() != first
    metrics = client.get(f"/lcm_lora/jobs/{identifier}/metrics")
    assert [row[0] for row in metrics["errors"]] == [1, 2, 3]
    assert client.get(f"/lcm_lora/jobs/{identifier}")["order"]["steps"] == 3


REFUSED = (
    ("rename", {}, "title must be"),
    ("rename", {"title": "two\nlines"}, "title must be"),
    ("rename", {"title": "x" * 201}, "title must be"),
    ("rename", {"title": "half \ud800"}, "title must be"),
    ("extend", {"steps": 0}, "steps must be from 1"),
    ("extend", {"steps": True}, "steps must be from 1"),
    ("extend", {"steps": 5}, "only a finished job"),
    ("export", {"step": "1"}, "step must be from 1"),
    ("export", {"step": 5}, "no checkpoint of step 5. It has: none"),
)


def test_what_cannot_be_done_with_a_job_is_said(client, subject, store):
    order = {"checkpoint": subject.checkpoint, "name": "waits/long", "steps": 5000}
    identifier = send(client, "jobs", json.dumps(order))[1]["id"]
    for action, body, says in REFUSED:
        status, answer = send(client, f"jobs/{identifier}/{action}", json.dumps(body))
        assert status == 400 and says in answer["error"], (action, body)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"checkpoint": "../../etc/passwd"}, "lists no"),
        ({"checkpoint": "none.safetensors"}, "lists no"),
        ({"style_lora": "/etc/passwd"}, "lists no"),
        ({"name": "../escaped"}, "cannot be used"),
        ({"name": "CON"}, "cannot be used"),
        ({"name": "a\u0000b"}, "cannot be used"),
        ({"device": "0; rm"}, "device must be"),
        ({"device": "07"}, "There is no device 7"),
        ({"policy": "rude"}, "policy must be"),
        ({"steps": 0}, "steps must be"),
        ({"steps": "4"}, "steps must be"),
        ({"guidance": 1e999}, "guidance must be"),
        ({"host": "/tmp"}, "unknown settings: host"),
        ({"data": {"kind": "pictures", "path": "../.."}}, "input folder"),
        ({"data": {"kind": "prompt file", "path": "/etc/passwd"}}, "input folder"),
        ({"data": {"kind": "prompts", "prompts": "x" * 3000}}, "at most"),
        ({"sample_prompts": "a cup\n" * 9}, "There are 9 sample prompts"),
        ({"data": {"kind": "prompts", "prompts": "a\n\ud800"}}, "half of a character"),
        ({"data": []}, "must be a JSON object"),
    ],
)
def test_orders_that_are_refused(change, says, client, subject, store):
    before = len(store.jobs())
    body = {"checkpoint": subject.checkpoint, "name": "refused"} | change
    status, answer = send(client, "jobs", json.dumps(body))
    assert status == 400, answer
    assert says in answer["error"]
    assert len(store.jobs()) == before


def test_requests_that_are_refused(client):
    some = uuid.uuid4()
    assert send(client, "jobs", "{}", Origin="http://evil.example")[0] == 403
    # ComfyUI's own check of the origin comes first, and fails if it is not an address.
    assert send(client, "jobs", "{}", Origin="http://[")[0] in (403, 500)
    assert send(client, "jobs", "{}", Sec_Fetch_Site="cross-site")[0] == 403
    assert send(client, "jobs", "{}", Sec_Fetch_Site="same-site")[0] == 403
    assert send(client, "jobs", "{}", Sec_Fetch_Site="cross-site", Origin=client.url)[0] == 403
    assert send(client, "jobs", "a=b", Content_Type="text/plain")[0] == 415
    assert send(client, "jobs", "x" * 10_000_000)[0] == 413
    assert send(client, "jobs", "[" * 100_000)[0] == 400
    assert send(client, "jobs", b"\xff\xfe")[0] == 400
    assert send(client, "jobs", "null")[0] == 400
    assert send(client, f"jobs/{some}/stop")[0] == 404
    for wrong in ("1", "..%2f..", f"{some}".upper(), "a" * 300, "%00"):
        assert send(client, f"jobs/{wrong}", None, "GET")[0] in (400, 404)
        assert send(client, f"jobs/{wrong}/delete")[0] in (400, 404)
    assert send(client, "jobs?limit=x", None, "GET")[0] == 400
    assert send(client, f"jobs/{some}/stop", None, "GET")[0] in (404, 405)


@pytest.mark.parametrize(
    ("host", "origin", "site", "status"),
    [
        ("10.9.8.7:8188", "https://my.example", "same-origin", 404),
        ("10.9.8.7", "https://my.example:8443", "none", 404),
        ("10.9.8.7", "https://10.9.8.7", "same-site", 403),
        ("10.9.8.7", "https://10.9.8.7:8443", None, 404),
        ("10.9.8.7:8188", "http://10.9.8.7", None, 404),
        ("10.9.8.7:8188", "http://10.9.8.7:8188", None, 404),
        ("10.9.8.7:8188", "http://10.9.8.7:8189", None, 403),
        ("10.9.8.7:8188", "http://10.9.8.77:8188", None, 403),
        ("10.9.8.7:8188", "null", None, 403),
        ("10.9.8.7:8188", None, None, 404),
    ],
)
def test_behind_a_proxy_the_own_page_may_change_a_job(client, host, origin, site, status):
    headers = {"Host": host, "Origin": origin, "Sec_Fetch_Site": site}
    present = {key: value for key, value in headers.items() if value is not None}
    # 404 means that the request was let through: there is no such job.
    assert send(client, f"jobs/{uuid.uuid4()}/stop", **present)[0] == status


def test_a_lora_that_is_there_already_is_named_at_the_node(client, subject, server):
    from lcm_lora.dev.client import PromptError

    (server.base / "models" / "loras" / "taken.safetensors").write_bytes(b"x")
    with pytest.raises(PromptError, match="taken exists already") as error:
        client.run(order_only(subject, "taken"))
    assert error.value.node == "2"


def test_what_openapi_describes_is_there(client):
    document = client.get("/lcm_lora/openapi.json")
    for path, methods in document["paths"].items():
        asked = path.removeprefix("/lcm_lora/").replace("{id}", str(uuid.uuid4()))
        for method in methods:
            body = "{}" if method == "post" else None
            status, answer = send(client, asked.replace("{name}", "x.png"), body, method.upper())
            assert status != 405 and status < 500
            assert str(status) in methods[method]["responses"], (path, answer)


def test_nothing_that_fits_the_document_or_breaks_it_makes_the_server_fail(client, tmp_path):
    pytest.importorskip("schemathesis", reason="schemathesis is not installed")
    command = [
        sys.executable, "-m", "schemathesis.cli", "run", f"{client.url}/lcm_lora/openapi.json",
        "--url", client.url, "--checks", "not_a_server_error", "--max-examples", "15",
        "--seed", "1", "--generation-database", "none",
    ]  # fmt: skip
    # It leaves a cache in its working directory.
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]


@pytest.fixture
def servers(host_folder, tmp_path, server):
    """Two servers, not started, of one user folder with the toy's files, and its jobs."""
    from lcm_lora.dev.server import Server, install
    from lcm_lora.training.jobs.store import Store

    made = Server(host_folder, tmp_path), Server(host_folder, tmp_path)
    for kind in ("checkpoints", "loras"):
        for file in (server.base / "models" / kind).glob("demo-*"):
            install(file.resolve(), made[0].base / "models" / kind)
    return *made, Store(made[0].base / "user" / "__lcm_lora" / "jobs")


@pytest.mark.faults
def test_a_job_outlives_its_server_and_a_new_server_finds_it(servers, subject):
    running, again, store = servers
    with running:
        running.client().run(order_only(subject, "outlives", steps=40))
        job = until(lambda: named(store, "outlives"), "it is queued")
        until(lambda: store.job(job.id).step >= 1, "it trains")
        running.kill()
        step = store.job(job.id).step
        until(lambda: store.job(job.id).step > step, "it goes on without a server")
    with again:
        answer = again.client().get(f"/lcm_lora/jobs/{job.id}")
        assert answer["state"] in ("running", "done")
        until(lambda: store.job(job.id).state == "done", "it is done")
        again.client().run(graph(subject, "outlives", steps=40))


@pytest.mark.faults
def test_a_job_that_stands_aside_goes_on_when_its_server_is_closed(servers, subject):
    running, _, store = servers
    with running:
        running.client().run(order_only(subject, "aside", steps=500, policy="yield"))
        job = until(lambda: named(store, "aside"), "it is queued")
        until(lambda: store.job(job.id).step >= 1, "it trains")
        drawing = graph(subject, "drawn")
        for key in ("1", "2", "3", "4", "6", "12"):
            del drawing[key]
        drawing["9"]["inputs"] |= {"model": ["5", 0], "steps": 50}
        drawing["8"]["inputs"]["batch_size"] = 64
        running.client().post("/prompt", {"prompt": drawing})
        until(lambda: store.job(job.id).state == "paused", "it has stepped aside")
        running.kill()
    try:
        until(lambda: store.job(job.id).state == "running", "it goes on")
    finally:
        store.ask(job.id, "stop")
        until(lambda: store.job(job.id).state == "paused", "it is stopped")
