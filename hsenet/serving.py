# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""`hsenet serve`: questions about scans over HTTP, in the format of OpenAI's chat completions.

A scan comes with the request and stays in memory: nothing is written to a disk, nothing is fetched. Scans are encoded
one after the other, and texts are written one after the other; the last few encoded scans are kept, by the hash of
their bytes.
"""

import asyncio
import json
import secrets
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import torch
from transformers import PreTrainedModel, StoppingCriteria

from hsenet.chat_requests import ChatRequest, RequestError, read_request, refusal
from hsenet.encoded_scan import EncodedScan, prompt_for
from hsenet.report_record import NOTICE
from processing_hsenet import HSENetProcessor


CLOSING = "The server is closing."


@dataclass(frozen=True)
class ServingLimits:
    """
    Args:
        max_body_bytes (`int`): of one request; base64 makes a scan a third longer.
        max_requests (`int`): sent, waiting and written at once; more are told to come again.
        keep_scans (`int`): encoded scans that are kept for further questions.
        max_new_tokens (`int`): the most that a client may ask for.
    """

    max_body_bytes: int = 2**30
    max_requests: int = 8
    keep_scans: int = 4
    max_new_tokens: int = 1024


class ScanService:
    """
    A model behind two queues: one of scans to encode, one of texts to write.

    Args:
        model ([`HSENetForConditionalGeneration`]).
        processor ([`HSENetProcessor`]).
        name (`str`): by which clients know the model.
        limits ([`ServingLimits`], *optional*).
        read_options: of `read_volume`, for all scans.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: HSENetProcessor,
        name: str,
        limits: ServingLimits | None = None,
        **read_options,
    ):
        self.model, self.processor, self.name = model, processor, name
        self.limits = limits or ServingLimits()
        self.read_options = read_options
        self.created = int(time.time())
        self.closing = threading.Event()
        self._scans: OrderedDict[str, EncodedScan] = OrderedDict()  # only the reader's thread looks at it
        self._reader, self._writer = ThreadPoolExecutor(1, "reader"), ThreadPoolExecutor(1, "writer")

    async def prepare(self, body: bytes) -> tuple[ChatRequest, EncodedScan]:
        """
        Raises:
            RequestError: the request is not understood.
            HSENetInputError: the scan is refused.
            ValueError: the question is.
        """
        return await asyncio.get_running_loop().run_in_executor(self._reader, self._prepare, body)

    def _prepare(self, body: bytes) -> tuple[ChatRequest, EncodedScan]:
        chat = read_request(body, model=self.name, max_new_tokens=self.limits.max_new_tokens)
        prompt_for(self.processor, chat.question)  # refused before the scan is read
        key = sha256(chat.scan).hexdigest()
        if key not in self._scans:
            self._scans[key] = EncodedScan.read(self.model, self.processor, chat.scan, **self.read_options)
        self._scans.move_to_end(key)
        while len(self._scans) > self.limits.keep_scans:
            self._scans.popitem(last=False)
        return replace(chat, scan=b""), self._scans[key]  # its bytes need no memory while it waits

    def write(self, chat: ChatRequest, scan: EncodedScan, when_done: Callable[[], None]) -> "Writing":
        """Takes its place in the queue; `when_done` is called in the event loop before the end, whatever that is."""
        loop = asyncio.get_running_loop()
        writing = Writing(self, chat, scan)

        def end(work: Future) -> None:
            when_done()
            writing.put(RequestError(CLOSING, 503) if work.cancelled() else work.exception())

        work = self._writer.submit(writing.work, lambda piece: loop.call_soon_threadsafe(writing.put, piece))
        work.add_done_callback(lambda work: loop.call_soon_threadsafe(end, work))
        return writing

    def close(self) -> None:
        """Ends what is being written, and begins nothing more."""
        self.closing.set()
        for queue in (self._reader, self._writer):
            queue.shutdown(wait=False, cancel_futures=True)


