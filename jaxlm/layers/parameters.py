"""Parameters: how they are initialised, and how model width and depth enter (standard, muP, CompleteP)."""

import dataclasses
import enum
import math
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.layers.context import Context


class InitScheme(enum.Enum):
    """Standard deviation of a matrix: one number for all (FIXED: GPT-2, BERT), or 1 / sqrt(fan_in) (T5)."""

    FIXED = "fixed"
    FAN_IN = "fan_in"


class ResidualInit(enum.Enum):
    """Matrices that write to the residual stream: as any other, or smaller by sqrt(branches) (GPT-2, 2.3)."""

    SAME = "same"
    BY_DEPTH = "by_depth"


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """Initialisation. Norm scales start at 1, biases at 0.

    T5 (arXiv 1910.10683; Mesh TensorFlow): FAN_IN, embedding_std 1, scaled_query, relative_bias_fan_in.
    GPT-2: FIXED 0.02, BY_DEPTH, position_std 0.01. BERT: FIXED 0.02 cut at 2. OLMo 2: FIXED 0.02 cut at 3.

    Attributes:
      scheme: standard deviation of the matrices.
      std: that number for FIXED; for FAN_IN a factor on 1 / sqrt(fan_in).
      cut: matrices and embeddings are drawn again beyond this many standard deviations; None is a full normal.
      residual: see `ResidualInit`.
      embedding_std: token and type embeddings; None is `std` of FIXED, and 1 of FAN_IN.
      position_std: learned positions; None is as the token embeddings.
      head_std: an output matrix of its own; None is as the other matrices.
      scaled_query: the query projection starts smaller by sqrt(head_dim): T5, which does not scale its scores.
    """

    scheme: InitScheme = InitScheme.FIXED
    std: float = 0.02
    cut: float | None = None
    residual: ResidualInit = ResidualInit.SAME
    embedding_std: float | None = None
    position_std: float | None = None
    head_std: float | None = None
    scaled_query: bool = False

    def __post_init__(self):
        object.__setattr__(self, "scheme", InitScheme(self.scheme))
        object.__setattr__(self, "residual", ResidualInit(self.residual))

    @property
    def token_std(self) -> float:
        """Standard deviation of token embeddings."""
        if self.embedding_std is not None:
            return self.embedding_std
        return self.std if self.scheme is InitScheme.FIXED else 1.0


class Scaling(enum.Enum):
    """How hyperparameters follow width and depth: not at all, muP (arXiv 2203.03466), CompleteP (2505.01618)."""

    STANDARD = "standard"
    MUP = "mup"
    COMPLETEP = "completep"


