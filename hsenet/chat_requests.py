# Copyright 2026 The HSENet package authors. Licensed under the Apache License, Version 2.0.
"""What a client of `hsenet serve` asks, out of the body of a request to `/v1/chat/completions`.

The format is OpenAI's. What would change the answer and is not done here is refused, not ignored.
"""

import base64
import binascii
import json
import secrets
from dataclasses import dataclass
from typing import Any


# Fields without a say in the text.
IGNORED = {"metadata", "service_tier", "store", "user"}
# Fields that are taken at the value that changes nothing.
ONLY = {
    "n": 1,
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logprobs": False,
    "response_format": {"type": "text"},
    "tools": [],
}
SCAN_EXPECTED = (
    'a content part {"type": "image_url", "image_url": {"url": "data:application/octet-stream;base64,..."}} with the '
    "bytes of a NIfTI or NRRD file, or of a zip with a DICOM CT series"
)


class RequestError(ValueError):
    """A request that is refused, with the HTTP status; the words are for the client."""

    def __init__(self, message: str, status: int = 400):
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class ChatRequest:
    """
    Args:
        scan (`bytes`): of the file or archive.
        question (`str`): the last message's text.
        max_new_tokens (`int`).
        temperature (`float`): 0: the likeliest words.
        top_p (`float`): in (0, 1]; of what is drawn.
        seed (`int`): of what is drawn; a random one if the client gave none.
        stream (`bool`): pieces as they are written.
        with_usage (`bool`): whether a stream ends with the numbers of tokens.
    """

    scan: bytes
    question: str
    max_new_tokens: int
    temperature: float
    top_p: float
    seed: int
    stream: bool
    with_usage: bool


def read_request(body: bytes, *, model: str, max_new_tokens: int) -> ChatRequest:
    """
    Args:
        body (`bytes`): JSON.
        model (`str`): the name of the one that is served.
        max_new_tokens (`int`): the most that a client may ask for.

    Raises:
        RequestError: with what was expected and what was found.
    """
    try:
        fields = json.loads(body)
    except (ValueError, RecursionError):
        raise RequestError("Expected a body in JSON, got something else.") from None
    if not isinstance(fields, dict):
        raise RequestError(f"Expected a JSON object, got a {type(fields).__name__}.")
    # JSON's null is a field left out.
    fields = {name: value for name, value in fields.items() if value is not None and name not in IGNORED}
    if fields.pop("model", model) != model:
        raise RequestError(f"Expected the model {model!r}, the one that is served, got another name.", 404)
    for name, value in ONLY.items():
        if fields.pop(name, value) != value:
            raise RequestError(f"{name}: expected {json.dumps(value)} or nothing, the only choice here.")
    scan, question = _scan_and_question(fields.pop("messages", None))
    length = fields.pop("max_tokens", min(256, max_new_tokens))
    settings = {
        "max_new_tokens": _number(
            "max_completion_tokens", fields.pop("max_completion_tokens", length), 1, max_new_tokens, int
        ),
        "temperature": _number("temperature", fields.pop("temperature", 0), 0, 2),
        "top_p": _number("top_p", fields.pop("top_p", 1), 0.01, 1),
        "seed": _number("seed", fields.pop("seed", secrets.randbits(63)), -(2**63), 2**63 - 1, int),
        "stream": _yes_or_no("stream", fields.pop("stream", False)),
        "with_usage": _with_usage(fields.pop("stream_options", {})),
    }
    if fields:
        raise RequestError(
            f"Expected no fields but those in the documentation, got {', '.join(sorted(fields))[:200]}."
        )
    return ChatRequest(scan, question, **settings)


def refusal(error: Exception) -> tuple[int, dict[str, Any]]:
    """HTTP status, and what the client is told: our words where they are meant for it, else only what kind it was."""
    if isinstance(error, ValueError):  # about request, scan or question
        status, message = getattr(error, "status", 400), str(error)
    elif isinstance(error, ImportError):  # the reader of such a scan is not installed
        status, message = 501, str(error)
    else:
        status, message = 500, f"The server failed: {type(error).__name__}."
    kind = "invalid_request_error" if status < 500 else "server_error"
    return status, {"error": {"message": message, "type": kind, "param": None, "code": None}}


def _scan_and_question(messages: Any) -> tuple[bytes, str]:
    """The one scan of a conversation, wherever it was sent, and its last text.

    Answers are of one turn, as the model was trained: what was said before is not read.
    """
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise RequestError("messages: expected a list of messages, the last of them from the user.")
    if unknown := {str(message.get("role")) for message in messages} - {"user", "assistant"}:
        raise RequestError(
            f"messages: expected the roles user and assistant, got {', '.join(sorted(unknown))[:100]}: the model was "
            "trained without others."
        )
    if messages[-1]["role"] != "user":
        raise RequestError("messages: expected the last one from the user, got one from the assistant.")
    contents = [_parts(message.get("content")) for message in messages if message["role"] == "user"]
    texts = [part["text"] for part in contents[-1] if part["type"] == "text"]
    scans = {_data_url(part) for content in contents for part in content if part["type"] != "text"}
    if len(scans) != 1:
        raise RequestError(f"messages: expected one scan, got {len(scans)}; {SCAN_EXPECTED}.")
    if not all(isinstance(text, str) for text in texts) or not "".join(texts).strip():
        raise RequestError("messages: expected a question in the last one, got no text.")
    return _decoded(scans.pop()), "\n".join(texts)


def _parts(content: Any) -> list[dict]:
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    known = ("text", "image_url", "file")
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") in known and part["type"] in part for part in content
    ):
        return content
    raise RequestError(f"messages: expected as content a string, or parts of type text and {SCAN_EXPECTED}.")


def _data_url(part: dict) -> str:
    """The scan as it was sent; a path or an address would make the server read what the client could not."""
    holder, name = (part["image_url"], "url") if part["type"] == "image_url" else (part["file"], "file_data")
    url = holder.get(name) if isinstance(holder, dict) else holder
    if not isinstance(url, str) or not url[:5].lower() == "data:":
        raise RequestError(f"Expected the scan itself, not a path or an address to fetch it from: {SCAN_EXPECTED}.")
    return url


def _decoded(url: str) -> bytes:
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise RequestError(f"Expected base64 after the comma of the data URL: {SCAN_EXPECTED}.")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError("Expected base64 in the data URL, got other characters or a wrong length.") from None


def _number(name: str, value: Any, least: float, most: float, kind: type = float) -> Any:
    kinds = (int,) if kind is int else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds) or not least <= value <= most:
        what = "a whole number" if kind is int else "a number"
        raise RequestError(f"{name}: expected {what} from {least} to {most}.")
    return kind(value)


def _yes_or_no(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise RequestError(f"{name}: expected true or false.")
    return value


def _with_usage(options: Any) -> bool:
    if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
        raise RequestError("stream_options: expected an object with include_usage.")
    return _yes_or_no("include_usage", options.get("include_usage") or False)


__all__ = ["ChatRequest", "RequestError", "read_request", "refusal"]
