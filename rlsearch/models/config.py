"""Shapes of models: what a family is made of is data, not a fork.  The table of published shapes is in models.variants."""
from __future__ import annotations

import dataclasses

FAMILIES = ('qwen2', 'qwen3', 'qwen3_moe', 'llama', 'gemma3')
REMATS = ('none', 'full', 'dots')
KERNELS = ('auto', 'plain', 'splash', 'cudnn')
ACTIVATIONS = ('silu', 'gelu_tanh')
GLOBAL, LOCAL = 0, 1     # kinds of layers
EVERYTHING = 1 << 30     # the window of a layer that sees all


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
  """The change of RoPE's frequencies in Llama 3.1 and 3.2: long waves are `factor` times longer, short ones as they were.

  Grattafiori et al. 2024, Sec. 3.4.3, and the released code; between the two bounds the frequency is interpolated.

  Attributes:
    factor: by which frequencies below the low bound are divided.
    low, high: waves longer than original / low change, those shorter than original / high do not.
    original: length of context before the change.
  """
  factor: float
  low: float
  high: float
  original: int


@dataclasses.dataclass(frozen=True)
class LinearRope:
  """Positions divided by `factor` (Chen et al. 2023, Sec. 2.3); in Gemma 3's global layers."""
  factor: float


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A decoder-only transformer: RMSNorm, RoPE, grouped-query attention, a gated MLP or a mixture of them.

  Attributes:
    vocab_size: rows of the embedding table (at least the tokenizer's size).
    num_layers, width, num_heads, num_kv_heads, head_size, ffn: L, D, N, N_kv, H and the MLP's hidden size.
    family: whose checkpoints have this shape: names and order of the tensors in a Hugging Face folder.
    qkv_bias: biases on queries, keys and values (Qwen2).
    qk_norm: RMSNorm of each head's queries and keys before RoPE (Qwen3, Gemma 3).
    norm_offset: added to the weights of norms: 1 in Gemma, whose files hold what is above 1.
    post_norms: norms behind attention and MLP as well as before them (Gemma).
    activation: of the MLP's gate: 'silu', or 'gelu_tanh' (Gemma).
    embed_scale: embeddings are multiplied by sqrt(D) (Gemma).
    query_scale: of the scores; 0: H^-1/2.
    tied: output projection is the transposed embedding.
    rope_base: θ of RoFormer, Su et al. 2021, Sec. 3.4.
    rope_scaling: how the frequencies of the global layers are changed; None: not.
    sliding_window: tokens that a local layer's query sees, itself included; 0: no layer is local.
    global_every: of the layers, each global_every-th is global, the others local.
    rope_local_base: θ of the local layers.
    num_experts: of each layer's mixture; 0: one dense MLP of `ffn`.
    experts_per_token, expert_ffn: k, and the hidden size of one expert.
    norm_topk: the weights of the chosen experts are divided by their sum.
    norm_eps: ε of RMSNorm.
    max_positions: that the checkpoint was trained for; written to config.json, no limit here.
    remat: what a block's backward pass computes again: 'none', 'full', or 'dots' (all but products with weights).
    attention: kernel of the update: 'auto' takes the best of the mesh's devices; see models.attention.
    dtype: of activations; parameters, norms, softmax and log-softmax are float32.
    vocab_chunk: columns of the logits that exist at once.
    num_tokens: ids from here on pad the table: never drawn, and of probability 0 for the trainer too; 0: none do.
  """
  vocab_size: int
  num_layers: int
  width: int
  num_heads: int
  num_kv_heads: int
  head_size: int
  ffn: int
  family: str = 'qwen2'
  qkv_bias: bool = True
  qk_norm: bool = False
  norm_offset: float = 0.
  post_norms: bool = False
  activation: str = 'silu'
  embed_scale: bool = False
  query_scale: float = 0.
  tied: bool = True
  rope_base: float = 1e6
  rope_scaling: Llama3Rope | LinearRope | None = None
  sliding_window: int = 0
  global_every: int = 0
  rope_local_base: float = 1e4
  num_experts: int = 0
  experts_per_token: int = 0
  expert_ffn: int = 0
  norm_topk: bool = True
  norm_eps: float = 1e-6
  max_positions: int = 32768
  remat: str = 'full'
  attention: str = 'auto'
  dtype: str = 'bfloat16'
  vocab_chunk: int = 8192
  num_tokens: int = 0

  def __post_init__(self):
    for name in ('vocab_size', 'num_layers', 'width', 'num_heads', 'num_kv_heads', 'head_size', 'ffn', 'vocab_chunk'):
      if getattr(self, name) < 1:
        raise ValueError(f'config.model.{name}={getattr(self, name)}: wants a positive number')
    if self.num_heads % self.num_kv_heads:
      raise ValueError(f'config.model.num_heads={self.num_heads}: not a multiple of num_kv_heads={self.num_kv_heads}')
    if self.head_size % 2:
      raise ValueError(f'config.model.head_size={self.head_size}: RoPE wants an even number')
    for name, known in (('dtype', ('float32', 'bfloat16')), ('family', FAMILIES), ('remat', REMATS),
                        ('attention', KERNELS), ('activation', ACTIVATIONS)):
      if getattr(self, name) not in known:
        raise ValueError(f'config.model.{name}={getattr(self, name)!r}; known: {", ".join(known)}')
    if bool(self.sliding_window) != bool(self.global_every):
      raise ValueError(f'config.model.sliding_window={self.sliding_window}, global_every={self.global_every}: want both '
                       'or neither')
    mixture = (self.num_experts, self.experts_per_token, self.expert_ffn)
    if any(mixture) and (min(mixture) < 1 or self.experts_per_token > self.num_experts):
      raise ValueError(f'config.model: num_experts, experts_per_token and expert_ffn={mixture}: want positive numbers, '
                       'no more experts a token than there are, or 0 for all three')

  @property
  def kinds(self) -> tuple[int, ...]:
    """Of each layer: GLOBAL or LOCAL."""
    if not self.sliding_window:
      return (GLOBAL,) * self.num_layers
    return tuple(GLOBAL if (i + 1) % self.global_every == 0 else LOCAL for i in range(self.num_layers))

  @property
  def windows(self) -> tuple[int, ...]:
    """Tokens that a query sees, by kind of layer; one entry where all layers are global."""
    return (EVERYTHING, self.sliding_window) if self.sliding_window else (EVERYTHING,)
