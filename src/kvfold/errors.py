"""Every error kvfold raises on purpose. Each message says what was wrong and what to do about it.

KvfoldError
├── InvalidConfig            a spec, profile or option that cannot exist
│   ├── UnknownProfile       no profile of that name
│   ├── UnknownCodec         no codec of that name
│   └── UnsupportedHeadDim   this codec or rotation has no form for that head_dim
├── InvalidInput             tensors that do not fit
│   ├── ShapeMismatch        wrong number of dims, heads, tokens
│   ├── DtypeMismatch        dtype changed or is not a floating one
│   ├── DeviceMismatch       tensors of one call on different devices
│   └── NonFiniteInput       NaN, infinity, or a scale beyond float16
├── CacheMisuse              the cache is asked for something it cannot do
│   ├── NotAttached          a FoldedCache in a model whose attention cannot read pages
│   ├── CannotTrim           more tokens than there are, or a layer without history
│   └── Unsupported          a feature refused by name
├── NoImplementation         no backend can run the request; carries every reason
├── ModelError               a model that cannot be loaded
│   ├── ModelNotFound
│   ├── NeedsRemoteCode
│   └── UnsupportedModel
├── RequestError             a request to a served model that cannot be met
│   ├── BadPrompt            empty, or refused by the chat template
│   ├── ChatTemplateMissing  messages, for a model that only continues text
│   ├── ContextTooLong       prompt and answer exceed the model's or the memory's limit
│   ├── Overloaded           too many requests wait already
│   ├── Draining             the model is being shut down
│   ├── RequestCancelled     by its client, or by the end of the server
│   ├── OutOfMemory          memory ran out under it
│   └── ModelFailure         a bug, here or in the model
├── MissingExtra             an optional dependency is not installed
└── EvaluationError          text too short, context too long, and the like
"""

from __future__ import annotations

from collections.abc import Iterable


class KvfoldError(Exception):
    """Base class. `cure` is one sentence on what to do; it is also the end of the message."""

    def __init__(self, message: str, cure: str = "") -> None:
        self.message = message
        self.cure = cure
        super().__init__(f"{message}. {cure}" if cure else message)

    def __reduce__(self) -> tuple[object, ...]:
        return (type(self), (self.message, self.cure))

    def as_json(self) -> dict[str, dict[str, str]]:
        """The object every command prints on failure under --json."""
        return {"error": {"kind": type(self).__name__, "message": self.message, "cure": self.cure}}


class InvalidConfig(KvfoldError, ValueError):
    pass


class UnknownProfile(InvalidConfig):
    pass


class UnknownCodec(InvalidConfig):
    pass


class UnsupportedHeadDim(InvalidConfig):
    pass


class InvalidInput(KvfoldError, ValueError):
    pass


class ShapeMismatch(InvalidInput):
    pass


class DtypeMismatch(InvalidInput):
    pass


class DeviceMismatch(InvalidInput):
    pass


class NonFiniteInput(InvalidInput):
    pass


class CacheMisuse(KvfoldError, RuntimeError):
    pass


class NotAttached(CacheMisuse):
    def __init__(self, message: str = "this model's attention cannot read folded pages", cure: str = "") -> None:
        super().__init__(message, cure or "Call kvfold.attach(model) once before generating with a FoldedCache")


class CannotTrim(CacheMisuse):
    pass


class Unsupported(CacheMisuse):
    pass


class NoImplementation(KvfoldError, RuntimeError):
    """Raised by dispatch when every candidate (or the one asked for by name) has a reason against it."""

    @classmethod
    def of(cls, op: str, tried: Iterable[tuple[str, list[str]]]) -> NoImplementation:
        lines = "; ".join(f"{name}: {', '.join(reasons)}" for name, reasons in tried)
        return cls(f"no implementation of {op} can run this request ({lines})", "Choose another backend or profile")


class ModelError(KvfoldError):
    pass


class ModelNotFound(ModelError):
    pass


class NeedsRemoteCode(ModelError):
    pass


class UnsupportedModel(ModelError):
    pass


class RequestError(KvfoldError):
    pass


class BadPrompt(RequestError):
    pass


class ChatTemplateMissing(RequestError):
    pass


class ContextTooLong(RequestError):
    pass


class Overloaded(RequestError):
    """`retry_seconds`: when to try again."""

    def __init__(self, message: str, cure: str = "", retry_seconds: int = 1) -> None:
        super().__init__(message, cure)
        self.retry_seconds = retry_seconds


class Draining(RequestError):
    pass


class RequestCancelled(RequestError):
    pass


class OutOfMemory(RequestError):
    pass


class ModelFailure(RequestError):
    pass


class MissingExtra(KvfoldError, ImportError):
    @classmethod
    def of(cls, what: str, package: str, extra: str) -> MissingExtra:
        return cls(f"{what} needs the package {package!r}", f"Install it with: pip install 'kvfold[{extra}]'")


class EvaluationError(KvfoldError, ValueError):
    pass