class Writing(StoppingCriteria):
    """One text on its way to one client: its pieces, its tokens, and its end once the client has gone."""

    def __init__(self, service: ScanService, chat: ChatRequest, scan: EncodedScan):
        self.service, self.chat, self.scan = service, chat, scan
        self.id, self.created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        prompt = [prompt_for(service.processor, chat.question)]
        self.prompt_tokens = service.processor.tokenize_prompts(prompt)["input_ids"].shape[1]
        self.tokens, self.is_finished = 0, False
        self.is_unwanted = threading.Event()
        eos = service.model.generation_config.eos_token_id
        self._ends = {eos} if isinstance(eos, int) else set(eos or ())
        self._pieces: asyncio.Queue[str | BaseException | None] = asyncio.Queue()
        self.put = self._pieces.put_nowait

    def work(self, put: Callable[[str], Any]) -> None:
        """In the writer's thread; what it raises is raised again where the pieces are awaited."""
        if not self._is_ended:
            for piece in self._stream():
                put(piece)
        if self.service.closing.is_set():
            raise RequestError(CLOSING, 503)

    def _stream(self) -> Iterator[str]:
        torch.manual_seed(self.chat.seed)  # nobody else draws: texts are written one after the other
        drawn = {"do_sample": True, "temperature": self.chat.temperature, "top_p": self.chat.top_p}
        settings = drawn if self.chat.temperature else {"do_sample": False}
        length = self.chat.max_new_tokens
        return self.scan.stream(self.chat.question, max_new_tokens=length, stopping_criteria=[self], **settings)

    @property
    def _is_ended(self) -> bool:
        return self.is_unwanted.is_set() or self.service.closing.is_set()

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs) -> torch.Tensor:
        """After each token, as a criterion of `generate`."""
        self.tokens += 1
        self.is_finished = int(input_ids[0, -1]) in self._ends
        return torch.full((input_ids.shape[0],), self._is_ended, device=input_ids.device)

    def watch(self, receive: Callable[[], Awaitable[dict]]) -> None:
        """For the client that goes away, by the messages of its connection (ASGI)."""

        async def wait() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            self.is_unwanted.set()

        self._watch = asyncio.create_task(wait())

    async def piece(self) -> str | None:
        """The next one; None at the end."""
        item = await self._pieces.get()
        if isinstance(item, BaseException):
            raise item
        return item

    @property
    def finish_reason(self) -> str:
        return "stop" if self.is_finished else "length"

    @property
    def usage(self) -> dict[str, int]:
        total = self.prompt_tokens + self.tokens
        return {"prompt_tokens": self.prompt_tokens, "completion_tokens": self.tokens, "total_tokens": total}

    @property
    def about(self) -> dict[str, Any]:
        """What OpenAI's format has no field for; clients leave it be."""
        scan = self.scan
        return {"notice": NOTICE, "input": {"sha256": scan.sha256, **scan.geometry}, "warnings": scan.warnings}

    async def whole(self, first: str | None) -> dict[str, Any]:
        pieces = []
        while first is not None:
            pieces.append(first)
            first = await self.piece()
        message = {"role": "assistant", "content": "".join(pieces)}
        choice = {"index": 0, "message": message, "finish_reason": self.finish_reason}
        return self._object("chat.completion", choices=[choice], usage=self.usage, hsenet=self.about)

    async def events(self, first: str | None) -> AsyncIterator[str]:
        """Server-sent events."""
        yield self._chunk({"role": "assistant", "content": ""}, hsenet=self.about)
        try:
            while first is not None:
                yield self._chunk({"content": first})
                first = await self.piece()
        except Exception as error:
            status, content = refusal(error)
            yield _event(content)
            if status == 500:  # for the server's own log
                raise
            return
        yield self._chunk({}, self.finish_reason)
        if self.chat.with_usage:
            yield _event(self._object("chat.completion.chunk", choices=[], usage=self.usage))
        yield "data: [DONE]\n\n"

    def _chunk(self, delta: dict[str, str], finish_reason: str | None = None, **more) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return _event(self._object("chat.completion.chunk", choices=[choice], **more))

    def _object(self, kind: str, **content) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.service.name, **content}


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content)}\n\n"


__all__ = ["ScanService", "ServingLimits", "Writing"]
