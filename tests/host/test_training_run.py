"""The training program on the toy: runs, stops, dies, goes on, and says what is wrong."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from lcm_lora.lora.family import family_named
from lcm_lora.lora.formats import files
from lcm_lora.tests.host.queued import PROMPTS
from lcm_lora.training import export
from lcm_lora.training.data.bank import ROWS
from lcm_lora.training.state import sheets
from safetensors.torch import load_file, save_file

RUN = Path(__file__).resolve().parents[2] / "training" / "run.py"


@pytest.fixture
def job(tmp_path, comfy, toy_checkpoint, banks):
    """job(name, **settings) -> the path of a written spec.json, of the fixture `unbroken`'s job."""

    def write(name="job", **changes):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        settings = {
            "host": str(comfy.host), "checkpoint": str(toy_checkpoint), "banks": str(banks),
            "output": str(tmp_path / f"{name}-loras" / "lcm.safetensors"),
            "data": {"prompts": PROMPTS, "count": 8, "draw_steps": 4},
            "resolution": 64, "steps": 12, "batch": 2, "rank": 4, "guidance": 2.5, "lr": 1e-3,
            "checkpoint_every": 3, "log_every": 1, "sample_every": 0, "seed": 3,
        }  # fmt: skip
        path = folder / "spec.json"
        path.write_text(json.dumps(settings | changes), encoding="utf-8")
        return path

    return write


def start(spec: Path, *launcher: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, *launcher, str(RUN), str(spec)]
    log = open(spec.parent / "log.txt", "ab")  # noqa: SIM115 (the process keeps it)
    return subprocess.Popen(command, env=os.environ | environment, stdout=log, stderr=log)


def done(spec: Path, *launcher: str, **environment: str) -> Path:
    """Runs a job to its end; -> the LoRA's file."""
    status = start(spec, *launcher, **environment).wait(timeout=300)
    assert status == 0, (spec.parent / "log.txt").read_text()
    return Path(json.loads(spec.read_text())["output"])


def metrics(spec: Path) -> list[dict]:
    file = spec.parent / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def status(spec: Path) -> dict:
    return json.loads((spec.parent / "status.json").read_text())


def reached(spec: Path, step: int, process: subprocess.Popen) -> None:
    """Returns when the job's metrics show this step."""
    deadline = time.monotonic() + 120
    while not [line for line in metrics(spec) if line["step"] >= step]:
        assert process.poll() is None, (spec.parent / "log.txt").read_text()
        assert time.monotonic() < deadline, "the job does not get on"
        time.sleep(0.02)


@pytest.fixture
def ended(comfy, monkeypatch):
    """ended(spec, ...) -> the exit status of a job run in this process, which has ComfyUI already:
    for tests of what a job makes, not of how its process lives and dies. The attention is that of a
    trainer's process, and the teacher's sample pictures take few steps."""
    import comfy.ldm.modules.attention as attention
    from lcm_lora.training import run
    from lcm_lora.training.state import samples

    for name in ("optimized_attention", "optimized_attention_masked"):
        monkeypatch.setattr(attention, name, attention.attention_pytorch)
    monkeypatch.setattr(samples, "TEACHER_STEPS", 4)

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield lambda spec, *arguments: run.main([str(spec), *arguments])
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def made(ended):
    """made(spec) -> the LoRA's file of a job that runs to its end in this process."""

    def run(spec: Path) -> Path:
        assert ended(spec) == 0, status(spec)
        return Path(json.loads(spec.read_text())["output"])

    return run


