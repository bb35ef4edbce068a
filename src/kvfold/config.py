"""What is chosen once per cache: codecs, scales, window. Frozen and validated on construction."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any

from kvfold.errors import InvalidConfig, UnknownCodec

PAGE_TOKENS = 128  # part of the format: token t of a sequence lies in page t // 128
# Tokens that share a stored mean key: half a page. Position encodings turn a mean within a page: one mean per 64 tokens
# leaves 10-15 % less energy to code than one per 128, for .03 bit (measured: LOG.md).
MEAN_TOKENS = 64

SCALES = ("norm", "unbiased", "least-squares", "match")
ROTATIONS = ("hadamard", "dense")
SKETCHES = ("gaussian", "orthogonal")
# Widths each codec exists in. `raw` stores the model's own numbers and is the lossless form.
CODEC_BITS: dict[str, tuple[float, ...]] = {
    "raw": (16,),
    "mse": (1, 2, 3, 4, 5, 6, 7, 8),
    "uniform": (2,),
    "prod": (1, 2, 3, 4, 5),
    "qjl": (1,),
    "polar": (3.875,),
    "split": (2.5, 3.5),
    "trellis": (1, 1.5, 2, 2.5, 3, 3.5, 4),
    "computed": (2, 3),
}
TRELLIS_CODECS = ("trellis", "computed")  # paths of a trellis; levels out of a table, or sums of what bits are worth
STATES = ("exact", "int8")
# Graded caches: half bits that the first layers have less than the others. The last layer has all of them (measured: LOG.md).
GRADED_KEYS = (-1,)
GRADED_VALUES = (-1, -1)
GRADED_TOP = 3.5  # bits that every engine has kernels for
# What profile files may hold in each field.
KINDS = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false"}
SCALED_CODECS = SEARCHED_CODECS = ("mse", "uniform", "split", *TRELLIS_CODECS)


TUNED = "tuned"  # its bits are an average over channels that a basis names


def _check_kinds(spec: Any) -> None:
    """Raise InvalidConfig for a field of another type than it is declared with; whole numbers count as numbers."""
    for each in fields(spec):
        x, kind = getattr(spec, each.name), str(each.type)
        number = kind == "float" and isinstance(x, int) and not isinstance(x, bool)
        if kind in KINDS and type(x).__name__ != kind and not number:
            raise InvalidConfig(f"{each.name} = {x!r} is not {KINDS[kind]}", "Compare it with the shipped profiles")


@dataclass(frozen=True)
class SideSpec:
    """How keys, or values, are folded.

    codec: one of CODEC_BITS. bits: nominal width per value (scales not counted, except in `split` and `polar`, whose
    names count everything). scale: how one stored scale per vector is chosen (SCALED_CODECS only): `norm` keeps
    the vector's length times the codebook (paper), `unbiased` makes <x, x_hat> = |x|^2, `least-squares` minimises the
    error, `match` makes |x_hat| = |x|. search: how many codebook grids the encoder tries per vector, 1 or 3; `trellis`
    and `computed` search their paths once for each.
    rotation: `hadamard` (seeded signs) or `dense` (paper). sketch: the matrix whose signs `prod` and `qjl` keep:
    `gaussian` (paper), or `orthogonal`, unbiased too and of less variance. basis: of codec `tuned`, the digest of the file
    that has a model's bases and the bits of their channels, of which `bits` is the average over this side.
    """

    codec: str = "mse"
    bits: float = 3
    scale: str = "norm"
    rotation: str = "hadamard"
    search: int = 1
    sketch: str = "gaussian"
    basis: str = ""

    def __post_init__(self) -> None:
        _check_kinds(self)
        if (self.codec == TUNED) != bool(self.basis):
            raise InvalidConfig(
                f"codec {self.codec!r} with the basis {self.basis!r}", "Load the profile that kvfold tune wrote"
            )
        if self.codec == TUNED:
            if not 0.25 <= self.bits <= 4:
                raise InvalidConfig(f"codec 'tuned' has no width {self.bits:g}", "Use 0.25 to 4 bits")
        elif self.codec not in CODEC_BITS:
            raise UnknownCodec(f"unknown codec {self.codec!r}", f"Use one of: {', '.join(CODEC_BITS)}")
        elif self.bits not in CODEC_BITS[self.codec]:
            widths = ", ".join(f"{b:g}" for b in CODEC_BITS[self.codec])
            raise InvalidConfig(f"codec {self.codec!r} has no width {self.bits:g}", f"Its widths are: {widths}")
        if self.scale not in SCALES:
            raise InvalidConfig(f"unknown scale {self.scale!r}", f"Use one of: {', '.join(SCALES)}")
        if self.search not in (1, 3) or (
            self.search > 1 and (self.scale == "norm" or self.codec not in SEARCHED_CODECS)
        ):
            raise InvalidConfig(
                f"search {self.search} does not go with codec {self.codec!r} and scale {self.scale!r}",
                "Use 1, or 3 with codec 'trellis', 'computed', 'mse' or 'uniform' and a scale other than 'norm'",
            )
        if self.codec in TRELLIS_CODECS and self.rotation != "hadamard":
            raise InvalidConfig(f"codec {self.codec!r} has no dense rotation", "Use rotation 'hadamard'")
        if self.rotation not in ROTATIONS:
            raise InvalidConfig(f"unknown rotation {self.rotation!r}", f"Use one of: {', '.join(ROTATIONS)}")
        if self.sketch not in SKETCHES:
            raise InvalidConfig(f"unknown sketch {self.sketch!r}", f"Use one of: {', '.join(SKETCHES)}")


@dataclass(frozen=True)
class CacheSpec:
    """Everything that decides what a folded cache holds.

    window: newest tokens a query reads exactly. sinks: first tokens read exactly. centre: subtract each page's mean
    key before folding and add q . mean back to its scores, which is exact. seed: of signs, rotations and sketches. states: how
    recurrent states of hybrid models are kept between calls: as they are, or in 8 bits a number. graded: the last layer's
    keys and values get more bits than those between, the first layers' fewer, as many in all; trellis codes only.
    bits_by_layer: instead, bits of keys and values of every layer of full attention that folds, in order, as `kvfold tune
    --by-layer` measures them. Layers of latents and of sliding windows have the bits of `key` and `value` in either case.
    """

    key: SideSpec = field(default_factory=lambda: SideSpec(scale="unbiased"))
    value: SideSpec = field(default_factory=lambda: SideSpec(scale="least-squares"))
    window: int = 64
    sinks: int = 4
    centre: bool = True
    seed: int = 1
    states: str = "exact"
    graded: bool = False
    bits_by_layer: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        _check_kinds(self)
        self._check_layers()
        if self.graded and not self.key.codec == self.value.codec == "trellis":
            raise InvalidConfig(
                "only trellis codes are graded", "Leave graded out, or use codec 'trellis' on both sides"
            )
        if self.states not in STATES:
            raise InvalidConfig(f"unknown states {self.states!r}", f"Use one of: {', '.join(STATES)}")
        if self.window < 0:
            raise InvalidConfig(f"window {self.window} is negative", "Use 0 or more tokens")
        if not 0 <= self.sinks < PAGE_TOKENS:
            raise InvalidConfig(f"sinks {self.sinks} must lie in page 0", f"Use 0 to {PAGE_TOKENS - 1}")
        if not 0 <= self.seed < 1 << 63:
            raise InvalidConfig(f"seed {self.seed} is not a 63-bit number", "Use 0 to 2**63 - 1")
        if self.centre and self.key.codec == "raw":
            raise InvalidConfig("raw keys are exact and are not centred", "Set centre = false")

    def _check_layers(self) -> None:
        """TOML and JSON have lists where a spec, which is a key of tables, has tuples."""
        try:
            pairs = tuple((float(key), float(value)) for key, value in self.bits_by_layer)
        except (TypeError, ValueError) as error:
            raise InvalidConfig(
                f"bits_by_layer = {self.bits_by_layer!r} are not pairs of numbers",
                "Give [key bits, value bits] for each layer",
            ) from error
        object.__setattr__(self, "bits_by_layer", pairs)
        if pairs and (self.graded or TUNED in (self.key.codec, self.value.codec)):
            raise InvalidConfig("layers have their bits from one place only", "Leave bits_by_layer out")
        for place in range(len(pairs)):
            self.for_layer(place, len(pairs))  # widths that a codec does not have are refused

    @property
    def by_place(self) -> bool:
        """Whether layers have bits of their own, so that pages differ in size."""
        return self.graded or bool(self.bits_by_layer)

    def with_overrides(self, **changes: object) -> CacheSpec:
        """A copy with fields replaced. `key_*` and `value_*` (codec, bits, scale, rotation, search) reach into a side,
        `scale` into both. A codec named without a width takes its width nearest to the old one; a search that the new
        codec or scale does not know is dropped, and so are bits by layer if a codec or bits change. None leaves a field as it
        is."""
        side: dict[str, dict[str, object]] = {"key": {}, "value": {}}
        top: dict[str, object] = {}
        for name, value in changes.items():
            if value is None:
                continue
            head, _, tail = name.partition("_")
            if name == "scale":
                side["key"]["scale"] = side["value"]["scale"] = value
            elif head in side and tail:
                side[head][tail] = value
            else:
                top[name] = value
        for head, own in side.items():
            if own:
                top[head] = _changed_side(getattr(self, head), own)
            if own.keys() & {"codec", "bits"} or top.get("graded"):
                top.setdefault("bits_by_layer", ())
        return replace(self, **top)  # type: ignore[arg-type]

    def for_latents(self) -> CacheSpec:
        """For layers of latent attention: latents folded as keys are, their rotary parts kept as they are."""
        return replace(self, value=SideSpec(codec="raw", bits=16), graded=False, bits_by_layer=())

    def for_windows(self) -> CacheSpec:
        """For sliding and chunked layers, which pass their first tokens: none of them are kept as sinks."""
        return replace(self, sinks=0, graded=False, bits_by_layer=())

    def for_layer(self, place: int, layers: int) -> CacheSpec:
        """For layer number `place` of `layers` that fold, with bits of its own. Raises InvalidConfig if bits_by_layer is
        of another number of layers."""
        if not self.by_place:
            return self
        if self.graded:
            sides = ((self.key, GRADED_KEYS), (self.value, GRADED_VALUES))
            key, value = (_graded(side, steps, place, layers) for side, steps in sides)
        else:
            if layers != len(self.bits_by_layer):
                raise InvalidConfig(
                    f"bits_by_layer names {len(self.bits_by_layer)} layers, and {layers} fold",
                    "Run kvfold tune on this model",
                )
            own = zip((self.key, self.value), self.bits_by_layer[place], strict=True)
            key, value = (replace(side, bits=bits) for side, bits in own)
        return replace(self, key=key, value=value, graded=False, bits_by_layer=())

    def ring_tokens(self) -> int:
        """Slots of the exact ring. Window, a page being filled, and the exact copy of every page that a trim inside
        the exact part could unfold again: ceil(window / 128) pages."""
        held_back = -(-self.window // PAGE_TOKENS)
        return self.window + PAGE_TOKENS * (1 + held_back)

    def folded_tokens(self, length: int) -> int:
        """Tokens that live in pages when a sequence is `length` tokens long: full pages outside the window."""
        return max(0, length - self.window) // PAGE_TOKENS * PAGE_TOKENS


def _graded(side: SideSpec, first: tuple[int, ...], place: int, layers: int) -> SideSpec:
    """The side in one layer. Too few layers share out what there are of steps; a side without room for it stays as it is."""
    first = first[: layers - 1]
    last = -sum(first)
    steps = first[place] if place < len(first) else last if place == layers - 1 else 0
    room = side.bits + min(first, default=0) / 2 >= 1 and side.bits + last / 2 <= GRADED_TOP
    return replace(side, bits=side.bits + steps / 2) if room else side


def _changed_side(spec: SideSpec, changes: dict[str, object]) -> SideSpec:
    codec = str(changes.get("codec", spec.codec))
    if codec in CODEC_BITS and "bits" not in changes:
        changes["bits"] = min(CODEC_BITS[codec], key=lambda b: abs(b - spec.bits))
    if "search" not in changes and (changes.get("scale", spec.scale) == "norm" or codec not in SEARCHED_CODECS):
        changes["search"] = 1
    return replace(spec, **changes)  # type: ignore[arg-type]
