# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""`hsenet serve`: options to [`~hsenet.serving.ScanService`], and the address where it answers."""

import argparse
import ipaddress
import os
from types import FrameType

import uvicorn

from hsenet.cli_model import add_generation_model_options, load_as_chosen, with_adapter
from hsenet.cli_scan import add_read_options, at_least_one, chosen_device, read_options, say
from hsenet.report_record import NOTICE, public_id
from hsenet.serving import ScanService, ServingLimits
from hsenet.serving_app import build_app
from hsenet_command import UsageError


SECONDS_TO_CLOSE = 2  # for clients that do not take their answer when the server is told to end


def add_serve(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="model that writes (stage 3): folder or Hub id")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free (default: 8000)")
    parser.add_argument("--api_key_env", metavar="NAME", help="environment variable with the key that clients send")
    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max_body_mb", type=at_least_one, default=1024, help="of one request, a scan in base64 (default: 1024)"
    )
    limits.add_argument(
        "--max_requests", type=at_least_one, default=8, help="sent, waiting and answered at once (default: 8)"
    )
    limits.add_argument(
        "--keep_scans", type=at_least_one, default=4, help="encoded scans kept for more questions (default: 4)"
    )
    limits.add_argument(
        "--max_new_tokens", type=at_least_one, default=1024, help="the longest text to ask for (default: 1024)"
    )
    add_generation_model_options(parser)
    add_read_options(parser)
    parser.set_defaults(run=_run_serve)


class _Server(uvicorn.Server):
    """Ends texts that are being written as soon as it is told to end."""

    service: ScanService
    ended_by = 0  # number of the signal

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.ended_by = sig
        self.service.close()
        super().handle_exit(sig, frame)


def _run_serve(
    model: str,
    *,
    host: str,
    port: int,
    api_key_env: str | None,
    max_body_mb: int,
    max_requests: int,
    keep_scans: int,
    max_new_tokens: int,
    device: str | None,
    adapter: str | None,
    **options,
) -> int:
    api_key = _key(api_key_env, host)
    reading = read_options(options)
    loaded, processor = load_as_chosen(model, chosen_device(device), adapter=adapter, **options)
    if adapter:
        loaded = with_adapter(loaded, adapter)
    limits = ServingLimits(max_body_mb * 2**20, max_requests, keep_scans, max_new_tokens)
    service = ScanService(loaded, processor, public_id(model), limits, **reading)
    server = _Server(
        uvicorn.Config(
            build_app(service, api_key),
            host=host,
            port=port,
            log_level="warning",
            access_log=False,
            server_header=False,
            timeout_graceful_shutdown=SECONDS_TO_CLOSE,
        )
    )
    server.service = service
    listener = server.config.bind_socket()
    address = f"[{host}]" if ":" in host else host
    say(NOTICE, json=False)
    say(f"model {service.name} at http://{address}:{listener.getsockname()[1]}/v1", json=False)
    server.run(sockets=[listener])
    # uvicorn sends itself the signal again, which may or may not end the process before this.
    return 128 + server.ended_by if server.ended_by else 0


def _key(variable: str | None, host: str) -> str | None:
    if variable is None:
        if not _is_this_machine(host):
            raise UsageError(f"--host {host} lets other machines in: it needs --api_key_env")
        return None
    if not (key := os.environ.get(variable)):
        raise UsageError(f"--api_key_env: the environment variable {variable} is empty or not set")
    return key


def _is_this_machine(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