def test_a_missing_package_is_reported_as_a_crash(job):
    spec = job()
    code = (
        "import runpy, sys; sys.modules['PIL'] = None; "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    run = subprocess.run([sys.executable, "-c", code, str(RUN), str(spec)], capture_output=True)
    assert run.returncode == 1
    report = status(spec)
    assert (report["state"], report["crash"]) == ("failed", True)
    assert "PIL" in report["message"]


def test_a_job_leaves_a_lora_that_the_host_takes_completely(job, made, comfy, toy_checkpoint):
    import comfy.sd
    from lcm_lora.lora.host import apply

    spec = job(sample_every=6, sample_prompts=PROMPTS[:2])
    vector = files.read(made(spec))
    model = comfy.sd.load_checkpoint_guess_config(str(toy_checkpoint))[0]
    _, _, coverage = apply(model, None, vector, 1.0, 0.0)
    assert coverage.taken == coverage.total == len(vector.deltas) > 30
    assert any(delta.up.abs().max() > 0 for delta in vector.deltas.values())
    metadata = vector.metadata
    assert metadata["lcm_lora.base_family"] == "SD1.5" and metadata["ss_network_dim"] == "4"
    assert len(metadata["ss_new_sd_model_hash"]) == 64

    steps = [line for line in metrics(spec) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    needed = {"loss", "lr", "gradient_norm", "samples_per_second", "memory", "seconds_left"}
    assert all(needed <= line.keys() for line in steps)
    sampled = [line for line in metrics(spec) if "endpoint_error" in line]
    assert [line["step"] for line in sampled] == [6, 12]
    assert set(sampled[0]["endpoint_error"]) == {"1", "2", "4"}
    sheet = spec.parent / "samples" / "step-00000012.png"
    assert sheet.stat().st_size > 1000 and sheets.prompts(sheet) == list(PROMPTS[:2])
    assert status(spec)["state"] == "done"
    assert not list(spec.parent.rglob(".tmp-*"))


def test_its_status_tells_step_1_and_the_sample_pictures_whatever_log_every_is(job):
    changes = {"log_every": 1000, "checkpoint_every": 1000, "steps": 6, "sample_every": 4}
    spec = job("watched", sample_prompts=PROMPTS[:1], **changes)
    process, seen = start(spec), []
    while process.poll() is None:
        time.sleep(0.02)
        if (spec.parent / "status.json").exists():
            seen += [report for report in [status(spec)] if report not in seen[-1:]]
    assert process.returncode == 0, (spec.parent / "log.txt").read_text()
    training = [report for report in seen if report.get("activity") == "training"]
    assert [report["step"] for report in training][0] == 0
    first = next(report for report in training if report["step"])
    assert first["step"] < 6 and first["seconds_left"] > 0 and first["loss"] > 0
    drawing = [report for report in seen if report.get("activity") == "drawing samples"]
    assert {report["step"] for report in drawing} <= {4, 6} and drawing
    assert all(report["state"] == "running" for report in training + drawing)
    counts = [(report["activity_done"], report["activity_total"]) for report in drawing]
    assert all(0 <= done <= total and total in (4, 3) for done, total in counts), counts
    assert "seconds_left" not in seen[-1] and seen[-1]["activity"] == ""


def test_a_baked_in_style_is_in_the_file_and_in_the_newest_checkpoints_lora(
    job, made, tmp_path, monkeypatch
):
    from lcm_lora.dev.toy import assemble
    from lcm_lora.lora.formats.wire import from_wire
    from lcm_lora.nodes import jobs
    from lcm_lora.training.jobs.store import Store

    identifier = "0a0b0c0d-0000-4000-8000-000000000000"
    style = {"path": str(assemble.lora(assemble.STICKER_LORA)), "strength": 0.8}
    spec = job(identifier, loras=[style], steps=3)
    vector, baked = files.read(made(spec)), files.read(assemble.lora(assemble.STICKER_LORA))
    trained = load_file(spec.parent / "checkpoints" / "step-00000003" / "adapter.safetensors")
    alone = export.vector(trained, 4.0, {}, "adapter")
    (spec.parent / "status.json").write_text('{"state": "running"}')
    monkeypatch.setattr(jobs.host, "store", lambda: Store(tmp_path))
    newest = from_wire(jobs.LCMJobResult.execute(identifier, False).args[0])
    assert baked.deltas and vector.modules() == baked.modules() | alone.modules()
    assert newest.modules() == vector.modules()
    for name, delta in vector.deltas.items():
        parts = [(alone.deltas.get(name), 1.0), (baked.deltas.get(name), 0.8)]
        expected = sum(part.matrix() * weight for part, weight in parts if part)
        for matrix in (delta.matrix(), newest.deltas[name].matrix()):
            torch.testing.assert_close(matrix, expected, rtol=5e-3, atol=1e-4)
    metadata = vector.metadata
    assert metadata["lcm_lora.family"] == "lcm"
    assert json.loads(metadata["lcm_lora.style_loras"]) == [[assemble.STICKER_LORA, 0.8]]


def test_a_job_goes_on_from_a_lora(job, made):
    from lcm_lora.dev.toy import assemble

    start = assemble.lora(assemble.LCM_LORA)
    spec = job("fitted", start_from=str(start), steps=1, rank=24, lr=1e-6)
    ended, began = files.read(made(spec)), files.read(start)
    assert ended.metadata["lcm_lora.start_from"] == start.name
    # The start has the names of diffusers, the result the host's own.
    norms = [
        sorted(float(delta.matrix().norm()) for delta in vector.deltas.values())
        for vector in (ended, began)
    ]
    torch.testing.assert_close(*map(torch.tensor, norms), rtol=1e-2, atol=1e-3)


def test_a_job_keeps_the_weights_off_the_device(job, made):
    """That changes no number. On a CPU they are copied all the same."""
    outputs = [
        made(job(name, steps=2, **settings))
        for name, settings in (("lent", {"offload": "on"}), ("own", {"checkpointing": "on"}))
    ]
    lent, own = map(load_file, outputs)
    assert lent.keys() == own.keys() and all(torch.equal(lent[name], own[name]) for name in own)


def test_a_job_matches_distributions(job, made):
    from lcm_lora.dev.toy import assemble

    start = str(assemble.lora(assemble.LCM_LORA))
    spec = job("matched", objective="dmd", start_from=start, steps=10, rank=24, sample_every=10)
    vector = files.read(made(spec))
    metadata = vector.metadata
    assert metadata["lcm_lora.family"] == "lcm" and metadata["lcm_lora.objective"] == "dmd"
    folder = spec.parent / "checkpoints" / "step-00000010"
    average, more = (load_file(folder / f"{n}.safetensors") for n in ("adapter", "objective"))
    names = {f"{kind}.{name}" for kind in ("fake", "student") for name in average}
    assert more.keys() == names | {"stages"}
    kept = export.vector(average, 24.0, {}, "average")
    for name, delta in kept.deltas.items():
        torch.testing.assert_close(
            vector.deltas[name].matrix(), delta.matrix(), rtol=5e-3, atol=1e-4
        )
    # What it starts from is shown too.
    assert [line["step"] for line in metrics(spec) if "endpoint_error" in line] == [0, 10]
    assert all((spec.parent / "samples" / f"step-000000{n}.png").exists() for n in ("00", "10"))


def test_a_job_whose_last_word_was_lost_is_done_all_the_same(job, made):
    spec = job("lost", steps=3)
    before = made(spec).read_bytes()
    (spec.parent / "status.json").write_text('{"state": "running"}')
    assert made(spec).read_bytes() == before
    assert status(spec)["state"] == "done"


def resumed(job, unbroken: bytes, kills: int, seed: int) -> None:
    """A job is killed at random points and restarted; it must equal one that ran through."""
    spec = job("killed")
    chance = random.Random(seed)
    for step in sorted(chance.randrange(1, 12) for _ in range(kills)):
        process = start(spec)
        reached(spec, step, process)
        time.sleep(chance.random() * 0.2)
        process.kill()
        process.wait()
    assert done(spec).read_bytes() == unbroken
    steps = [line["step"] for line in metrics(spec)]
    assert steps == sorted(set(steps)), "a step that was undone is still in the metrics"


def test_a_killed_job_ends_with_the_same_bytes(job, unbroken):
    resumed(job, unbroken, kills=1, seed=3)  # between two checkpoints


@pytest.mark.faults
def test_a_job_killed_ten_times_ends_with_the_same_bytes(job, unbroken):
    resumed(job, unbroken, kills=10, seed=2)


def test_pause_saves_and_ends_and_the_job_goes_on(job, ended, unbroken):
    spec = job("paused")
    process = start(spec)
    reached(spec, 4, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 0
    assert status(spec)["state"] == "paused"
    control = spec.parent / "control.json"
    control.write_text('{"action": "pause"}')
    assert ended(spec) == 0
    assert status(spec)["state"] == "paused"
    control.unlink()
    assert done(spec).read_bytes() == unbroken


@pytest.fixture
def small_disk(tmp_path):
    """small_disk(bytes) -> a file system of that size; called again, it is resized."""
    folder = tmp_path / "small-disk"
    folder.mkdir()
    mounted = []

    def size(count: int) -> Path:
        options = f"{'remount,' if mounted else ''}size={count}"
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        made = subprocess.run(command, capture_output=True, text=True)
        if made.returncode and mounted:
            raise OSError(made.stderr.strip())
        if made.returncode:
            pytest.skip(f"a small disk needs the right to mount one: {made.stderr.strip()}")
        mounted.append(count)
        return folder

    yield size
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


DISK_FULL, SMALL, ENOUGH = 75, 64 * 1024, 256 * 1024 * 1024


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs, which Linux has")
@pytest.mark.parametrize(
    "what",
    ["job", *(pytest.param(name, marks=pytest.mark.faults) for name in ("banks", "output"))],
)
def test_a_full_disk_pauses_and_the_job_goes_on_when_there_is_room(job, unbroken, small_disk, what):
    """For bank and result the disk is full from the start, for the job after a checkpoint."""
    disk = small_disk(SMALL if what != "job" else ENOUGH)
    spec = job("full")
    settings = json.loads(spec.read_text())
    if what == "job":
        (disk / "spec.json").write_text(spec.read_text())
        spec = disk / "spec.json"
    else:
        settings[what] = str(disk / "lcm.safetensors" if what == "output" else disk)
        spec.write_text(json.dumps(settings))
    process = start(spec)
    if what == "job":
        reached(spec, 3, process)
        while True:
            with suppress(OSError):  # the job may have written more in the meantime
                small_disk(shutil.disk_usage(disk).used + SMALL)
                break
    assert process.wait(timeout=120) == DISK_FULL
    assert not list(disk.rglob(".tmp-*"))
    if what != "job":
        assert status(spec)["state"] == "paused"
        assert "disk is full" in status(spec)["message"]
    small_disk(ENOUGH)
    assert done(spec).read_bytes() == unbroken
    assert status(spec)["state"] == "done"


def test_pictures_with_captions_become_a_lora(job, made, tmp_path, caplog):
    """One picture of the folder is unreadable, which is within the limit."""
    from PIL import Image

    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i, prompt in enumerate(PROMPTS * 2):
        Image.new("RGB", (90 + 10 * i, 120), (40 * i, 90, 200)).save(pictures / f"{i}.png")
        (pictures / f"{i}.txt").write_text(prompt, encoding="utf-8")
    (pictures / "broken.png").write_bytes(b"no picture")
    (pictures / "broken.txt").write_text("a photo of nothing", encoding="utf-8")
    (pictures / "film.mp4").write_bytes(b"no picture")
    data = {"kind": "pictures", "path": str(pictures), "crops": 2, "skip_limit": 0.2}
    spec = job("from-pictures", data=data, banks=str(tmp_path / "banks"), batch=2)
    assert files.read(made(spec)).deltas
    assert "skipped: broken.png" in caplog.text and "not used: film.mp4" in caplog.text
    record = status(spec)
    assert record["state"] == "done"
    assert "Not used (1): film.mp4" in record["message"]
    assert "Unreadable: 2 of the examples, the first: broken.png" in record["message"]


def test_no_better_for_long_enough_ends_with_the_best(job, made):
    """The learning rate makes the LoRA worse with every step."""
    spec = job("patience", lr=0.05, steps=60, sample_every=2, patience=2, checkpoint_every=2)
    output = made(spec)
    measured = [line for line in metrics(spec) if "endpoint_error" in line]
    errors = [line["endpoint_error"]["1"] for line in measured]
    best = min(range(len(errors)), key=errors.__getitem__)
    assert len(errors) == best + 3
    assert measured[-1]["step"] < 60
    from lcm_lora.training.state import checkpoints

    checkpoint = checkpoints.read(spec.parent / "checkpoints", measured[best]["step"])
    assert files.read(output).metadata["ss_max_train_steps"] == str(measured[best]["step"])
    assert status(spec)["step"] == measured[best]["step"]
    lora = load_file(output)
    ups = sorted(
        tensor.half().norm() for name, tensor in checkpoint.adapter.items() if "up" in name
    )
    exported = sorted(tensor.norm() for name, tensor in lora.items() if "lora_up" in name)
    assert torch.allclose(torch.stack(ups).float(), torch.stack(exported).float(), rtol=1e-2)


@pytest.mark.faults
def test_compiled_blocks_learn_what_plain_ones_learn(job):
    """Uses torch's own compiler, which needs a C++ compiler where there is no GPU."""
    plain = files.read(done(job("plain", steps=2)))
    compiled = files.read(done(job("compiled", steps=2, compile=True)))
    for name, delta in plain.deltas.items():
        expected, actual = delta.matrix(), compiled.deltas[name].matrix()
        assert (actual - expected).norm() <= 0.02 * expected.norm(), name


def test_finish_writes_what_there_is(job):
    spec = job(steps=1000, passes=4)
    process = start(spec)
    reached(spec, 3, process)
    assert any((spec.parent / "answers").iterdir())
    (spec.parent / "control.json").write_text('{"action": "finish"}')
    assert process.wait(timeout=60) == 0
    assert status(spec)["state"] == "done"
    vector = files.read(Path(json.loads(spec.read_text())["output"]))
    assert 3 <= int(vector.metadata["ss_max_train_steps"]) < 1000
    assert not (spec.parent / "answers").exists()
    family, (_, key) = family_named(vector.metadata, "x")
    assert (family, key) == ("lcm", "lcm_lora.family")


@pytest.mark.parametrize(
    ("objective", "steps"),
    [
        ("lcm", 6), pytest.param("lcm", 50, marks=pytest.mark.faults),
        pytest.param("dmd", 26, marks=pytest.mark.faults),
    ],
)  # fmt: skip
def test_two_nodes_are_one_process_with_twice_the_batch(job, objective, steps):
    """The processes are launched as by Slurm and SkyPilot, but on one machine. They use the CPU,
    because NCCL refuses two processes on one GPU."""
    settings = {
        "steps": steps, "checkpoint_every": 50, "host_flags": ["--cpu"], "objective": objective,
    }  # fmt: skip
    one, two = job("one", batch=2, **settings), job("two", batch=1, **settings)
    done(one, OMP_NUM_THREADS="1")
    with socket.socket() as free:
        free.bind(("", 0))
        port = str(free.getsockname()[1])
    nodes = [
        start(
            two, "-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", rank,
            "--nproc-per-node", "1", "--master-addr", "127.0.0.1", "--master-port", port,
            OMP_NUM_THREADS="1",
        )
        for rank in "01"
    ]  # fmt: skip
    assert [node.wait(timeout=300) for node in nodes] == [0, 0], (
        two.parent / "log.txt"
    ).read_text()
    losses = [[line["loss"] for line in metrics(spec)] for spec in (one, two)]
    assert len(losses[0]) == len(losses[1]) == steps
    assert max(abs(a - b) for a, b in zip(*losses, strict=True)) < 1e-3
    assert losses[0][0] != losses[0][-1]


@pytest.mark.gpu
def test_more_processes_than_gpus_are_refused(job):
    import torch

    count = torch.cuda.device_count()
    spec = job("crowd", steps=1)
    run = start(
        spec, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count + 1)
    )
    assert run.wait(timeout=300) != 0
    assert f"has no GPU of its own: PyTorch sees {count}" in (spec.parent / "log.txt").read_text()


@pytest.fixture
def failing(ended):
    """failing(spec) -> the message of a job that must fail, run in this process."""

    def run(spec: Path) -> str:
        assert ended(spec) == 1
        record = status(spec)
        assert record["state"] == "failed"
        return record["message"]

    return run


def test_bad_jobs_say_what_is_wrong(job, failing, tmp_path, toy_checkpoint):
    from lcm_lora.dev.toy import assemble

    assert "no checkpoint" in failing(job(checkpoint=str(tmp_path / "none.safetensors")))
    assert "not a checkpoint" in failing(job(checkpoint=str(assemble.lora(assemble.LCM_LORA))))
    noise = tmp_path / "noise.safetensors"
    noise.write_bytes(b"\x00" * 1000)
    assert "not a checkpoint" in failing(job(checkpoint=str(noise)))
    assert "no ComfyUI" in failing(job(host=str(tmp_path)))
    assert "steps must be at least 1" in failing(job(steps=0))
    long = {"prompts": ["word " * 10_000], "count": 2, "draw_steps": 1}
    assert "too long" in failing(job(data=long))
    latin = tmp_path / "prompts.txt"
    latin.write_bytes("ein Bär".encode("latin-1"))
    assert "not UTF-8" in failing(job(data={"path": str(latin)}))
    empty = tmp_path / "pictures"
    empty.mkdir()
    message = failing(job(data={"kind": "pictures", "path": str(empty)}))
    assert "picture" in message
    assert "full rank is 320" in failing(job(rank=321))


def test_a_device_that_is_not_there_is_named(job):
    spec = job(host_flags=[])
    assert start(spec, CUDA_VISIBLE_DEVICES="99").wait(timeout=300) == 1
    assert "There is no device 99" in status(spec)["message"]
    with_cpu = job("with-cpu", host_flags=["--cpu"], steps=1)
    assert done(with_cpu, CUDA_VISIBLE_DEVICES="99").exists()


def test_an_output_that_exists_or_is_being_written_is_left_alone(job, failing):
    from filelock import FileLock
    from lcm_lora.training import disk

    spec = job("taken")
    settings = json.loads(spec.read_text())
    output = Path(settings["output"])
    with FileLock(Path(settings["banks"]) / f"{disk.name_of(str(output))}.lock"):
        assert "Another job is writing" in failing(spec)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(b"mine")
    assert "exists already" in failing(spec)
    assert output.read_bytes() == b"mine"


def test_a_loss_that_is_not_finite_stops_at_the_last_good_checkpoint(job, failing, tmp_path):
    """A learning rate of 1 and no limit on the gradient drive any adapter out of float32."""
    spec = job(lr=1.0, clip=1e9, steps=400, checkpoint_every=1, rank=32)
    message = failing(spec)
    assert "step" in message and "checkpoint" in message
    from lcm_lora.training.state.checkpoints import newest

    last = newest(spec.parent / "checkpoints")
    assert all(tensor.isfinite().all() for tensor in last.adapter.values())


def test_a_teacher_that_draws_nan_is_reported(job, failing, toy_checkpoint, tmp_path):
    state = load_file(toy_checkpoint)
    state["model.diffusion_model.out.2.bias"] = torch.full_like(
        state["model.diffusion_model.out.2.bias"], torch.nan
    )
    broken = tmp_path / "broken.safetensors"
    save_file(state, broken)
    assert "not finite" in failing(job(checkpoint=str(broken)))


def test_a_dry_run_prints_the_plan_and_leaves_nothing(job, capsys):
    from lcm_lora.training import run

    spec = job("plan")
    assert run.main([str(spec), "--dry-run"]) == 0
    printed = capsys.readouterr().out
    for words in ("SD1.5", "modules of rank 4", "12 of 2 pictures", "3 network calls a step"):
        assert words in printed
    spec = job("plan", passes=4)
    assert run.main([str(spec), "--dry-run"]) == 0
    assert "2 network calls a step" in capsys.readouterr().out
    assert [path.name for path in spec.parent.iterdir()] == ["spec.json"]


def test_a_pause_before_the_training_ends_every_process(job, tmp_path):
    # A file of the bank for each: the second process, which has the last, then waits for the first.
    data = {"prompts": PROMPTS, "count": ROWS + 1, "draw_steps": 1}
    spec = job("early", banks=str(tmp_path / "own-banks"), data=data, host_flags=["--cpu"])
    (spec.parent / "control.json").write_text('{"action": "pause"}')
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    begun = time.monotonic()
    assert start(spec, *launcher, OMP_NUM_THREADS="1").wait(timeout=300) != 0
    assert time.monotonic() - begun < 200
    assert status(spec)["state"] == "paused"


def test_a_pause_while_the_bank_is_drawn_is_followed_at_once_by_every_process(job, tmp_path):
    """One process is in the middle of a file; the other draws too and then waits for it."""
    banks = tmp_path / "own-banks"
    data = {"prompts": PROMPTS, "count": ROWS + 1, "draw_steps": 1000}  # minutes for a file
    spec = job("early", banks=str(banks), data=data, host_flags=["--cpu"])
    control = spec.parent / "control.json"
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

    def drawing() -> bool:
        there = (spec.parent / "status.json").exists()
        return there and status(spec)["message"].startswith("rows")

    def paused_at(message: str) -> None:
        control.unlink(missing_ok=True)
        process = start(spec, *launcher, OMP_NUM_THREADS="1")
        try:
            deadline = time.monotonic() + 120
            while not drawing():
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.05)
            control.write_text('{"action": "pause"}')
            assert process.wait(timeout=25) != 0  # after 30 s the launcher kills the others
        finally:
            process.terminate()
        record = status(spec)
        assert (record["state"], record["message"]) == ("paused", f"paused at {message}")
        assert not list(banks.rglob(".tmp-*"))

    paused_at(f"rows: 0 of {ROWS + 1}")
    (texts,) = banks.rglob("texts-*")
    assert not list(banks.rglob("rows-*"))
    (texts.parent / "rows-00000.safetensors").touch()  # so that the first has nothing to draw
    paused_at(f"rows: {ROWS} of {ROWS + 1}")