@dataclasses.dataclass(frozen=True)
class Parametrization:
    """Makes hyperparameters tuned on a small model right for a large one of the same family.

    At width = base_width, depth = base_depth and head_dim = base_head_dim it equals the standard parametrisation.
    With m = width / base_width and n = depth / base_depth (CompleteP, Table 1; muP has n = 1):

    | role | initial variance | learning rate (Adam) | Adam epsilon | weight decay |
    |---|---|---|---|---|
    | input | as at base | 1 | 1/m | 1 |
    | hidden | 1/m of base | 1/m * n^(alpha-1) | 1/m * n^-alpha | m |
    | vector | - | n^(alpha-1) | 1/m * n^-alpha | 1 |
    | output | as at base, and logits / m | 1 | 1/m | 1 |

    Residual branches are multiplied by n^-alpha, attention scores by sqrt(base_head_dim) / head_dim. The width whose
    root scales embeddings or logits (`scale_by_width`) is the base's.

    Attributes:
      kind: see `Scaling`.
      base_width: width of the model the hyperparameters were tuned on.
      base_depth: its number of layers (of each stack).
      base_head_dim: its head size; 1 gives the scores muP's plain 1 / head_dim.
      alpha: exponent of depth, 1 in CompleteP; 0.5 keeps features' sum stable but lets layers become lazy.
    """

    kind: Scaling = Scaling.STANDARD
    base_width: int = 256
    base_depth: int = 2
    base_head_dim: int = 64
    alpha: float = 1.0

    def __post_init__(self):
        object.__setattr__(self, "kind", Scaling(self.kind))

    def width_ratio(self, width: int) -> float:
        """m: width over base width; 1 in the standard parametrisation."""
        return 1.0 if self.kind is Scaling.STANDARD else width / self.base_width

    def scaled_width(self, width: int) -> float:
        """Of whose root `scale_by_width` makes factors: the base's, beside which the table says what grows with m."""
        return width / self.width_ratio(width)

    def depth_ratio(self, depth: int) -> float:
        """n: depth over base depth; 1 except in CompleteP."""
        return depth / self.base_depth if self.kind is Scaling.COMPLETEP else 1.0

    def residual_multiplier(self, depth: int) -> float:
        """Factor on the output of every residual branch."""
        return self.depth_ratio(depth) ** -self.alpha

    def attention_scale(self, head_dim: int) -> float:
        """Factor on q . k."""
        if self.kind is Scaling.STANDARD:
            return 1.0 / math.sqrt(head_dim)
        return math.sqrt(self.base_head_dim) / head_dim

    def learning_rate_multiplier(self, role: str, width: int, depth: int) -> float:
        """Factor on the learning rate of Adam and its kin, by a parameter's role."""
        by_depth = self.depth_ratio(depth) ** (self.alpha - 1.0) if role in ("hidden", "vector") else 1.0
        return by_depth / (self.width_ratio(width) if role == "hidden" else 1.0)

    def epsilon_multiplier(self, role: str, width: int, depth: int) -> float:
        """Factor on Adam's epsilon, by role."""
        by_depth = self.depth_ratio(depth) ** -self.alpha if role in ("hidden", "vector") else 1.0
        return by_depth / self.width_ratio(width)

    def weight_decay_multiplier(self, role: str, width: int) -> float:
        """Factor on decoupled weight decay (which the learning rate multiplies), by role."""
        return self.width_ratio(width) if role == "hidden" else 1.0


# ((logical axis, size), ...), e.g. (("heads", 8), ("head_dim", 64)); an axis called None is never sharded.
Dims = tuple[tuple[str | None, int], ...]


@dataclasses.dataclass(frozen=True, eq=False)
class PathKey:
    """The jax key of each part of a model: a function of the path to it, not of the order in which parts are made.

    A path is folded in as a whole, when its key is needed: folding costs compilation time.

    Attributes:
      root: jax key.
      path: names from the root on, each with a slash before it.
    """

    root: jax.Array
    path: str = ""

    def at(self, name: str | int) -> "PathKey":
        """The key of a part."""
        return PathKey(self.root, f"{self.path}/{name}")

    def layer(self, index: int | jax.Array) -> "PathKey":
        """The key of a layer, whose index may be traced; inside it paths start anew."""
        return PathKey(jax.random.fold_in(self.key, index))

    @property
    def key(self) -> jax.Array:
        """The jax key."""
        return jax.random.fold_in(self.root, zlib.crc32(self.path.encode())) if self.path else self.root


