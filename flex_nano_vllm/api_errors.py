"""Errors in OpenAI's shape, and what a client is told of an exception. Knows no request and no endpoint."""

import json
import logging

from starlette.responses import JSONResponse

from flex_nano_vllm.async_inference import EngineBusy, EngineClosing, EngineDead, EngineError
from flex_nano_vllm.intake import StructureError

logger = logging.getLogger(__name__)

DONE = "data: [DONE]\n\n"  # the last event of every stream
MAX_MESSAGE_LEN = 400  # some name what is wrong, and that may be long


class APIError(Exception):
    """An error in OpenAI's shape."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None):
        super().__init__(message if len(message) <= MAX_MESSAGE_LEN else f"{message[:MAX_MESSAGE_LEN]}…")
        self.status, self.code, self.param = status, code, param

    @property
    def body(self) -> dict:
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    @property
    def last_events(self) -> bytes:
        """What a stream ends with that has failed. In ASCII: some clients cut lines at any of Unicode's line breaks."""
        return f"data: {json.dumps(self.body)}\n\n{DONE}".encode()

    def response(self) -> JSONResponse:
        retry = {"Retry-After": "1"} if self.status == 429 else {"Retry-After": "10"} if self.status == 503 else {}
        return JSONResponse(self.body, self.status, headers=retry)


def api_error(error: Exception) -> APIError:
    """What a client is told of an exception."""
    match error:
        case APIError():
            return error
        case EngineBusy():
            return APIError(429, str(error), "queue_full")
        case EngineClosing():
            return APIError(503, str(error), "shutting_down")
        case EngineDead():
            return APIError(503, "the engine has died", "engine_dead")
        case EngineError():
            return APIError(500, str(error), "engine_error")
        case StructureError():
            return APIError(400, str(error), param="response_format")
        case ValueError():
            return APIError(400, str(error))
    logger.error("an unexpected error", exc_info=error)
    return APIError(500, "internal error", "internal_error")
