"""One real server with the pack and the toy in it, for all tests of this folder."""

import pytest


@pytest.fixture(scope="session")
def server(tmp_path_factory, host_folder):
    from lcm_lora.dev import in_process
    from lcm_lora.dev.commands import LOCAL
    from lcm_lora.dev.server import Server, install
    from lcm_lora.dev.toy import assemble

    local = tmp_path_factory.mktemp("server")
    in_process.enter(host_folder, local / "in-process")
    running = Server(host_folder, local)
    models = running.base / "models"
    install(assemble.checkpoint(LOCAL / "models"), models / "checkpoints")
    for lora in (assemble.LCM_LORA, assemble.STYLE_LORA):
        install(lora, models / "loras")
    with running:
        yield running


@pytest.fixture(scope="session")
def client(server):
    return server.client()


@pytest.fixture(scope="session")
def subject(server):
    """The toy's files and captions, as the demo puts them into the shipped workflows."""
    from lcm_lora.dev.commands import LOCAL
    from lcm_lora.dev.demo import toy_subject
    from lcm_lora.dev.toy import assemble

    return toy_subject(assemble.checkpoint(LOCAL / "models"))