@dataclasses.dataclass(frozen=True)
class ParameterMaker:
    """Makes every parameter of a model: value, logical axes, role.

    Attributes:
      init: how values start.
      parametrization: how width and depth enter.
      width: model width (E).
      depth: layers of the stack the parameters are for; 1 outside stacks.
      branches: branches of that stack's blocks that write to the residual stream; 2 outside stacks.
      stacked: the parameters will get a leading axis "layers" (they are made under vmap).
      encoder_width: width of what cross-attention reads; None is `width`.
    """

    init: InitConfig
    parametrization: Parametrization
    width: int
    depth: int = 1
    branches: int = 2
    stacked: bool = False
    encoder_width: int | None = None

    def matrix(
        self,
        key: PathKey,
        inputs: Dims,
        outputs: Dims,
        *,
        gain: float = 1.0,
        std: float | None = None,
        count: Dims = (),
        share: float = 1.0,
        used_as: jnp.dtype | None = None,
    ) -> nnx.Param:
        """A matrix within the model, or several in one array.

        Args:
          key: of the parameter.
          inputs, outputs: its two sides; the shape is count + inputs + outputs.
          gain: factor on its standard deviation.
          std: in place of the initialisation's standard deviation.
          count: how many there are, e.g. (("experts", 8),).
          share: of the matrices, how many each token is multiplied with, as a fraction.
          used_as: the type to which it is cast before any use. Where parameters travel between devices once a step,
            they do so in this type.
        """
        if std is not None:
            pass
        elif self.init.scheme is InitScheme.FIXED:
            std = self.init.std / math.sqrt(self.parametrization.width_ratio(self.width))
        else:
            std = self.init.std / math.sqrt(math.prod(size for _, size in inputs))
        return self._random(key, count + inputs + outputs, std * gain, "hidden", share=share, used_as=used_as)

    @property
    def residual_gain(self) -> float:
        """`gain` of matrices that write to the residual stream."""
        return 1.0 / math.sqrt(self.branches) if self.init.residual is ResidualInit.BY_DEPTH else 1.0

    def embedding(self, key: PathKey, dims: Dims, std: float | None = None) -> nnx.Param:
        """A table that ids or positions look up."""
        return self._random(key, dims, self.init.token_std if std is None else std, "input")

    def head(self, key: PathKey, inputs: Dims, outputs: Dims) -> nnx.Param:
        """The output matrix, `readout` but for `InitConfig.head_std`."""
        return self.readout(key, inputs, outputs, std=self.init.head_std)

    def readout(self, key: PathKey, inputs: Dims, outputs: Dims, *, std: float | None = None) -> nnx.Param:
        """A matrix to numbers whose count does not follow width, such as logits.

        Its scale does not follow width either; who uses it divides by `Parametrization.width_ratio`. `std` replaces the
        standard deviation of other matrices.
        """
        fan_in = math.prod(size for _, size in inputs) / self.parametrization.width_ratio(self.width)
        by_scheme = self.init.std if self.init.scheme is InitScheme.FIXED else self.init.std / math.sqrt(fan_in)
        return self._random(key, inputs + outputs, by_scheme if std is None else std, "output")

    def vector(self, dims: Dims, value: float) -> nnx.Param:
        """A scale or bias."""
        return self._param(jnp.full(tuple(size for _, size in dims), value, jnp.float32), dims, "vector")

    def vector_of(self, values: jax.Array, dims: Dims) -> nnx.Param:
        """Scales, biases, decays that start as these float32 values, of the sizes that `dims` has."""
        return self._param(values, dims, "vector")

    def table(self, key: PathKey, dims: Dims, std: float) -> nnx.Param:
        """A small random table whose size does not follow the width, such as relative position biases."""
        return self._random(key, dims, std, "vector")

    def _random(self, key: PathKey, dims: Dims, std: float, role: str, **facts: Any) -> nnx.Param:
        shape = tuple(size for _, size in dims)
        if self.init.cut is None:
            values = jax.random.normal(key.key, shape, jnp.float32)
        else:
            values = jax.random.truncated_normal(key.key, -self.init.cut, self.init.cut, shape, jnp.float32)
        return self._param(values * std, dims, role, **facts)

    def _param(self, values: jax.Array, dims: Dims, role: str, **facts: Any) -> nnx.Param:
        axes = tuple(name for name, _ in dims)
        return nnx.Param(values, axes=("layers", *axes) if self.stacked else axes, role=role, **facts)


class Linear(nnx.Module):
    """x W (+ b) over one or more axes: [..., *inputs] -> [..., *outputs]."""

    def __init__(
        self,
        make: ParameterMaker,
        inputs: Dims,
        outputs: Dims,
        *,
        bias: bool = False,
        gain: float = 1.0,
        std: float | None = None,
        dtype: jnp.dtype,
        key: PathKey,
    ):
        self.kernel = make.matrix(key.at("kernel"), inputs, outputs, gain=gain, std=std, used_as=dtype)
        self.bias = make.vector(outputs, 0.0) if bias else None
        self.contracted = len(inputs)
        self.dtype = dtype

    def __call__(self, x: jax.Array, context: Context) -> jax.Array:
        """The product, in `dtype`."""
        out = context.matmul(x, self.kernel[...].astype(self.dtype), self.contracted)
        return out if self.bias is None else out + self.bias[...].astype(self.dtype)
