"""Request bodies. What is not implemented is refused by its name, and the OpenAPI document says so too."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from kvfold.serving.generation import MAX_STOP_CHARACTERS, MAX_STOPS, Generation
from kvfold.sessions.disk import SESSION_NAME

T = TypeVar("T")
Stop = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Number = Annotated[float, Field(allow_inf_nan=False)]
SessionName = Annotated[str, StringConstraints(pattern=f"^{SESSION_NAME.pattern}$")]
TokenId = Annotated[int, Field(ge=0, le=1 << 31)]
# For parameters that exist elsewhere and have one value here.
Only = Annotated[T | None, Field(description="Accepted with this value only.")]
Ignored = Annotated[T | None, Field(description="Accepted, and without effect on a local server.")]


def _boolean(x: Any) -> Any:
    if not isinstance(x, bool):
        raise ValueError("Input should be false")
    return x


# To Python 1 is True and 0 is False, and to Literal, too; to JSON they are not.
One = Annotated[int, Field(ge=1, le=1)]
No = Annotated[Literal[False], BeforeValidator(_boolean)]


class Body(BaseModel):
    """Strict: no strings for numbers, no unknown fields."""

    model_config = ConfigDict(strict=True, extra="forbid")


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Ignored[bool] = None


class SamplingBody(Body):
    """What both completion endpoints share."""

    model: Annotated[str, Field(description="An id of /v1/models.")]
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0, le=1 << 31)] | None = None
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=10)] | None = None
    logit_bias: (
        dict[Annotated[str, StringConstraints(pattern=r"^[0-9]{1,9}$")], Annotated[Number, Field(ge=-100, le=100)]]
        | None
    ) = None
    seed: int | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    max_tokens: Annotated[int, Field(ge=1, le=1 << 31)] | None = None
    ignore_eos: Annotated[bool, Field(description="Go on after an end token.")] = False
    n: Only[One] = None
    user: Ignored[str] = None
    session: Annotated[SessionName | None, Field(description="Keep prompt and answer in the session of this name.")] = (
        None
    )
    id_slot: Annotated[int, Field(ge=-1, le=1 << 16, description="llama-server's: the session of a slot.")] = -1
    cache_prompt: Annotated[bool | None, Field(description="False: read all of the prompt again.")] = None

    @model_validator(mode="after")
    def _usage_of_streams(self) -> SamplingBody:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream")
        return self

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def generation(self, max_tokens: int | None, logprobs: int | None) -> Generation:
        """What is to be decoded; OpenAI's defaults where nothing was said."""
        given: dict[str, Any] = {
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "min_p": self.min_p,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed,
            "max_tokens": max_tokens,
            "logprobs": logprobs,
            "logit_bias": {int(k): b for k, b in (self.logit_bias or {}).items()},
            "stop": (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ()),
            "ignore_end": self.ignore_eos,
            "reuse": self.cache_prompt,
        }
        return Generation(**{k: x for k, x in given.items() if x is not None})


class TextPart(Body):
    type: Literal["text"]
    text: str


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: Ignored[str] = None
    # An answer that is sent back as it was received has these, empty.
    refusal: Only[Literal[""]] = None
    annotations: Only[Annotated[list[Any], Field(max_length=0)]] = None
    tool_calls: Only[Annotated[list[Any], Field(max_length=0)]] = None
    audio: None = None
    function_call: None = None

    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ResponseFormat(Body):
    type: Literal["text"]


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=1 << 31)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: Only[ResponseFormat] = None
    tools: Only[Annotated[list[Any], Field(max_length=0)]] = None
    tool_choice: Only[Literal["none", "auto"]] = None
    modalities: Only[list[Literal["text"]]] = None
    parallel_tool_calls: Ignored[bool] = None
    store: Only[No] = None
    metadata: Ignored[dict[str, str]] = None
    service_tier: Only[Literal["auto", "default"]] = None
    prompt_cache_key: Ignored[str] = None
    safety_identifier: Ignored[str] = None

    @model_validator(mode="after")
    def _logprobs_first(self) -> ChatBody:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs")
        return self

    def as_generation(self, default_tokens: int | None) -> Generation:
        tokens = self.max_completion_tokens or self.max_tokens or default_tokens
        return self.generation(tokens, (self.top_logprobs or 0) if self.logprobs else None)


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=1)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=1)]
    )
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    echo: Only[No] = None
    best_of: Only[One] = None
    suffix: Only[Literal[""]] = None

    def as_generation(self) -> Generation:
        """OpenAI's default here is 16 tokens."""
        return self.generation(16 if self.max_tokens is None else self.max_tokens, self.logprobs)

    @property
    def text_or_ids(self) -> str | list[int]:
        """The one prompt, out of whatever list it came in."""
        if isinstance(self.prompt, str):
            return self.prompt
        first = self.prompt[0]
        return [i for i in self.prompt if isinstance(i, int)] if isinstance(first, int) else first
